"""The losses against pytorch-metric-learning, plain loops, and what must not change them; losses and miners by name."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitembed.errors import ConfigError, MissingExtraError, VectorError
from vitembed.training.losses import metric as losses_module
from vitembed.training.losses import rows, specs, triplet
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss, build_loss, build_miner
from vitembed.training.losses.mining import OWN_MINERS, DistanceWeightedMiner
from vitembed.training.losses.peers import ACCEPTED, Accepted, check_argument, peer_classes
from vitembed.training.losses.triplet import exact_triplets

MININGS = ["all", "hard", "semihard"]

OTHERS = [TripletLoss(mining="batch-hard"), TripletLoss(mining="easy-positive", soft=True), TripletLoss(soft=True)]

# Class sizes: as training draws them; ragged with singletons; few large ones; two.
LABELS = {
    "4 each": [i // 4 for i in range(64)],
    "ragged": [0] * 9 + [7] * 2 + [5] + [-3] * 17 + [2] * 2 + [8] + [9] * 5 + [11] + [12] * 2,
    "large": [i % 3 for i in range(90)],
    "two": [int(i > 30) for i in range(60)],
    "one negative": [1] * 12 + [2],
}


def batch(name: str, *, dim: int = 16, pull: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float64 embeddings of many lengths, shuffled, drawn to their class's centre by `pull`, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.tensor(LABELS[name])[torch.randperm(len(LABELS[name]), generator=random)]
    centres = torch.randn(50, dim, generator=random, dtype=torch.float64)
    embeddings = torch.randn(len(labels), dim, generator=random, dtype=torch.float64) + pull * centres[labels]
    return embeddings * torch.rand(len(labels), 1, generator=random, dtype=torch.float64).add(0.1), labels


def value_and_gradient(loss: nn.Module, embeddings: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *args)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def peer_triplets(embeddings: Tensor, labels: Tensor, margin: float, mining: str) -> tuple[Tensor, Tensor]:
    tuples = miners.TripletMarginMiner(margin=margin, type_of_triplets=mining)(embeddings, labels)
    return value_and_gradient(losses.TripletMarginLoss(margin=margin), embeddings, labels, tuples)


def close(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Both values and both gradients agree, relative to their size."""
    assert math.isclose(ours[0].item(), peer[0].item(), rel_tol=tolerance, abs_tol=1e-12)
    assert (ours[1] - peer[1]).norm() <= tolerance * peer[1].norm() + 1e-12


@pytest.fixture(params=["comparison", "search"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with each way to count, whatever the class sizes."""
    monkeypatch.setattr(triplet, "SEARCH_FROM", 2 if request.param == "search" else 10**9)
    return str(request.param)


@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.usefixtures("kernel")
def test_triplet_loss_equals_the_peer_in_value_and_gradient(name: str, mining: str, margin: float, pull: float) -> None:
    embeddings, labels = batch(name, pull=pull)
    ours = value_and_gradient(TripletLoss(margin, mining), embeddings, labels)  # type: ignore[arg-type]
    close(ours, peer_triplets(embeddings, labels, margin, mining), 1e-9)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize(
    ("size", "dim", "pull", "tolerance"),
    # Of a million triplets rounding decides one or two that are on the border of being active, the peer's as well.
    [(300, 64, 0.0, 1e-5), (300, 64, 1.0, 1e-5), (700, 384, 0.0, 2e-4), (700, 384, 0.7, 2e-4)],
)
def test_float32_is_near_to_the_peer_in_float64(
    mining: str, size: int, dim: int, pull: float, tolerance: float
) -> None:
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(size) // 4
    embeddings = torch.randn(size, dim, generator=random) + pull * torch.randn(size, dim, generator=random)[labels]
    ours = value_and_gradient(TripletLoss(0.2, mining), embeddings, labels)  # type: ignore[arg-type]
    peer = peer_triplets(embeddings.double(), labels, 0.2, mining)
    assert math.isclose(ours[0].item(), peer[0].item(), rel_tol=1e-5)
    assert (ours[1] - peer[1]).norm() <= tolerance * peer[1].norm()


@pytest.mark.parametrize("mining", MININGS)
def test_triplet_loss_equals_a_plain_loop(mining: str) -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    rows = nn.functional.normalize(embeddings)
    terms, valid = [], 0
    for a, p, n in torch.cartesian_prod(*[torch.arange(len(labels))] * 3).tolist():
        if a == p or labels[a] != labels[p] or labels[a] == labels[n]:
            continue
        valid += 1
        near, far = (rows[a] - rows[p]).norm().item(), (rows[a] - rows[n]).norm().item()
        wanted = {"all": True, "hard": far <= near, "semihard": far > near}[mining]
        if wanted and near + 0.2 - far > 0:
            terms.append(near + 0.2 - far)
    loss = TripletLoss(0.2, mining)  # type: ignore[arg-type]
    assert math.isclose(loss(embeddings, labels).item(), sum(terms) / len(terms), rel_tol=1e-9)
    assert math.isclose(loss.active_share.item(), len(terms) / valid, rel_tol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("name", ["ragged", "large", "two"])
@pytest.mark.usefixtures("kernel")
def test_the_size_of_the_blocks_changes_nothing(name: str, mining: triplet.Mining, block: int) -> None:
    embeddings, labels = batch(name, pull=0.5)
    embeddings, labels = embeddings[:40], labels[:40]

    def run(block: int | None) -> tuple[Tensor, Tensor]:
        rows = nn.functional.normalize(embeddings).requires_grad_()
        value, share = exact_triplets(rows, labels, margin=0.3, mining=mining, block=block)
        value.backward()
        assert rows.grad is not None
        return torch.stack([value.detach(), share]), rows.grad

    for whole, cut in zip(run(None), run(block), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["4 each", "ragged", "two"])
@pytest.mark.parametrize(
    "loss",
    [*(TripletLoss(0.2, mining) for mining in MININGS), ContrastiveLoss(0.3, 1.0, squared=True), *OTHERS],
    ids=str,
)
def test_the_gradient_is_the_derivative_of_the_value(loss: nn.Module, name: str) -> None:
    embeddings, labels = batch(name, dim=3, pull=0.5)
    embeddings, labels = embeddings[:20].requires_grad_(), labels[:20]
    assert torch.autograd.gradcheck(lambda e: loss(e, labels), embeddings, eps=1e-8, atol=1e-5)


@pytest.mark.parametrize("loss", [TripletLoss(), TripletLoss(mining="semihard"), ContrastiveLoss(), *OTHERS], ids=str)
def test_the_order_of_a_batch_changes_nothing(loss: nn.Module) -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    value, gradient = value_and_gradient(loss, embeddings, labels)
    shuffled = value_and_gradient(loss, embeddings[order], labels[order])
    close(shuffled, (value, gradient[order]), 1e-12)


@pytest.mark.parametrize("loss", [TripletLoss(), ContrastiveLoss()], ids=str)
def test_the_lengths_of_embeddings_and_the_numbers_of_classes_change_nothing(loss: nn.Module) -> None:
    embeddings, labels = batch("4 each", pull=0.5)
    value = loss(embeddings, labels)
    torch.testing.assert_close(loss(embeddings * torch.rand(len(labels), 1).add(1), labels * -1_000_003), value)
    torch.testing.assert_close(loss(embeddings, labels.to(torch.int16)), value)


@pytest.mark.parametrize("labels", [[], [3], [5] * 6, list(range(6)), [1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("mining", MININGS)
def test_no_active_triplet_gives_zero_with_a_gradient_of_zeros(labels: list[int], mining: str) -> None:
    # The last batch has triplets, none of them active: each class is one point, opposite to the other.
    embeddings = torch.randn(len(labels), 4) if labels != [1, 1, 2, 2] else torch.eye(2)[[0, 0, 1, 1]]
    loss = TripletLoss(mining=mining)  # type: ignore[arg-type]
    value, gradient = value_and_gradient(loss, embeddings, torch.tensor(labels, dtype=torch.int64))
    assert value.item() == 0
    assert loss.active_share.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("kernel")
def test_duplicate_images_agree_with_the_peer_and_have_finite_gradients(mining: str, dtype: torch.dtype) -> None:
    # Up to 25 rows the peer's distances are those of differences: 0 for duplicates, as they should be.
    embeddings, labels = batch("4 each")
    labels, order = labels.sort()
    embeddings, labels = embeddings[order][:24].to(dtype), labels[:24]
    embeddings[1] = embeddings[0].clone()  # a positive
    embeddings[5] = embeddings[0].clone()  # the same image with another label: as near as the positive, so "hard"
    embeddings[9] = embeddings[8].clone()
    embeddings[13] = embeddings[22].clone()
    ours = value_and_gradient(TripletLoss(0.2, mining), embeddings, labels)  # type: ignore[arg-type]
    assert ours[1].isfinite().all()
    close(ours, peer_triplets(embeddings, labels, 0.2, mining), 1e-3 if dtype == torch.float32 else 1e-6)


def test_a_network_that_has_collapsed_gives_finite_gradients_and_the_margin_as_loss() -> None:
    embeddings = torch.ones(64, 32) + 1e-6 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) // 4
    value, gradient = value_and_gradient(TripletLoss(0.2), embeddings, labels)
    assert math.isclose(value.item(), 0.2, rel_tol=1e-2)
    # The rows are a few of their rounding errors apart, which leaves 2 % of the gradient uncertain.
    exact = value_and_gradient(TripletLoss(0.2), embeddings.double(), labels)[1]
    assert (gradient - exact).norm() <= 0.05 * exact.norm()


NEARLY_COLLAPSED = [
    *(TripletLoss(0.2, mining) for mining in get_args(losses_module.Mining)),
    *(TripletLoss(mining=mining, soft=True) for mining in ("all", "batch-hard", "easy-positive")),
    ContrastiveLoss(),
    ContrastiveLoss(squared=True),
]


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("loss", NEARLY_COLLAPSED, ids=str)
def test_float32_near_a_collapse_has_the_gradient_of_float64(loss: nn.Module, size: int, spread: float) -> None:
    random = torch.Generator().manual_seed(0)
    base, noise = torch.randn(1, 64, generator=random), torch.randn(size, 64, generator=random)
    embeddings, labels = (
        nn.functional.normalize(nn.functional.normalize(base) + spread * noise),
        torch.arange(size) // 4,
    )
    torch.manual_seed(0)
    ours = value_and_gradient(loss, embeddings, labels)
    torch.manual_seed(0)
    exact = value_and_gradient(loss, embeddings.double(), labels)
    assert math.isclose(ours[0].item(), exact[0].item(), rel_tol=1e-2)
    assert exact[1].norm() > 0.01
    assert (ours[1] - exact[1]).norm() <= max(1e-2, 1e-6 / spread) * exact[1].norm()


@pytest.mark.parametrize("length", [1e-44, 1e-30, 1e-13, 1e19, 1e38])
@pytest.mark.parametrize("loss", [TripletLoss(0.2), TripletLoss(mining="batch-hard"), ContrastiveLoss()], ids=str)
def test_rows_of_any_length_are_brought_to_unit_length(loss: nn.Module, length: float) -> None:
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    labels = torch.arange(8) // 2
    value, gradient = value_and_gradient(loss, embeddings * length, labels)
    expected = value_and_gradient(loss, embeddings, labels)
    assert math.isclose(value.item(), expected[0].item(), rel_tol=1e-5 if length > 1e-40 else 0.2)
    if 1e-35 < length < 1e35:
        torch.testing.assert_close(gradient * length, expected[1], rtol=1e-3, atol=1e-6)


def test_rows_of_no_numbers_and_of_zeros_stay() -> None:
    labels = torch.arange(4) // 2
    assert rows.unit_rows(torch.empty(4, 0), labels).shape == (4, 0)
    assert not rows.unit_rows(torch.zeros(4, 3), labels).any()
    for broken in (torch.inf, -torch.inf, torch.nan):
        embeddings = torch.ones(4, 3)
        embeddings[1, 2] = broken
        assert rows.unit_rows(embeddings, labels).isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "loss",
    [TripletLoss(), TripletLoss(mining="hard"), TripletLoss(mining="distance-weighted"), ContrastiveLoss(), *OTHERS],
    ids=str,
)
def test_nan_in_an_embedding_is_nan_in_the_loss(loss: nn.Module) -> None:
    embeddings, labels = batch("4 each")
    broken = embeddings.clone()
    broken[3, 2] = torch.nan
    assert loss(broken, labels).isnan()
    assert loss(embeddings, labels, None, broken, labels).isnan()


@pytest.mark.parametrize("loss", [TripletLoss(mining="semihard"), ContrastiveLoss(), *OTHERS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: nn.Module, dtype: torch.dtype) -> None:
    embeddings, labels = batch("4 each", pull=0.5)
    half = embeddings.to(dtype)
    leaf = half.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(leaf, labels)
    value.backward()
    expected, reference = value_and_gradient(loss, half.float(), labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, reference.to(dtype))


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # torch says so on Python 3.13.0 alone
def test_a_compiled_loss_is_the_same_loss() -> None:
    embeddings, labels = batch("4 each", pull=0.5)
    loss = TripletLoss()
    compiled = torch.compile(lambda e, y: loss(e, y), backend="eager")
    assert torch.equal(compiled(embeddings, labels), loss(embeddings, labels))


def test_without_gradients_the_value_is_the_same() -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    value, _ = value_and_gradient(TripletLoss(), embeddings, labels)
    with torch.no_grad():
        assert torch.equal(TripletLoss()(embeddings, labels), value)


def test_a_second_derivative_is_refused() -> None:
    embeddings, labels = batch("4 each")
    loss = TripletLoss()(embeddings.requires_grad_(), labels)
    with pytest.raises(ConfigError, match="no second derivative"):
        torch.autograd.grad(loss, embeddings, create_graph=True)
    few = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    for other in (TripletLoss(soft=True)(embeddings, labels), TripletLoss(9.0)(embeddings, labels, few)):
        with pytest.raises(ConfigError, match="no second derivative"):
            torch.autograd.grad(other, embeddings, create_graph=True)


@pytest.mark.parametrize(
    "miner",
    [
        miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard"),
        miners.BatchHardMiner(distance=LpDistance()),
        miners.MultiSimilarityMiner(),
    ],
    ids=lambda miner: type(miner).__name__,
)
@pytest.mark.parametrize(
    ("ours", "peer"),
    [(TripletLoss(0.3), losses.TripletMarginLoss(margin=0.3)), (ContrastiveLoss(0.1), losses.ContrastiveLoss(0.1))],
    ids=["triplet", "contrastive"],
)
def test_a_miners_choice_is_computed_as_the_peer_does(ours: nn.Module, peer: nn.Module, miner: nn.Module) -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    tuples = miner(embeddings, labels)
    close(
        value_and_gradient(ours, embeddings, labels, tuples), value_and_gradient(peer, embeddings, labels, tuples), 1e-9
    )


def test_no_tuples_give_zero_with_a_gradient_of_zeros() -> None:
    embeddings, labels = batch("4 each")
    none = torch.empty(0, dtype=torch.int64)
    for loss in (TripletLoss(), ContrastiveLoss()):
        value, gradient = value_and_gradient(loss, embeddings, labels, (none, none, none))
        assert value.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.4, 1.5), (0.0, 0.1)])
@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("name", LABELS)
def test_contrastive_loss_equals_the_peer(name: str, margins: tuple[float, float], pull: float) -> None:
    embeddings, labels = batch(name, pull=pull)
    if len(labels) <= 25:  # beyond, the peer's cdist takes rounding for a distance, with a gradient of length one
        embeddings[1] = embeddings[0].clone()
    peer = losses.ContrastiveLoss(*margins)
    ours = value_and_gradient(ContrastiveLoss(*margins), embeddings, labels)
    close(ours, value_and_gradient(peer, embeddings, labels), 1e-7)


@pytest.mark.parametrize("squared", [False, True])
def test_contrastive_loss_equals_a_plain_loop(squared: bool) -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    rows = nn.functional.normalize(embeddings)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for i in range(len(labels)):
        for j in range(len(labels)):
            same, distance = bool(labels[i] == labels[j]), (rows[i] - rows[j]).norm().item()
            if i != j:
                sides[same].append(max(0.0, distance - 0.2 if same else 1.1 - distance))
    expected = 0.0
    for terms in sides.values():
        active = [t**2 / 2 if squared else t for t in terms if t > 0]
        expected += sum(active) / len(active)
    loss = ContrastiveLoss(0.2, 1.1, squared=squared)
    assert math.isclose(loss(embeddings, labels).item(), expected, rel_tol=1e-9)
    every = sides[True] + sides[False]
    assert math.isclose(loss.active_share.item(), sum(t > 0 for t in every) / len(every), rel_tol=1e-6)


MINED = {
    "batch-hard": miners.BatchHardMiner(distance=LpDistance()),
    "easy-positive": miners.BatchEasyHardMiner("easy", "semihard", distance=LpDistance()),
}


def smooth() -> nn.Module:
    """Return the peer's loss with a soft margin, over all triplets."""
    return losses.TripletMarginLoss(margin=0, smooth_loss=True, reducer=MeanReducer())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mining", MINED)
@pytest.mark.parametrize("name", LABELS)
def test_a_mined_triplet_loss_equals_the_peer_with_its_miner(name: str, mining: triplet.Mining, *, soft: bool) -> None:
    embeddings, labels = batch(name, pull=0.5)
    loss = TripletLoss(mining=mining, soft=soft)
    peer = smooth() if soft else losses.TripletMarginLoss(margin=0.2)
    tuples = MINED[mining](embeddings, labels)
    expected = value_and_gradient(peer, embeddings, labels, tuples)
    close(value_and_gradient(loss, embeddings, labels), expected, 1e-9)
    rows = nn.functional.normalize(embeddings)
    a, p, n = tuples[0], tuples[1], tuples[-1]
    active = (rows[a] - rows[p]).norm(dim=1) + 0.2 > (rows[a] - rows[n]).norm(dim=1)
    assert math.isclose(loss.active_share.item(), 1 if soft else active.double().mean(), rel_tol=1e-6)


def test_distance_weighted_mining_is_the_loss_of_what_the_miner_draws() -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    torch.manual_seed(0)
    ours = value_and_gradient(TripletLoss(mining="distance-weighted"), embeddings, labels)
    torch.manual_seed(0)
    tuples = DistanceWeightedMiner()(embeddings, labels)
    close(ours, value_and_gradient(losses.TripletMarginLoss(margin=0.2), embeddings, labels, tuples), 1e-9)


@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("name", [*LABELS, "40 each"])
@pytest.mark.parametrize("chunk", [1, 2**19])
def test_the_soft_margin_over_all_triplets_equals_the_peer(
    name: str, pull: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LABELS, "40 each", [i // 40 for i in range(80)])  # more positives than a product has factors
    monkeypatch.setitem(rows.CHUNK, "cpu", chunk)
    embeddings, labels = batch(name, pull=pull)
    ours = value_and_gradient(TripletLoss(soft=True), embeddings, labels)
    close(ours, value_and_gradient(smooth(), embeddings, labels), 1e-9)


def test_the_soft_margin_equals_a_plain_loop() -> None:
    embeddings, labels = batch("ragged", pull=0.5)
    x = nn.functional.normalize(embeddings)
    terms = [
        math.log1p(math.exp((x[a] - x[p]).norm().item() - (x[a] - x[n]).norm().item()))
        for a, p, n in torch.cartesian_prod(*[torch.arange(len(labels))] * 3).tolist()
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    loss = TripletLoss(soft=True)
    assert math.isclose(loss(embeddings, labels).item(), sum(terms) / len(terms), rel_tol=1e-9)
    assert loss.active_share == 1


def test_the_soft_margin_of_millions_of_triplets_is_summed_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.CHUNK, "cpu", 1)  # as many partial sums as there are images
    embeddings, labels = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)), torch.arange(1024) // 64
    value = TripletLoss(soft=True)(embeddings, labels)
    assert math.isclose(
        value.item(), TripletLoss(soft=True)(embeddings.double(), labels).item(), rel_tol=8e-8
    )  # one rounding, in the end


@pytest.mark.parametrize("pull", [0.0, 0.7, 30.0])
def test_the_soft_margin_in_float32_is_near_to_float64(pull: float) -> None:
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(200) // 4
    embeddings = torch.randn(200, 64, generator=random) + pull * torch.randn(50, 64, generator=random)[labels]
    ours = value_and_gradient(TripletLoss(soft=True), embeddings, labels)
    close(ours, value_and_gradient(TripletLoss(soft=True), embeddings.double(), labels), 1e-5)


# Each of our losses, beside what the peer has for it where there are references.
COMPARED: list[tuple[nn.Module, nn.Module, nn.Module | None]] = [
    *(
        (TripletLoss(0.3, mining), losses.TripletMarginLoss(margin=0.3), miners.TripletMarginMiner(0.3, mining))
        for mining in MININGS
    ),
    *((TripletLoss(0.3, mining), losses.TripletMarginLoss(margin=0.3), miner) for mining, miner in MINED.items()),
    (TripletLoss(soft=True), smooth(), None),
    (TripletLoss(soft=True, mining="batch-hard"), smooth(), MINED["batch-hard"]),
    (ContrastiveLoss(0.1, 1.2), losses.ContrastiveLoss(0.1, 1.2), None),
]
compared = pytest.mark.parametrize(("ours", "peer", "miner"), COMPARED, ids=lambda x: str(x) if x in OURS else "")
OURS = [ours for ours, _, _ in COMPARED]


def both_gradients(
    loss: nn.Module, queries: Tensor, labels: Tensor, tuples: object, refs: Tensor, ref_labels: Tensor, **more: int
) -> tuple[Tensor, Tensor]:
    """Return the value, and the gradients of queries and references in one."""
    leaves = queries.clone().requires_grad_(), refs.clone().requires_grad_()
    value = loss(leaves[0], labels, tuples, leaves[1], ref_labels, **more)
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


@compared
def test_queries_against_references_equal_the_peer(ours: nn.Module, peer: nn.Module, miner: nn.Module | None) -> None:
    queries, labels = batch("4 each", pull=0.5)
    refs, ref_labels = batch("ragged", pull=0.5, seed=1)
    tuples = miner(queries, labels, refs, ref_labels) if miner else None
    expected = both_gradients(peer, queries, labels, tuples, refs, ref_labels)
    assert expected[0] > 0
    close(both_gradients(ours, queries, labels, None, refs, ref_labels), expected, 1e-8)


@compared
def test_a_batch_within_its_references_is_compared_without_itself(
    ours: nn.Module, peer: nn.Module, miner: nn.Module | None
) -> None:
    queries, labels = batch("ragged", pull=0.5)
    before, labels_before = batch("4 each", pull=0.5, seed=1)
    before, labels_before = before[:9], labels_before[:9]
    refs, ref_labels = torch.cat([before, queries]), torch.cat([labels_before, labels])
    # As one batch, in which the anchors before ours are left out.
    chosen = (miner or PAIRS_OR_TRIPLETS[type(peer)])(refs, ref_labels)
    tuples = [index[anchors >= 9] for anchors, index in zip(anchors_of(chosen), chosen, strict=True)]
    tuples = [index - 9 if i % 2 == 0 and (i == 0 or len(tuples) == 4) else index for i, index in enumerate(tuples)]
    expected = both_gradients(peer, queries, labels, tuple(tuples), refs, ref_labels)
    close(both_gradients(ours, queries, labels, None, refs, ref_labels, own=9), expected, 1e-8)


PAIRS_OR_TRIPLETS = {
    losses.ContrastiveLoss: lambda _, y: get_all_pairs_indices(y),
    losses.TripletMarginLoss: lambda _, y: get_all_triplets_indices(y),
}


def anchors_of(tuples: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the anchor for each tensor of a miner's tuples."""
    return [tuples[0], tuples[0], tuples[2 if len(tuples) == 4 else 0], tuples[-2 if len(tuples) == 4 else 0]][
        : len(tuples)
    ]


@pytest.mark.parametrize("loss", [*OURS, TripletLoss(mining="distance-weighted")], ids=str)
def test_the_batch_as_its_own_reference_changes_nothing(loss: nn.Module) -> None:
    embeddings, labels = batch("ragged", pull=0.5)

    def run(*references: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf, labels, None, *((leaf, labels) if references else ()))
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    alone = run()
    for ours, other in zip(run(True), alone, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("loss", [*OURS, TripletLoss(mining="distance-weighted")], ids=str)
def test_an_empty_memory_gives_zero_with_a_gradient_of_zeros(loss: nn.Module) -> None:
    queries, labels = batch("4 each")
    value, gradient = both_gradients(loss, queries, labels, None, queries[:0], labels[:0])
    assert value == 0
    assert loss.active_share == 0
    assert not gradient.any()


@pytest.mark.parametrize("gathered", [0, 10**9])
@pytest.mark.parametrize(
    "miner", [miners.TripletMarginMiner(0.3), miners.MultiSimilarityMiner(), *OWN_MINERS.values()], ids=str
)
def test_tuples_are_computed_alike_by_pairs_and_by_the_whole_matrix(
    miner: nn.Module | type[nn.Module], gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "_GATHERED", gathered)
    miner = miner() if isinstance(miner, type) else miner
    queries, labels = batch("4 each", pull=0.5)
    refs, ref_labels = batch("ragged", pull=0.5, seed=1)
    tuples = miner(queries, labels, refs, ref_labels)
    for ours, peer in [
        (TripletLoss(0.3), losses.TripletMarginLoss(margin=0.3)),
        (TripletLoss(soft=True), smooth()),
        (ContrastiveLoss(0.1), losses.ContrastiveLoss(0.1)),
    ]:
        expected = both_gradients(peer, queries, labels, tuples, refs, ref_labels)
        close(both_gradients(ours, queries, labels, tuples, refs, ref_labels), expected, 1e-9)


@pytest.mark.parametrize("chunk", [1, 2**19])
@pytest.mark.parametrize("gathered", [0, 10**9])
def test_given_pairs_that_are_repeated_or_duplicates_count_as_often_and_pull_by_nothing(
    gathered: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "_GATHERED", gathered)
    monkeypatch.setitem(rows.CHUNK, "cpu", chunk)
    embeddings, labels = batch("4 each", pull=0.5)
    embeddings[1] = embeddings[0].clone()
    tuples = tuple(torch.tensor(index) for index in ([5, 0, 5, 0, 2, 5], [6, 1, 6, 1, 1, 7], [9, 9, 9, 8, 8, 9]))
    gradients = value_and_gradient(TripletLoss(2.5), embeddings, labels, tuples)
    close(gradients, value_and_gradient(losses.TripletMarginLoss(margin=2.5), embeddings, labels, tuples), 1e-7)


def test_a_given_pair_of_duplicates_in_a_large_batch_has_a_finite_gradient() -> None:
    embeddings, labels = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) // 4
    embeddings[1] = embeddings[0].clone()
    tuples = torch.tensor([0, 4]), torch.tensor([1, 5]), torch.tensor([8, 9])
    value, gradient = value_and_gradient(TripletLoss(2.5), embeddings, labels, tuples)
    assert value > 0
    assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor) and not func.is_view:
                self.numbers = max(self.numbers, value.numel())
        return made


@pytest.mark.parametrize(
    "loss",
    [
        *(TripletLoss(mining=mining) for mining in OWN_MINERS if "-" in mining),  # type: ignore[arg-type]
        TripletLoss(soft=True),
        TripletLoss(soft=True, mining="batch-hard"),
    ],
    ids=str,
)
@pytest.mark.parametrize("references", [False, True])
def test_memory_is_that_of_a_chunk_and_never_of_all_pairs(
    loss: nn.Module, monkeypatch: pytest.MonkeyPatch, *, references: bool
) -> None:
    monkeypatch.setitem(rows.CHUNK, "cpu", 2**12)
    embeddings, labels = torch.randn(512, 8), torch.arange(512) // 2
    leaf = embeddings.clone().requires_grad_()
    with Largest() as largest:
        loss(leaf, labels, None, *((embeddings, labels) if references else ())).backward()
    assert largest.numbers <= 2**12


def test_the_memory_of_many_given_triplets_is_theirs_and_never_that_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(rows.CHUNK, "cpu", 2**12)
    embeddings, labels = torch.randn(1024, 8), torch.arange(1024) // 64
    pairs = 1024 * 63
    with Largest() as largest:
        TripletLoss(mining="distance-weighted")(embeddings.requires_grad_(), labels).backward()
    assert largest.numbers <= 2 * pairs  # those of the positives and of the negatives; all pairs are 1,048,576


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux has it")
def test_the_memory_of_mining_is_small_for_the_whole_process() -> None:
    # Of 8,000 images all distances are 256 MB. A tensor's size does not tell what the heap can use again.
    code = """
import torch
from pathlib import Path
from vitembed.training.losses.metric import TripletLoss
def peak(): return int(next(x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x))
torch.set_num_threads(1)
embeddings, labels = torch.randn(8000, 16, requires_grad=True), torch.arange(8000) // 4
for mining in ("batch-hard", "easy-positive", "distance-weighted"):
    loss = TripletLoss(mining=mining)
    loss(embeddings[:64], labels[:64]).backward()
    before = peak()
    loss(embeddings, labels).backward()
    print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
    assert max(map(int, run.stdout.split())) < 80_000  # KiB


@pytest.mark.parametrize("loss", OURS, ids=str)
def test_labels_that_are_not_the_batchs_where_it_stands_are_refused(loss: nn.Module) -> None:
    embeddings, labels = batch("4 each")
    with pytest.raises(ConfigError, match="ref_emb is embeddings, but ref_labels differ"):
        loss(embeddings, labels, None, embeddings, labels + 1)
    refs, ref_labels = torch.cat([embeddings[:3], embeddings]), torch.cat([labels[:3], labels])
    assert loss(embeddings, labels, None, refs, ref_labels.int(), own=3).isfinite()
    for own in (0, 2):
        with pytest.raises(ConfigError, match=f"own={own} says that the references hold the batch, but ref_labels"):
            loss(embeddings, labels, None, refs, ref_labels, own=own)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
@pytest.mark.parametrize("loss", OURS, ids=str)
def test_labels_of_any_integer_type_go_with_references_of_another(loss: nn.Module, dtype: torch.dtype) -> None:
    embeddings, labels = batch("4 each", pull=0.5)
    refs, ref_labels = batch("large", pull=0.5, seed=1)
    narrow = labels.to(dtype)
    assert torch.equal(loss(embeddings, narrow), loss(embeddings, labels))
    expected = loss(embeddings, labels, None, refs, ref_labels)
    assert torch.equal(loss(embeddings, narrow, None, refs, ref_labels), expected)
    assert torch.equal(loss(embeddings, labels, None, refs, ref_labels.to(dtype)), expected)


@pytest.mark.parametrize("loss", OURS, ids=str)
def test_a_memory_that_wants_no_gradient_gives_the_queries_theirs(loss: nn.Module) -> None:
    queries, labels = batch("4 each", pull=0.5)
    refs, ref_labels = batch("ragged", pull=0.5, seed=1)
    value, gradient = both_gradients(loss, queries, labels, None, refs, ref_labels)
    close(value_and_gradient(loss, queries, labels, None, refs, ref_labels), (value, gradient[: len(queries)]), 1e-12)


@pytest.mark.parametrize("loss", OURS, ids=str)
def test_references_that_do_not_fit_are_one_clear_error(loss: nn.Module) -> None:
    queries, labels = batch("4 each")
    for references, message in [
        ({"ref_emb": queries}, "ref_emb came without ref_labels"),
        ({"ref_labels": labels}, "ref_labels came without ref_emb"),
        ({"ref_emb": queries[:, :3], "ref_labels": labels}, r"ref_emb must be .* \(M, 16\), as wide .* \(64, 3\)"),
        ({"ref_emb": labels, "ref_labels": labels}, r"ref_emb must be .* got torch.int64 of \(64,\)"),
        ({"ref_emb": queries.clone(), "ref_labels": labels[:5]}, r"ref_labels must have shape \(64,\)"),
        ({"ref_emb": queries, "ref_labels": labels.double()}, "ref_labels must be integers"),
        ({"ref_emb": queries.clone(), "ref_labels": labels, "own": 1}, "own=1 leaves no room for 64 queries among 64"),
        ({"own": 5}, "own=5 is a position among references, and there are none"),
    ]:
        with pytest.raises(VectorError, match=message) as caught:
            loss(queries, labels, **references)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [TripletLoss(), ContrastiveLoss()], ids=str)
@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.randn(4), torch.arange(4), r"embeddings must be floating-point of shape \(B, D\); got .* \(4,\)"),
        (torch.ones(4, 2, dtype=torch.int64), torch.arange(4), "floating-point .* got torch.int64"),
        (torch.randn(4, 2), torch.arange(3), r"labels must have shape \(4,\).* got \(3,\)"),
        (torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.int64), r"got \(4, 1\)"),
        (torch.randn(4, 2), torch.randn(4), "integers .* got torch.float32"),
        (torch.randn(4, 2), torch.ones(4, dtype=torch.bool), "integers .* got torch.bool"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_clear_error(
    loss: nn.Module, embeddings: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(VectorError, match=message):
        loss(embeddings, labels)


@pytest.mark.parametrize("margin", [0, -1.0, math.nan, math.inf, "wide", True])
def test_a_margin_must_be_a_finite_number_above_zero(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin must be"):
        TripletLoss(margin)


def test_settings_that_make_no_sense_are_refused() -> None:
    embeddings, labels = batch("4 each")
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="did you mean 'semihard'"):
        TripletLoss(mining="semi_hard")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="negative_margin must be a finite number"):
        ContrastiveLoss(negative_margin=math.inf)
    with pytest.raises(ConfigError, match="use mining 'all'"):
        TripletLoss(mining="hard")(embeddings, labels, (index, index, index))
    with pytest.raises(VectorError, match="3 or 4 index tensors; got 2"):
        ContrastiveLoss()(embeddings, labels, (index, index))


@pytest.mark.parametrize("loss", [TripletLoss(), TripletLoss(soft=True), ContrastiveLoss()], ids=str)
def test_tuples_that_cannot_be_meant_are_one_clear_error(loss: nn.Module) -> None:
    embeddings, labels = batch("4 each")
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for tuples, message in [
        ((one, two, two), r"one length, \(T,\) each; got \[\(1,\), \(2,\), \(2,\)\]"),
        ((one, two, two, two), r"one length"),
        ((two, two, one, two), r"one length"),
        ((one[None], one[None], one[None]), r"one length"),
        ((one, one - 1, one), "64 references from 0 to 63; got -1"),
        ((one, one, one + 64), "64 references from 0 to 63; got 64"),
        ((one + 64, one, one), "64 queries from 0 to 63; got 64"),
        ((one - 2, one, one - 2, one), "64 queries from 0 to 63; got -2"),
    ]:
        with pytest.raises(VectorError, match=message) as caught:
            loss(embeddings, labels, tuples)
        assert "\n" not in str(caught.value)


def test_pairs_with_one_tensor_of_anchors_are_joined_and_not_taken_for_triplets() -> None:
    embeddings, labels = batch("4 each")
    labels, order = labels.sort()
    embeddings = embeddings[order]
    anchors, positives, negatives = torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([5, 9])
    joined = torch.tensor([0] * 4), torch.tensor([1, 1, 2, 2]), torch.tensor([5, 9, 5, 9])
    loss = TripletLoss(2.5)
    expected = loss(embeddings, labels, joined)
    torch.testing.assert_close(loss(embeddings, labels, (anchors, positives, anchors, negatives)), expected)


def test_losses_by_name() -> None:
    assert str(build_loss("triplet")) == "TripletLoss(margin=0.2, mining='all')"
    assert str(build_loss("triplet(margin=0.1)", mining="hard")) == "TripletLoss(margin=0.1, mining='hard')"
    assert str(build_loss("triplet", soft=True, mining="batch-hard")) == "TripletLoss(mining='batch-hard', soft=True)"
    contrastive = build_loss(" contrastive( squared=True, negative_margin = 0.5) ", num_classes=3, embedding_size=4)
    assert str(contrastive) == "ContrastiveLoss(positive_margin=0.0, negative_margin=0.5, squared=True)"
    similarity = build_loss("MultiSimilarityLoss(alpha=3, base=-0.5)")
    assert isinstance(similarity, losses.MultiSimilarityLoss)
    assert (similarity.alpha, similarity.base) == (3, -0.5)
    assert isinstance(build_loss("TripletMarginLoss(triplets_per_anchor=5)"), losses.TripletMarginLoss)
    proxies = build_loss("SubCenterArcFaceLoss(sub_centers=2)", num_classes=7, embedding_size=16)
    assert isinstance(proxies, losses.SubCenterArcFaceLoss)
    assert proxies.num_classes == 7
    assert isinstance(build_loss("P2SGradLoss", num_classes=7, embedding_size=16), losses.P2SGradLoss)
    given = losses.NTXentLoss()
    assert build_loss(given, num_classes=7) is given


def test_miners_by_name() -> None:
    miner = build_miner("TripletMarginMiner(type_of_triplets='easy')", margin=0.3)
    assert isinstance(miner, miners.TripletMarginMiner)
    assert (miner.margin, miner.type_of_triplets) == (0.3, "easy")
    embeddings, labels = batch("4 each")
    assert len(miner(embeddings, labels)) == 3
    assert build_miner(miner) is miner
    assert str(build_miner("distance-weighted", cutoff=0.4)) == (
        "DistanceWeightedMiner(cutoff=0.4, nonzero_loss_cutoff=1.4)"
    )
    assert str(build_miner("EasyPositiveMiner(negatives='all')")) == "EasyPositiveMiner(negatives='all')"
    assert str(build_miner("batch-hard")) == "BatchHardMiner()"
    assert isinstance(build_miner("BatchHardMiner"), miners.BatchHardMiner)
    ranges = build_miner("BatchEasyHardMiner(pos_strategy='hard', allowed_pos_range=(0.1, 1))")
    assert isinstance(ranges, miners.BatchEasyHardMiner)


# What a class requires beside the sizes, which `build_loss` is given.
REQUIRED = {"RankedListLoss": {"margin": 0.4, "Tn": 2}}


def test_losses_that_cannot_be_trained_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="DynamicSoftMarginLoss is no loss to choose by name: its histogram"):
        build_loss("DynamicSoftMarginLoss")
    with pytest.raises(ConfigError, match="SmoothAPLoss is no loss to choose by name: it needs as many images"):
        build_loss("SmoothAPLoss")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # the peer's HistogramLoss
@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the peer's LargeMarginSoftmaxLoss
@pytest.mark.parametrize("name", peer_classes("loss"))
def test_every_loss_of_the_peer_takes_two_steps_on_ragged_batches(name: str) -> None:
    torch.manual_seed(0)
    loss = build_loss(name, num_classes=4, embedding_size=8, **REQUIRED.get(name, {}))
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD([*layer.parameters(), *loss.parameters()], lr=0.01)
    for labels in ([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3], [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]):
        optimizer.zero_grad()
        value = loss(layer(torch.randn(len(labels), 8)), torch.tensor(labels))
        value.backward()
        optimizer.step()
        assert value.isfinite()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # the peer's HistogramLoss
@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the peer's LargeMarginSoftmaxLoss
@pytest.mark.parametrize("name", peer_classes("loss"))
def test_every_loss_of_the_peer_trains_by_name(name: str) -> None:
    torch.manual_seed(0)
    labels = torch.arange(16) // 4
    loss = build_loss(name, num_classes=4, embedding_size=8, **REQUIRED.get(name, {}))
    value, gradient = value_and_gradient(loss, torch.randn(16, 8), labels)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize("name", [*peer_classes("miner"), *OWN_MINERS])
def test_every_miner_chooses_by_name(name: str) -> None:
    embeddings, labels = batch("4 each")
    miner = build_miner(name)
    for references in ((), batch("ragged", seed=2)):
        tuples = miner(embeddings, labels, *references)
        assert len(tuples) in (3, 4)
        assert len(tuples[0])
        assert torch.isfinite(TripletLoss()(embeddings, labels, tuples, *references))


@pytest.mark.parametrize("kind", ["loss", "miner"])
def test_every_argument_of_the_peers_constructors_has_its_values_known(kind: str) -> None:
    objects = re.compile(r"distance|reducer|weight_init_func|collect_stats|mat_based_loss|.*_(regularizer|reg_weight)")
    for cls in peer_classes(kind).values():
        for name, parameter in specs._parameters(cls).items():
            if isinstance(parameter.default, bool) or objects.fullmatch(name):
                continue
            assert {name, *(f"{base.__name__}.{name}" for base in cls.__mro__)} & ACCEPTED.keys(), (cls, name)
            if isinstance(parameter.default, str):
                assert parameter.default in ACCEPTED[name].words
            assert isinstance(parameter.default, str) or not ACCEPTED[name].words


def nonsense(accepted: Accepted) -> list[object]:
    """Return values beyond both ends of what is accepted, and mistyped ones."""
    values: list[object] = ["nonsense", True, math.inf, math.nan, [], {}, *(f"{word}_" for word in accepted.words)]
    if accepted.interval:
        low, high = (float(end) for end in accepted.interval[1:-1].split(","))
        beyond = [end for end in (low - 1, high + 1) if math.isfinite(end)]
        open_ends = [end for end, mark in ((low, "("), (high, ")")) if mark in accepted.interval and math.isfinite(end)]
        values += [(bad, 5) for bad in beyond] if accepted.pair else beyond + open_ends
    if accepted.whole:
        values.append(2.5)
    if accepted.pair:
        values += [1, (1,), (1, 2, 3), (2, 1), ("0", 1)]
    return values


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("loss", "miner") for name in peer_classes(kind)], ids=lambda x: x
)
def test_a_value_that_makes_no_sense_is_never_taken(kind: str, name: str) -> None:
    cls = peer_classes(kind)[name]
    for argument in specs._parameters(cls):
        keys = [*(f"{base.__name__}.{argument}" for base in cls.__mro__), argument]
        accepted = next((ACCEPTED[key] for key in keys if key in ACCEPTED), None)
        for value in nonsense(accepted) if accepted else ["nonsense", math.inf]:
            with pytest.raises(ConfigError) as caught:
                specs.construct(cls, {argument: value}, check=check_argument)
            assert argument in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_mistyped_word_is_an_error_with_the_nearest_word() -> None:
    for words, spec in [
        ("did you mean 'semihard'", "BatchEasyHardMiner(neg_strategy='semi-hard')"),
        ("did you mean 'all'", "MarginLoss(triplets_per_anchor='al')"),
        ("did you mean 'Dq'", "PNPLoss(variant='dq')"),
        ("did you mean 'semihard'", "easy-positive(negatives='semi_hard')"),
        ("did you mean 'distance-weighted'", "triplet(mining='distance_weighted')"),
    ]:
        with pytest.raises(ConfigError, match=words):
            (build_miner if "Miner" in spec or "easy" in spec else build_loss)(spec)


def test_losses_with_parameters_get_their_sizes_and_settings() -> None:
    proxies = build_loss("ProxyAnchorLoss(margin=0.1, alpha=32)", num_classes=7, embedding_size=16)
    assert isinstance(proxies, losses.ProxyAnchorLoss)
    assert (proxies.margin, proxies.alpha, tuple(proxies.proxies.shape)) == (0.1, 32, (7, 16))
    with pytest.raises(ConfigError, match="num_classes must be 7, as data and model have it; got 5"):
        build_loss("ArcFaceLoss(num_classes=5)", num_classes=7, embedding_size=16)
    with pytest.raises(ConfigError, match="SubCenterArcFaceLoss needs a value for num_classes"):
        build_loss("SubCenterArcFaceLoss")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tripelt", "unknown loss 'tripelt'; did you mean 'triplet'"),
        ("MultiSimilarity", "did you mean 'MultiSimilarityLoss'"),
        ("CrossBatchMemory", "CrossBatchMemory is no loss to choose by name: it wraps another loss"),
        ("BaseMetricLossFunction", "unknown loss"),
        ("triplet(margn=0.1)", "unknown argument of TripletLoss 'margn'; did you mean 'margin'"),
        ("triplet(mining='semi_hard')", "unknown mining 'semi_hard'; did you mean 'semihard'"),
        ("triplet(margin='0.1')", "margin must be a finite number; got '0.1'"),
        ("triplet(mining=3)", "mining must be a word such as 'all'; got 3"),
        ("MultiSimilarityLoss(aplha=2)", "did you mean 'alpha'"),
        ("MultiSimilarityLoss(alpha=[2])", "alpha must be a number"),
        ("MultiSimilarityLoss(mat_based_loss=True)", "does not take these arguments"),
        ("MultiSimilarityLoss(distance='CosineSimilarity')", "distance must be an object"),
        ("ContrastiveLoss(embedding_regularizer=3)", "embedding_regularizer must be an object"),
        ("TripletMarginLoss(triplets_per_anchor='al')", "did you mean 'all'"),
        ("TripletMarginLoss(swap='yes')", "swap must be True or False; got 'yes'"),
        ("PNPLoss(variant='X')", "unknown variant of PNPLoss 'X'.* Known: Dq, Ds"),
        ("ArcFaceLoss", "ArcFaceLoss needs a value for num_classes, embedding_size"),
        ("triplet(0.1)", "a loss is written Name"),
        ("triplet(margin=__import__('os').getcwd())", "a loss is written Name"),
        ("triplet(**{'margin': 1})", "unknown argument of TripletLoss 'None'"),
        ("triplet(margin=0.1", "a loss is written Name"),
        ("losses.triplet()", "a loss is written Name"),
        ("triplet(margin=1e999)", "margin must be a finite number"),
        ("triplet(soft=1)", "soft must be True or False; got 1"),
        ("triplet(margin=0.3, soft=True)", "the soft margin has no width: leave out margin=0.3"),
        ("triplet(mining='hard', soft=True)", "mining 'hard' goes with a margin"),
        ("NTXentLoss(temperature=0)", r"temperature must be a number in \(0, inf\); got 0"),
        ("SphereFaceLoss(margin=0.5)", r"margin must be a whole number in \[1, inf\); got 0.5"),
        ("ContrastiveLoss(embedding_reg_weight=3)", "weighs a regularizer, an object"),
        ("VICRegLoss", "compares two views of unlabelled images"),
        ("", "a loss is written Name"),
    ],
)
def test_a_wrong_loss_spec_is_one_clear_error(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("TripletMarginMiner(type_of_triplets='semi_hard')", "unknown type_of_triplets .* did you mean 'semihard'"),
        ("TripletMarginMinr", "did you mean 'TripletMarginMiner'"),
        ("triplet", "unknown miner 'triplet'"),
        ("BatchHardMiner(pos_strategy='easy')", "does not take these arguments"),
        ("BatchEasyHardMiner(pos_strategy='eassy')", "unknown pos_strategy .* did you mean 'easy'"),
        ("MultiSimilarityMiner(epsilon=0.1, margin=2)", "unknown argument of MultiSimilarityMiner 'margin'"),
        ("batchhard", "unknown miner 'batchhard'; did you mean 'batch-hard'"),
        ("distance-weighted(cutoff='near')", "cutoff must be a finite number; got 'near'"),
        ("distance-weighted(cutof=0.4)", "did you mean 'cutoff'"),
        ("EmbeddingsAlreadyPackagedAsTriplets", "needs batches of triplets"),
    ],
)
def test_a_wrong_miner_spec_is_one_clear_error(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_miner(spec)


def test_settings_cannot_change_an_object() -> None:
    with pytest.raises(ConfigError, match="margin must be set when making it"):
        build_loss(TripletLoss(), margin=0.3)
    with pytest.raises(ConfigError, match="a miner must be its name or an object"):
        build_miner(3)  # type: ignore[call-overload]


def test_without_the_peer_our_own_losses_work_and_others_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_metric_learning"]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert isinstance(build_loss("contrastive"), ContrastiveLoss)
    with pytest.raises(ConfigError, match="did you mean 'triplet'"):
        build_loss("tripelt")
    with pytest.raises(MissingExtraError, match=r"the loss NTXentLoss needs .* 'vitembed\[metric-learning\]'"):
        build_loss("NTXentLoss")
    assert isinstance(build_miner("batch-hard"), OWN_MINERS["batch-hard"])
    with pytest.raises(MissingExtraError, match="the miner BatchHardMiner needs"):
        build_miner("BatchHardMiner")
