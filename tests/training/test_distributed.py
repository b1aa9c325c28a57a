"""Several processes against one: two real ones over gloo, started once, report what they found; and one alone.

Run as a program, `test_distributed.py FOLDER`, this file is both of them: it imports once and forks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from vitembed.errors import TrainingError, VectorError
from vitembed.training import distributed
from vitembed.training.caching import cached_backward
from vitembed.training.losses.memory import CrossBatchMemory
from vitembed.training.losses.metric import TripletLoss

SHARES = (5, 8)  # images of each process: ragged
LABELS = torch.arange(sum(SHARES)) // 3
LOSSES = ["TripletLoss", "MultiSimilarityLoss with a miner", "ProxyAnchorLoss", "CrossBatchMemory"]
CHUNKS = [0, 3]  # images a chunk of gradient caching; 0 for none


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).double()


def pixels(step: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(step)
    return torch.randn(len(LABELS), 1, 3, 4, generator=random, dtype=torch.float64)


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    built: dict[str, tuple[nn.Module, Any]] = {
        "TripletLoss": (TripletLoss(0.3), None),
        "MultiSimilarityLoss with a miner": (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(epsilon=0.3)),
        "ProxyAnchorLoss": (losses.ProxyAnchorLoss(num_classes=5, embedding_size=6), None),
        "CrossBatchMemory": (CrossBatchMemory(losses.ContrastiveLoss(), size=20), None),
    }
    loss, miner = built[name]
    return loss.double(), miner


def flat(module: nn.Module) -> Tensor:
    """Return all gradients of a module in a row."""
    parts = [parameter.grad.reshape(-1) for parameter in module.parameters() if parameter.grad is not None]
    return torch.cat([*parts, torch.zeros(0)])


def train(name: str, chunk: int, share: slice, gather: bool) -> tuple[nn.Module, nn.Module]:
    """Take two steps on a share of each batch, or on the whole of it."""
    net, (loss, miner) = network(), build(name)
    for step in range(2):
        net.zero_grad()
        loss.zero_grad()
        images, labels = pixels(step)[share], LABELS[share]
        classes = distributed.gather_labels(labels) if gather else labels

        def loss_of(rows: Tensor, classes: Tensor = classes) -> Tensor:
            rows = distributed.gather_rows(rows) if gather else rows
            return loss(rows, classes, miner(rows, classes) if miner else None)  # type: ignore[no-any-return]

        if chunk:
            cached_backward(net, images.split(chunk), loss_of, network=net)
        else:
            loss_of(net(images)).backward()
        if gather:
            distributed.sum_gradients(net.parameters(), bucket_bytes=200)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.01 * parameter.grad  # type: ignore[operator]
    return net, loss


# What each of the two processes finds: name to a figure or text that can be written as JSON.


def equality(own: slice) -> Iterator[tuple[str, float]]:
    for name in LOSSES:
        one_net, one_loss = train(name, 0, slice(None), gather=False)
        for chunk in CHUNKS:
            net, loss = train(name, chunk, own, gather=True)
            yield f"network {name} {chunk}", float((flat(net) - flat(one_net)).norm() / flat(one_net).norm())
            weights, others = (nn.utils.parameters_to_vector(it.parameters()).detach() for it in (net, one_net))
            yield f"weights {name} {chunk}", float((weights - others).norm())
            yield f"loss {name} {chunk}", float((flat(loss) - flat(one_loss)).norm())
            if isinstance(loss, CrossBatchMemory) and isinstance(one_loss, CrossBatchMemory):
                yield f"memory {chunk}", float((loss.embeddings - one_loss.embeddings).norm())


def order(rank: int) -> dict[str, Any]:
    rows = (100.0 * rank + torch.arange(SHARES[rank])).reshape(-1, 1).requires_grad_()
    gathered = distributed.gather_rows(rows)
    (gathered * torch.arange(1, len(gathered) + 1).reshape(-1, 1)).sum().backward()
    assert rows.grad is not None
    labels = torch.arange(rank * 3)  # none in process 0
    narrow = torch.ones(2, 3, dtype=torch.bfloat16) * (rank + 1)
    return {
        "rows": gathered.flatten().tolist(),
        "rows' gradient": rows.grad.flatten().tolist(),
        "known sizes": distributed.gather_rows(rows.detach(), SHARES).flatten().tolist(),
        "labels": distributed.gather_labels(labels).tolist(),
        "no rows": list(distributed.gather_rows(torch.zeros(rank, 4, 2)).shape),
        "bfloat16": [str(distributed.gather_rows(narrow).dtype), distributed.gather_rows(narrow)[:, 0].tolist()],
    }


def sums(rank: int) -> list[list[float] | None]:
    """Parameter 0 has gradients everywhere, 1 in process 1 alone, 2 nowhere, 3 is frozen, 4 is of another type."""
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)] + [nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    parameters[3].requires_grad_(False)
    parameters[0].grad = torch.arange(3.0) + 10 * rank
    if rank == 1:
        parameters[1].grad = torch.full((3,), 7.0)
    parameters[4].grad = torch.full((2,), 1.0 + rank, dtype=torch.float64)
    distributed.sum_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def told(error: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    return "nothing"


def agreement(rank: int) -> dict[str, Any]:
    net = nn.Sequential(network(), nn.BatchNorm1d(6))
    found: dict[str, Any] = {"same": told(TrainingError, lambda: distributed.check_same_weights(net))}
    with torch.no_grad():
        net[0][3].bias[2] += rank * 1e-12  # type: ignore[index]
    found["weights"] = told(TrainingError, lambda: distributed.check_same_weights(net, "weights of the model"))
    distributed.broadcast_state(net)
    found["mended"] = told(TrainingError, lambda: distributed.check_same_weights(net))
    facts = {"number of images": 10 + rank, "labels": distributed.digest(LABELS)}
    found["images"] = told(TrainingError, lambda: distributed.check_alike(facts))
    found["missing"] = told(TrainingError, lambda: distributed.check_alike({"a": 1} if rank else {"a": 1, "b": 2}))
    found["width"] = told(VectorError, lambda: distributed.gather_rows(torch.zeros(2, 3 + rank)))
    found["type"] = told(VectorError, lambda: distributed.gather_rows(torch.zeros(2, 3).to(_types[rank])))
    distributed.barrier()
    found["any"] = [distributed.any_process(rank == 1), distributed.any_process(False)]
    found["from main"] = distributed.from_main({"stop": rank, "why": "x" * (5 + 50 * rank)})
    found["who"] = [distributed.rank(), distributed.world_size(), distributed.on_main()]
    return found


_types = (torch.float32, torch.float64)


def process(rank: int, folder: Path) -> None:
    """Be one of the processes, and write what it finds."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    own = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)
    found = {"equality": dict(equality(own)), "order": order(rank), "sums": sums(rank), **agreement(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Sequence[dict[str, Any]]:
    """Run two processes; what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_gradient_of_one(reports: Sequence[dict[str, Any]], name: str, chunk: int) -> None:
    for report in reports:
        assert report["equality"][f"network {name} {chunk}"] < 1e-12
        assert report["equality"][f"weights {name} {chunk}"] < 1e-12
        assert report["equality"][f"loss {name} {chunk}"] < 1e-12  # whole in each process, not summed


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_process_remembers_the_whole_batch(reports: Sequence[dict[str, Any]], chunk: int) -> None:
    assert all(report["equality"][f"memory {chunk}"] < 1e-12 for report in reports)


def test_rows_come_in_rank_order_and_gradient_flows_to_the_own(reports: Sequence[dict[str, Any]]) -> None:
    expected = [*range(5), *range(100, 108)]
    for rank, report in enumerate(reports):
        found = report["order"]
        assert found["rows"] == expected
        assert found["known sizes"] == expected
        assert found["rows' gradient"] == [list(range(1, 6)), list(range(6, 14))][rank]
        assert found["labels"] == [0, 1, 2]
        assert found["no rows"] == [1, 4, 2]
        assert found["bfloat16"] == ["torch.bfloat16", [1, 1, 2, 2]]


def test_missing_gradients_count_as_zeros_and_absent_ones_stay_absent(reports: Sequence[dict[str, Any]]) -> None:
    expected = [[10, 12, 14], [7, 7, 7], None, None, [3, 3]]
    assert [report["sums"] for report in reports] == [expected, expected]


def test_other_weights_are_told_by_name_in_every_process(reports: Sequence[dict[str, Any]]) -> None:
    for report in reports:
        assert report["same"] == "nothing"
        assert report["weights"].startswith("process 1 differs from process 0 in weights of the model 0.3.bias: ")
        assert report["mended"] == "nothing"


def test_other_data_are_told_by_name_in_every_process(reports: Sequence[dict[str, Any]]) -> None:
    for report in reports:
        assert "process 1 differs from process 0 in number of images: 11 instead of 10; start" in report["images"]
        assert "process 1 differs from process 0 in b: nothing instead of 2" in report["missing"]
        assert report["width"].startswith("rows of all processes must have one width and type; got widths [3, 4]")
        assert "[4, 8] bytes" in report["type"]


def test_one_process_tells_all(reports: Sequence[dict[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        assert report["any"] == [True, False]
        assert report["from main"] == {"stop": 0, "why": "xxxxx"}
        assert report["who"] == [rank, 2, rank == 0]


@pytest.fixture(params=["not initialised", "a group of one"])
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    if request.param == "a group of one":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_process_works_alone() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.on_main()) == (0, 1, True)
    rows = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather_rows(rows) is rows
    assert distributed.gather_labels(torch.arange(3)).tolist() == [0, 1, 2]
    net = network()
    net(pixels()).sum().backward()
    before, weights = flat(net), nn.utils.parameters_to_vector(net.parameters())
    distributed.sum_gradients(net.parameters())
    distributed.broadcast_state(net)
    distributed.check_same_weights(net)
    distributed.check_alike({"images": 1})
    distributed.barrier()
    assert torch.equal(flat(net), before)
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), weights)
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
    assert distributed.from_main("value") == "value"


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.long), torch.tensor([True])])
def test_labels_must_be_integers(labels: Tensor) -> None:
    with pytest.raises(VectorError, match="labels must be integers of shape"):
        distributed.gather_labels(labels)


def test_a_digest_stands_for_type_shape_and_bytes() -> None:
    tensor = torch.arange(6.0)
    others = [tensor.reshape(2, 3), tensor.long(), tensor.bfloat16(), tensor + 1e-6, torch.tensor(0.0), tensor[:0]]
    assert distributed.digest(tensor) == distributed.digest(torch.arange(12.0)[::2] / 2)
    assert len({distributed.digest(value) for value in [tensor, *others]}) == 7
    assert len(distributed.digest(tensor)) == 16


if __name__ == "__main__":
    import torch.fx.experimental.symbolic_shapes  # torch would do it in both processes at the first backward pass

    child = os.fork()
    process(0 if child else 1, Path(sys.argv[1]))
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
