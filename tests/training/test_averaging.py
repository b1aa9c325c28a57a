"""The moving average is the one of the definition, and leaves the network its own weights."""

import pytest
import torch

from vitembed.training.averaging import MovingAverage


def steps(network: torch.nn.Module, number: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    weights = []
    for _ in range(number):
        weights.append(torch.randn(3, 2, generator=random))
        network.load_state_dict({"weight": weights[-1]})
    return weights


def test_the_average_is_that_of_a_plain_loop() -> None:
    network = torch.nn.Linear(2, 3, bias=False)
    expected = network.weight.detach().clone()
    average = MovingAverage(network, 0.8)
    for number, weight in enumerate(steps(network, 30), start=1):
        network.load_state_dict({"weight": weight})
        average.update()
        decay = min(0.8, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight
    with average.applied():
        torch.testing.assert_close(network.weight.detach(), expected)
    torch.testing.assert_close(network.weight.detach(), weight, rtol=0, atol=0)


def test_the_network_has_its_own_weights_again_after_an_error() -> None:
    network = torch.nn.Linear(2, 3)
    average = MovingAverage(network, 0.5)
    torch.nn.init.constant_(network.weight, 7.0)

    def fail() -> None:
        with average.applied():
            assert (network.weight != 7).all()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (network.weight == 7).all()


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    network = torch.nn.Linear(2, 3, bias=False)
    whole, first = MovingAverage(network, 0.9), MovingAverage(network, 0.9)
    weights = steps(network, 8)
    rest = None
    for number, weight in enumerate(weights):
        network.load_state_dict({"weight": weight})
        whole.update()
        if number < 5:
            first.update()
            continue
        if rest is None:
            rest = MovingAverage(network, 0.9)
            rest.load_state_dict(first.state_dict())
        rest.update()
    assert rest is not None
    with whole.applied():
        expected = network.weight.detach().clone()
    with rest.applied():
        assert torch.equal(network.weight, expected)


def test_whole_numbers_are_copied() -> None:
    network = torch.nn.BatchNorm1d(3)
    average = MovingAverage(network, 0.9)
    network(torch.randn(4, 3))
    network(torch.randn(4, 3))
    average.update()
    with average.applied():
        assert network.num_batches_tracked == 2
