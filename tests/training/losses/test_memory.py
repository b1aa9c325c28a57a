"""Cross-batch memory against a plain queue, its gradient, its state in a checkpoint, its drift, and what it refuses."""

import copy
import io
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from vitembed.errors import CheckpointError, ConfigError, VectorError
from vitembed.training.losses.memory import CrossBatchMemory
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "ContrastiveLoss": losses.ContrastiveLoss,
    "TripletMarginLoss": lambda: losses.TripletMarginLoss(margin=0.3),
    "MultiSimilarityLoss": losses.MultiSimilarityLoss,
    "MarginLoss": lambda: losses.MarginLoss(learn_beta=True),
    "NTXentLoss": losses.NTXentLoss,
}


class PairShares(nn.Module):
    """A loss of our contract that says what share of its terms is not zero, without a line in common with ours."""

    margin = 0.5

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        ref_emb, ref_labels = (embeddings, labels) if ref_emb is None else (ref_emb, ref_labels)
        assert ref_labels is not None
        terms = (embeddings @ ref_emb.T - self.margin).relu() * (labels[:, None] != ref_labels)
        self.active_share = (terms > 0).float().mean().detach()
        return terms.mean()


def batches(sizes: Sequence[int], *, dim: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (embeddings, labels, positions) for each size, of ten images each with a class of three."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        positions = torch.randint(0, 10, (size,), generator=random)
        rows = torch.randn(size, dim, generator=random, dtype=torch.float64)
        found.append((nn.functional.normalize(rows), positions % 3, positions))
    return found


class PlainQueue:
    """The paper's queue, row by row, entered after the comparison."""

    def __init__(self, loss: nn.Module, size: int, *, miner: Any = None, warmup: int = 0, weight: float = 1.0) -> None:
        self.loss, self.miner, self.warmup, self.weight = loss, miner, warmup, weight
        self.queue: deque[tuple[list[float], int]] = deque(maxlen=size)
        self.calls = 0

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        total = self.loss(embeddings, labels, self.miner(embeddings, labels) if self.miner else None)
        if self.queue and self.calls >= self.warmup:
            rows = torch.tensor([row for row, _ in self.queue], dtype=embeddings.dtype)
            classes = torch.tensor([label for _, label in self.queue])
            chosen = self.miner(embeddings, labels, rows, classes) if self.miner else None
            total = total + self.weight * self.loss(embeddings, labels, chosen, rows, classes)
        for row, label in zip(embeddings.detach().tolist(), labels.tolist(), strict=True):
            self.queue.append((row, label))
        self.calls += 1
        return total  # type: ignore[no-any-return]


def value_and_gradient(loss: Callable[..., Tensor], embeddings: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *args)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(
    ("size", "warmup", "weight"), [(20, 0, 1.0), (20, 2, 0.5), (7, 0, 1.0), (5, 1, 2.0), (64, 0, 1.0)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_those_of_a_plain_queue(
    name: str, size: int, warmup: int, weight: float, mined: bool
) -> None:
    miner = miners.MultiSimilarityMiner(epsilon=0.5) if mined else None
    ours = CrossBatchMemory(LOSSES[name]().double(), size=size, miner=miner, warmup=warmup, weight=weight)
    plain = PlainQueue(LOSSES[name]().double(), size, miner=miner, warmup=warmup, weight=weight)
    for embeddings, labels, positions in batches([7, 7, 5, 7, 1, 7, 9, 7]):  # some larger than the smallest memory
        value, gradient = value_and_gradient(ours, embeddings, labels, None, positions)
        expected, slope = value_and_gradient(plain, embeddings, labels)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
        assert ours.count == len(plain.queue)


def test_no_image_is_compared_with_itself_and_only_the_batch_gets_a_gradient() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(PairShares):
        def forward(self, *args: Any, **references: Any) -> Tensor:
            if references:
                seen.append((args[0], references["ref_emb"]))
            return super().forward(*args, **references)

    memory = CrossBatchMemory(Watching(), size=8)
    leaves = [embeddings.requires_grad_() for embeddings, _, _ in batches([4, 4, 4])]
    for leaf, (_, labels, _) in zip(leaves, batches([4, 4, 4]), strict=True):
        del seen[:-2]
        memory(leaf, labels).backward()
        if memory.memory_loss is not None:
            rows, references = seen[-1]
            assert not references.requires_grad
            assert not (rows[:, None] == references).all(-1).any()
    first = leaves[0].grad
    assert first is not None
    alone = value_and_gradient(PairShares(), leaves[0].detach(), batches([4])[0][1])[1]
    assert torch.equal(first, alone)  # the later batches, which met it in the memory, added nothing


def test_a_backward_pass_that_comes_late_is_still_right() -> None:
    """The memory has moved on, over its end, before the gradient is asked for."""
    given = batches([4, 4, 4])
    prompt, late = (CrossBatchMemory(losses.ContrastiveLoss(), size=5) for _ in range(2))
    expected = [value_and_gradient(prompt, embeddings, labels)[1] for embeddings, labels, _ in given]
    leaves = [embeddings.clone().requires_grad_() for embeddings, _, _ in given]
    sum(late(leaf, labels) for leaf, (_, labels, _) in zip(leaves, given, strict=True)).backward()  # type: ignore[union-attr]
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_the_callers_tuples_are_for_the_batch_alone() -> None:
    (first, labels, _), (second, others, _) = batches([6, 6])
    tuples = miners.BatchHardMiner()(second, others)
    memory = CrossBatchMemory(losses.TripletMarginLoss(), size=6)
    memory(first.clone(), labels)
    total = memory(second, others, tuples)
    loss = losses.TripletMarginLoss()
    torch.testing.assert_close(total, loss(second, others, tuples) + loss(second, others, None, first, labels))
    torch.testing.assert_close(memory.batch_loss, loss(second, others, tuples))
    torch.testing.assert_close(memory.memory_loss, loss(second, others, None, first, labels))


def run(memory: CrossBatchMemory, given: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    figures = []
    for embeddings, labels, positions in given:
        value, gradient = value_and_gradient(memory, embeddings, labels, None, positions)
        measured = [torch.zeros(()) if it is None else it for it in (memory.drift, memory.age)]
        figures += [value, gradient, *measured]
    return figures


@pytest.mark.parametrize("cut", [0, 1, 2, 5])
@pytest.mark.parametrize("used", [False, True])
def test_a_restored_memory_goes_on_to_the_bit(cut: int, used: bool) -> None:
    given = batches([5] * 8)
    whole = CrossBatchMemory(losses.MultiSimilarityLoss(), size=12, warmup=2)
    expected = run(whole, given)[4 * cut :]
    first, second = (CrossBatchMemory(losses.MultiSimilarityLoss(), size=12, warmup=2) for _ in range(2))
    run(first, given[:cut])
    if used:  # what a memory held before, of another width, is gone
        run(second, batches([4] * 5, dim=3, seed=9))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for ours, wanted in zip(run(second, given[cut:]), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)  # no image met again: NaN


def test_the_state_is_of_tensors_alone_and_keeps_its_type() -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=6)
    run(memory, batches([4]))
    state = memory.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    other = CrossBatchMemory(losses.ContrastiveLoss(), size=6)
    other.load_state_dict(state)
    assert other.embeddings.dtype == torch.float64
    assert other.embeddings.data_ptr() != memory.embeddings.data_ptr()


def test_a_checkpoint_of_another_size_is_refused() -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=6)
    with pytest.raises(CheckpointError, match="has 8 rows, this one 6: resume with the same size"):
        memory.load_state_dict(CrossBatchMemory(losses.ContrastiveLoss(), size=8).state_dict())


def test_the_warmup_only_fills() -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=30, warmup=3)
    for number, (embeddings, labels, _) in enumerate(batches([5] * 5)):
        value = memory(embeddings, labels)
        assert (memory.memory_loss is None) == (number < 3)
        if number < 3:
            assert value == losses.ContrastiveLoss()(embeddings, labels)
    assert memory.count == 25


def test_only_training_with_gradients_fills_the_memory() -> None:
    (embeddings, labels, _), (others, classes, _) = batches([5, 6])
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=9)
    memory(embeddings, labels)
    state = copy.deepcopy(memory.state_dict())
    in_training = copy.deepcopy(memory)(others, classes)
    with torch.no_grad():
        assert memory(others, classes) == in_training
    memory.eval()
    assert memory(others, classes) == in_training
    assert all(torch.equal(value, state[name]) for name, value in memory.state_dict().items())


def test_a_batch_larger_than_the_memory_leaves_its_last_rows() -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=4)
    (embeddings, labels, positions) = batches([11])[0]
    memory(embeddings, labels, None, positions)
    assert memory.count == 4
    assert torch.equal(memory.embeddings, embeddings[-4:])
    assert torch.equal(memory.labels, labels[-4:])
    assert torch.equal(memory.positions, positions[-4:])


@pytest.mark.parametrize("size", [6, 17, 40])
def test_drift_and_age_equal_a_plain_loop(size: int) -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=size)
    queue: deque[tuple[int, int, Tensor]] = deque(maxlen=size)  # (position, call, row)
    met = 0
    for call, (embeddings, labels, positions) in enumerate(batches([6, 6, 4, 7, 6, 5, 6])):
        memory(3 * embeddings, labels, None, positions)  # the length does not count
        distances, ages = [], []
        for row, position in zip(embeddings, positions.tolist(), strict=True):
            for held, step, before in reversed(queue):
                if held == position:
                    distances.append((row - before).norm().item())
                    ages.append(call - step)
                    break
        if call == 0:
            assert memory.drift is None
            assert memory.age is None
        elif not ages:
            assert memory.drift is not None
            assert memory.drift.isnan()
        else:
            met += 1
            assert memory.drift is not None
            assert memory.age is not None
            assert math.isclose(memory.drift.item(), sum(distances) / len(distances), rel_tol=1e-5)
            assert math.isclose(memory.age.item(), sum(ages) / len(ages), rel_tol=1e-6)
        queue.extend((position, call, row) for row, position in zip(embeddings, positions.tolist(), strict=True))
    assert met >= 4


def test_a_frozen_network_does_not_drift() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh())
    images = torch.randn(12, 16)
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=20)
    for number in range(5):
        positions = torch.randperm(12)[:6] if number else torch.arange(12)
        memory(network(images[positions]), positions % 4, None, positions)
    assert memory.drift is not None
    assert memory.drift == 0
    with torch.no_grad():
        network[1].weight.mul_(-1)
    memory(network(images), torch.arange(12) % 4, None, torch.arange(12))
    assert memory.drift is not None
    assert memory.drift > 0.5


def test_images_that_are_not_known_do_not_count_as_drift() -> None:
    (first, labels, _), (second, others, _) = batches([4, 4])
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=20)
    memory(first, labels)  # nobody said which
    memory(second, others, None, torch.full((4,), -1))
    assert memory.drift is not None
    assert memory.drift.isnan()
    memory(first, labels)
    assert memory.drift is None


def test_active_share_is_the_larger_of_batch_and_memory() -> None:
    memory = CrossBatchMemory(PairShares(), size=4)
    assert memory.active_share is None
    assert memory.margin == 0.5
    alike, labels = torch.ones(2, 1), torch.tensor([0, 1])
    memory(alike, labels)
    assert memory.active_share == 0.5  # two of the four ordered pairs are of two classes, and too near
    memory(torch.ones(2, 1), torch.tensor([0, 0]))
    assert memory.active_share == 0.5  # none in the batch, half of those with the memory
    memory(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    assert memory.active_share == 1 / 8  # of the batch none, of the memory that with row 1


def test_a_loss_without_share_or_margin_has_none() -> None:
    memory = CrossBatchMemory(losses.MultiSimilarityLoss(), size=4)
    run(memory, batches([4, 4]))
    assert memory.active_share is None
    assert memory.margin is None


@pytest.mark.parametrize(
    ("own", "its_peer"),
    [(TripletLoss(0.3), losses.TripletMarginLoss(margin=0.3)), (ContrastiveLoss(), losses.ContrastiveLoss())],
)
def test_our_losses_equal_their_peers_with_a_memory(own: nn.Module, its_peer: nn.Module) -> None:
    given = batches([9, 9, 9])
    ours, peer = CrossBatchMemory(own, size=12), CrossBatchMemory(its_peer, size=12)
    for embeddings, labels, _ in given:
        value, gradient = value_and_gradient(ours, embeddings, labels)
        expected, slope = value_and_gradient(peer, embeddings, labels)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-10)
    assert ours.active_share is not None
    assert 0 < ours.active_share <= 1
    assert ours.margin == getattr(own, "margin", None)


def test_the_parameters_of_the_loss_are_those_of_the_memory() -> None:
    memory = CrossBatchMemory(losses.MarginLoss(learn_beta=True), size=12)
    assert [name for name, _ in memory.named_parameters()] == ["loss.beta"]
    run(memory, batches([6, 6]))
    assert memory.loss.beta.grad is not None


@pytest.mark.parametrize(
    "loss",
    [
        losses.ProxyAnchorLoss(num_classes=3, embedding_size=6),
        losses.ArcFaceLoss(num_classes=3, embedding_size=6),
        losses.NPairsLoss(),
        losses.ThresholdConsistentMarginLoss(),
    ],
)
def test_losses_that_take_no_references_are_refused_at_the_first_call(loss: nn.Module) -> None:
    memory = CrossBatchMemory(loss, size=12, warmup=1000)
    embeddings, labels, _ = batches([6])[0]
    loss.double()
    with pytest.raises(ConfigError, match="cannot compare a batch with a cross-batch memory") as caught:
        memory(embeddings, labels)
    assert "\n" not in str(caught.value)


def test_the_refusal_names_the_loss_and_says_what_to_do() -> None:
    memory = CrossBatchMemory(losses.ProxyAnchorLoss(num_classes=3, embedding_size=6).double(), size=12)
    embeddings, labels, _ = batches([6])[0]
    with pytest.raises(ConfigError, match=r"^ProxyAnchorLoss cannot compare .* \(ref_emb is not supported.*use a loss"):
        memory(embeddings, labels)


def test_the_first_look_changes_nothing() -> None:
    """The loss is tried on a copy, and what it draws is put back."""

    class Drawing(PairShares):
        calls = 0

        def forward(self, *args: Any, **references: Any) -> Tensor:
            self.calls += 1
            return super().forward(*args, **references) + torch.rand(())

    embeddings, labels, _ = batches([6])[0]
    memory = CrossBatchMemory(Drawing(), size=12)
    torch.manual_seed(1)
    value = memory(embeddings, labels)
    torch.manual_seed(1)
    assert value == Drawing()(embeddings, labels)
    assert memory.loss.calls == 1


def test_losses_of_another_contract_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="it has no arguments ref_emb and ref_labels"):
        CrossBatchMemory(nn.MSELoss(), size=4)
    inner = CrossBatchMemory(losses.ContrastiveLoss(), size=4)
    with pytest.raises(ConfigError, match="CrossBatchMemory cannot compare"):
        CrossBatchMemory(inner, size=4)
    logits = PairShares()
    logits.needs_logits = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="it is of logits"):
        CrossBatchMemory(logits, size=4)
    with pytest.raises(ConfigError, match="a loss that can be called; got 'triplet'"):
        CrossBatchMemory("triplet", size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1 row; got 0"),
        ({"size": 2.5}, "size must be at least 1"),
        ({"size": True}, "size must be at least 1"),
        ({"size": 4, "warmup": -1}, "warmup must be a number of calls"),
        ({"size": 4, "warmup": 0.1}, "warmup must be a number of calls"),
        ({"size": 4, "weight": 0}, "weight must be a finite number above 0"),
        ({"size": 4, "weight": math.nan}, "weight must be a finite number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrossBatchMemory(losses.ContrastiveLoss(), **settings)


def test_bad_batches_are_refused() -> None:
    memory = CrossBatchMemory(losses.ContrastiveLoss(), size=8)
    embeddings, labels, positions = batches([4])[0]
    memory(embeddings, labels)
    with pytest.raises(VectorError, match="as wide as the memory's, 6; got 5"):
        memory(embeddings[:, :5], labels)
    with pytest.raises(VectorError, match=r"labels must be 4 integers, one for each embedding; got .* of \(3,\)"):
        memory(embeddings, labels[:3])
    with pytest.raises(VectorError, match="positions must be 4 integers"):
        memory(embeddings, labels, None, positions.float())
    with pytest.raises(VectorError, match=r"of shape \(B, D\)"):
        memory(embeddings[0], labels)


def test_it_prints_in_one_line() -> None:
    memory = CrossBatchMemory(PairShares(), size=64, warmup=2, weight=0.5)
    assert repr(memory) == "CrossBatchMemory(PairShares(), size=64, warmup=2, weight=0.5)"
