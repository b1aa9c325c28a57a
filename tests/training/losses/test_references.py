"""The exact losses against a reference set: pytorch-metric-learning, tensors of all triplets, and the batch itself."""

import math
from collections.abc import Callable

import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitembed.errors import ConfigError, VectorError
from vitembed.training.losses import triplet
from vitembed.training.losses.pairs import exact_pairs
from vitembed.training.losses.triplet import SEARCH_FROM, Mining, exact_triplets

MININGS: list[Mining] = ["all", "hard", "semihard"]

# Labels of the queries and of the references.
LABELS = {
    "4 and 16 each": ([i // 4 for i in range(32)], [i // 16 for i in range(128)]),
    "ragged": (
        [0] * 5 + [7] * 2 + [5] + [-3] * 6 + [2] + [8] + [9] * 3,
        [0] * 2 + [7] * 30 + [5] * 3 + [-3] + [2] * 9 + [9] * 3 + [40] * 8,
    ),
    "classes of one side": ([1] * 3 + [2] * 3 + [3] * 4, [3] * 5 + [4] * 20 + [1] + [5] * 2),
    "two": ([i % 2 for i in range(30)], [int(i > 30) for i in range(90)]),
    "one query": ([6], [6] * 3 + [1] * 5),
    "one negative": ([1] * 4 + [2], [1] * 12 + [2]),
}
# Where the batch begins among the references, and what these are besides.
OWN = {
    "first of three": (0, [i // 2 for i in range(24)], [i // 3 for i in range(48)]),
    "ragged": (7, [0] * 5 + [7] * 2 + [5] + [-3] * 6 + [2], [0, 7, 7, 11, 11, 2, 11, 5, -3, -3, 8, 8, 9]),
    "singletons": (2, [1, 2, 3, 4, 4], [5, 5, 5]),
    "the batch alone": (0, [i // 4 for i in range(40)], []),
}

Draw = tuple[Tensor, Tensor, Tensor, Tensor]
Outcome = tuple[Tensor, Tensor, Tensor]


def draw(asked: list[int], held: list[int], *, dim: int = 16, pull: float = 0.0, seed: int = 0) -> Draw:
    """Return float64 embeddings of both sides, drawn to their class's centre by `pull`, and labels, all shuffled."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(70, dim, generator=random, dtype=torch.float64)
    sides: list[Tensor] = []
    for numbers in (asked, held):
        labels = torch.tensor(numbers, dtype=torch.int64)[torch.randperm(len(numbers), generator=random)]
        noise = torch.randn(len(labels), dim, generator=random, dtype=torch.float64)
        sides += [noise + pull * centres[labels], labels]
    return sides[0], sides[1], sides[2], sides[3]


def draw_own(name: str, *, pull: float = 0.5) -> tuple[Draw, int]:
    """Return a draw whose references hold the batch, and from where."""
    own, asked, others = OWN[name]
    rows, labels, rest, rest_labels = draw(asked, others, pull=pull)
    references = torch.cat([rest[:own], rows, rest[own:]])
    return (rows, labels, references, torch.cat([rest_labels[:own], labels, rest_labels[own:]])), own


def outcome(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], drawn: Draw) -> Outcome:
    """Return the value and the gradients of queries and references, which are brought to unit length first."""
    queries, references = drawn[0].clone().requires_grad_(), drawn[2].clone().requires_grad_()
    value = loss(nn.functional.normalize(queries), drawn[1], nn.functional.normalize(references), drawn[3])
    if value.requires_grad:  # the peer's 0 of no pairs at all has no graph
        value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (queries, references)]
    return value.detach(), gradients[0], gradients[1]


def triplets(margin: float, mining: Mining, own: int | None = None, **more: int) -> Callable[..., Tensor]:
    """Return our triplet loss as `outcome` calls it."""
    return lambda q, y, r, z: exact_triplets(q, y, margin=margin, mining=mining, references=(r, z), own=own, **more)[0]


def pairs(
    near: float, far: float, *, squared: bool = False, own: int | None = None, **more: int
) -> Callable[..., Tensor]:
    """Return our contrastive loss as `outcome` calls it."""
    settings = {"positive_margin": near, "negative_margin": far, "squared": squared, "own": own, **more}
    return lambda q, y, r, z: exact_pairs(q, y, references=(r, z), **settings)[0]  # type: ignore[arg-type]


def close(ours: Outcome, expected: Outcome, tolerance: float = 1e-9) -> None:
    """The values and both gradients agree, relative to their size."""
    assert math.isclose(ours[0].item(), expected[0].item(), rel_tol=tolerance, abs_tol=1e-12)
    for gradient, other in zip(ours[1:], expected[1:], strict=True):
        assert (gradient - other).norm() <= tolerance * other.norm() + 1e-12


@pytest.fixture(params=["comparison", "search"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with each way to count, whatever the class sizes."""
    monkeypatch.setattr(triplet, "SEARCH_FROM", 2 if request.param == "search" else 10**9)
    return str(request.param)


@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("margin", [0.1, 0.7])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.usefixtures("kernel")
def test_triplets_from_references_equal_the_peer_in_value_and_both_gradients(
    name: str, mining: Mining, margin: float, pull: float
) -> None:
    drawn = draw(*LABELS[name], pull=pull)
    miner, loss = miners.TripletMarginMiner(margin, mining), losses.TripletMarginLoss(margin)

    def peer(q: Tensor, y: Tensor, r: Tensor, z: Tensor) -> Tensor:
        value = loss(q, y, miner(q, y, r, z), ref_emb=r, ref_labels=z)
        assert isinstance(value, Tensor)
        return value

    close(outcome(triplets(margin, mining), drawn), outcome(peer, drawn))


@pytest.mark.parametrize("mining", MININGS)
def test_more_positives_than_are_compared_one_by_one_equal_the_peer(mining: Mining) -> None:
    held = [0] * (SEARCH_FROM + 40) + [1] * SEARCH_FROM + [2] * (SEARCH_FROM - 1) + [3] * 7
    drawn = draw([0] * 3 + [1] * 2 + [2] * 2 + [3], held, pull=0.7)
    miner, loss = miners.TripletMarginMiner(0.2, mining), losses.TripletMarginLoss(0.2)
    close(
        outcome(triplets(0.2, mining), drawn),
        outcome(lambda q, y, r, z: loss(q, y, miner(q, y, r, z), ref_emb=r, ref_labels=z), drawn),
    )


def all_triplets(margin: float, mining: Mining, own: int | None) -> Callable[..., Tensor]:
    """Return the mean of non-zero hinge terms as its definition has it, in a tensor of all (a, p, n)."""

    def loss(q: Tensor, y: Tensor, r: Tensor, z: Tensor) -> Tensor:
        same = y[:, None] == z
        positive = same.clone()
        if own is not None:
            positive[torch.arange(len(y)), own + torch.arange(len(y))] = False
        distances = (q[:, None] - r).square().sum(2).clamp_min(1e-30).sqrt()
        near, far = distances[:, :, None], distances[:, None, :]
        wanted = {"all": near == near, "hard": far <= near, "semihard": far > near}[mining]
        terms = (near + margin - far)[positive[:, :, None] & ~same[:, None, :] & wanted].relu()
        return terms.sum() / (terms > 0).sum().clamp_min(1)

    return loss


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("kernel")
def test_an_image_among_its_references_is_never_its_own_positive(name: str, mining: Mining) -> None:
    drawn, own = draw_own(name)
    close(outcome(triplets(0.3, mining, own), drawn), outcome(all_triplets(0.3, mining, own), drawn))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("block", [None, 16])
def test_a_batch_as_its_own_references_equals_the_batch_without(mining: Mining, block: int | None) -> None:
    rows, labels, _, _ = draw([0] * 9 + [7] * 2 + [5] + [-3] * 17 + [2] * 2 + [8] + [9] * 5, [], pull=0.5)

    def run(**more: object) -> tuple[Tensor, Tensor]:
        leaf = nn.functional.normalize(rows).requires_grad_()
        references = {"references": (leaf, labels), "own": 0} if more else {}
        value, share = exact_triplets(leaf, labels, margin=0.3, mining=mining, block=block, **references)  # type: ignore[arg-type]
        contrast, both = exact_pairs(
            leaf,
            labels,
            positive_margin=0.1,
            negative_margin=1.2,
            squared=False,
            block=block,
            **references,  # type: ignore[arg-type]
        )
        (value + 2 * contrast).backward()
        assert leaf.grad is not None
        return torch.stack([value.detach(), share, contrast.detach(), both]), leaf.grad

    for plain, referred in zip(run(), run(referred=True), strict=True):
        torch.testing.assert_close(referred, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mining", MININGS)
def test_the_shares_of_a_gathered_batch_add_up_to_the_whole(mining: Mining) -> None:
    rows, labels, _, _ = draw([i // 4 for i in range(48)], [], pull=0.5)
    rows = nn.functional.normalize(rows)
    whole, share = exact_triplets(rows, labels, margin=0.3, mining=mining)
    parts = [
        exact_triplets(part, numbers, margin=0.3, mining=mining, references=(rows, labels), own=16 * rank)
        for rank, (part, numbers) in enumerate(zip(rows.split(16), labels.split(16), strict=True))
    ]
    total = sum(value * active for value, active in parts) / sum(active for _, active in parts)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.stack([active for _, active in parts]).mean(), share)


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.4, 1.5), (0.0, 0.1)])
@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("name", LABELS)
def test_pairs_with_references_equal_the_peer_in_value_and_both_gradients(
    name: str, margins: tuple[float, float], pull: float
) -> None:
    drawn = draw(*LABELS[name], pull=pull)
    loss = losses.ContrastiveLoss(*margins)
    close(outcome(pairs(*margins), drawn), outcome(lambda q, y, r, z: loss(q, y, ref_emb=r, ref_labels=z), drawn))


def all_pairs(near: float, far: float, *, squared: bool, own: int | None) -> Callable[..., Tensor]:
    """Return the contrastive loss as its definition has it, of one matrix."""

    def mean(terms: Tensor) -> Tensor:
        terms = terms[terms > 0]
        return (terms.square() / 2 if squared else terms).sum() / max(len(terms), 1)

    def loss(q: Tensor, y: Tensor, r: Tensor, z: Tensor) -> Tensor:
        same = y[:, None] == z
        positive = same.clone()
        if own is not None:
            positive[torch.arange(len(y)), own + torch.arange(len(y))] = False
        distances = (q[:, None] - r).square().sum(2).clamp_min(1e-30).sqrt()
        return mean(distances[positive] - near) + mean(far - distances[~same])

    return loss


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.5, 1.3), (-0.2, 0.8)])
@pytest.mark.parametrize("name", OWN)
def test_an_image_among_its_references_is_never_paired_with_itself(
    name: str, margins: tuple[float, float], squared: bool
) -> None:
    drawn, own = draw_own(name)
    ours = outcome(pairs(*margins, squared=squared, own=own), drawn)
    close(ours, outcome(all_pairs(*margins, squared=squared, own=own), drawn))


@pytest.mark.parametrize("squared", [False, True])
def test_pairs_without_references_equal_the_definition_whatever_the_block(squared: bool) -> None:
    rows, labels, _, _ = draw([0] * 9 + [7] * 2 + [5] + [-3] * 17 + [2] * 2, [], pull=0.5)
    expected = outcome(all_pairs(0.2, 1.2, squared=squared, own=0), (rows, labels, rows, labels))
    for block in (None, 1, 7):
        leaf = rows.clone().requires_grad_()
        value, _ = exact_pairs(
            nn.functional.normalize(leaf),
            labels,
            positive_margin=0.2,
            negative_margin=1.2,
            squared=squared,
            block=block,
        )
        value.backward()
        assert leaf.grad is not None
        close((value.detach(), leaf.grad, leaf.grad), (expected[0], *[expected[1] + expected[2]] * 2))


def test_the_share_of_active_terms_is_of_those_that_there_are() -> None:
    # Two queries at 0 and 90 degrees; references at 0, 60 and 180 degrees, whose distances are 0, 1 and 2 from the
    # first query, sqrt(2), 0.518 and sqrt(2) from the second.
    rows = torch.eye(2, dtype=torch.float64)
    references = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-1.0, 0.0]], dtype=torch.float64)
    labels, theirs = torch.tensor([1, 2]), torch.tensor([1, 2, 2])
    # First query: (p 0, n 1) and (p 0, n 2). Second: (p 0.518, n 1.414) and (p 1.414, n 1.414).
    value, share = exact_triplets(rows, labels, margin=0.3, mining="all", references=(references, theirs))
    assert math.isclose(value.item(), 0.3, rel_tol=1e-9)  # the last is active alone
    assert share.item() == 0.25
    hard, _ = exact_triplets(rows, labels, margin=0.3, mining="hard", references=(references, theirs))
    assert math.isclose(hard.item(), 0.3, rel_tol=1e-9)
    semihard, none = exact_triplets(rows, labels, margin=0.3, mining="semihard", references=(references, theirs))
    assert (semihard.item(), none.item()) == (0, 0)
    # Positive pairs 0, 0.518 and 1.414; negative pairs 1, 2 and 1.414.
    value, share = exact_pairs(
        rows, labels, positive_margin=0.5, negative_margin=1.2, squared=False, references=(references, theirs)
    )
    near = math.sqrt(2 - math.sqrt(3))
    assert math.isclose(value.item(), (near - 0.5 + math.sqrt(2) - 0.5) / 2 + 0.2, rel_tol=1e-9)
    assert share.item() == 0.5


@pytest.mark.parametrize(
    ("name", "block"), [("ragged", 7), ("ragged", 64), ("classes of one side", 1), ("two", 16), ("two", 64)]
)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.usefixtures("kernel")
def test_the_size_of_the_blocks_changes_nothing(name: str, block: int, mining: Mining) -> None:
    drawn = draw(*LABELS[name], pull=0.5)
    close(outcome(triplets(0.3, mining, block=block), drawn), outcome(triplets(0.3, mining), drawn))
    close(outcome(pairs(0.1, 1.2, block=block), drawn), outcome(pairs(0.1, 1.2), drawn))


@pytest.mark.parametrize("limit", [1, 60, 700])
def test_the_parts_that_classes_are_measured_in_change_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, own = draw_own("ragged")
    whole = [outcome(loss, drawn) for loss in (triplets(0.3, "all", own), pairs(0.1, 1.2, own=own))]
    monkeypatch.setattr("vitembed.training.losses.layout._PART", limit)
    for expected, loss in zip(whole, (triplets(0.3, "all", own), pairs(0.1, 1.2, own=own)), strict=True):
        close(outcome(loss, drawn), expected, 1e-12)


@pytest.mark.parametrize("loss", [triplets(0.3, "semihard"), pairs(0.1, 1.2)], ids=["triplets", "pairs"])
def test_the_order_of_either_side_changes_nothing(loss: Callable[..., Tensor]) -> None:
    drawn = draw(*LABELS["ragged"], pull=0.5)
    random = torch.Generator().manual_seed(3)
    first, second = (torch.randperm(len(x), generator=random) for x in (drawn[1], drawn[3]))
    value, queries, references = outcome(loss, drawn)
    shuffled = outcome(loss, (drawn[0][first], drawn[1][first], drawn[2][second], drawn[3][second]))
    close(shuffled, (value, queries[first], references[second]), 1e-12)


@pytest.mark.parametrize(
    "loss", [*[triplets(0.3, mining) for mining in MININGS], pairs(0.3, 1.0, squared=True)], ids=[*MININGS, "pairs"]
)
def test_the_gradients_are_the_derivatives_of_the_value(loss: Callable[..., Tensor]) -> None:
    q, y, r, z = draw([0, 0, 1, 2, 5], [0] * 3 + [1] * 4 + [2, 3, 3], dim=3, pull=0.5)
    sides = (q.requires_grad_(), r.requires_grad_())
    unit = nn.functional.normalize
    assert torch.autograd.gradcheck(lambda a, b: loss(unit(a), y, unit(b), z), sides, eps=1e-8, atol=1e-5)


@pytest.mark.parametrize("loss", [triplets(0.3, "all"), pairs(0.1, 1.2)], ids=["triplets", "pairs"])
@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted_are_made(loss: Callable[..., Tensor], wants: tuple[bool, bool]) -> None:
    drawn = draw(*LABELS["ragged"], pull=0.5)
    rows, references = (nn.functional.normalize(x).requires_grad_() for x in (drawn[0], drawn[2]))
    both = torch.autograd.grad(loss(rows, drawn[1], references, drawn[3]), [rows, references])
    sides = [x.detach().requires_grad_(want) for x, want in zip((rows, references), wants, strict=True)]
    value = loss(sides[0], drawn[1], sides[1], drawn[3])
    assert value.requires_grad == any(wants)
    if any(wants):
        value.backward()
    for side, want, expected in zip(sides, wants, both, strict=True):
        assert torch.equal(side.grad, expected) if want and side.grad is not None else side.grad is None


@pytest.mark.parametrize(
    ("asked", "held"),
    [([], [1, 1, 2]), ([1, 2], []), ([1, 2, 3], [4, 4, 5]), ([1] * 3, [1] * 5), ([], [])],
    ids=["no queries", "no references", "no positives", "no negatives", "nothing"],
)
@pytest.mark.parametrize("mining", MININGS)
def test_no_triplet_gives_zero_with_gradients_of_zeros(asked: list[int], held: list[int], mining: Mining) -> None:
    drawn = draw(asked, held)
    value, queries, references = outcome(triplets(0.3, mining), drawn)
    assert value.item() == 0
    assert not queries.any()
    assert not references.any()
    close(outcome(pairs(0.1, 1.2), drawn), outcome(all_pairs(0.1, 1.2, squared=False, own=None), drawn))


@pytest.mark.parametrize("loss", [triplets(0.3, "hard"), pairs(0.1, 1.2)], ids=["triplets", "pairs"])
@pytest.mark.parametrize("side", [0, 2])
@pytest.mark.parametrize("labels", [LABELS["classes of one side"], ([1] * 5, [1] * 5), ([1] * 5, [2] * 5)], ids=str)
def test_nan_on_either_side_is_nan_in_the_loss(
    loss: Callable[..., Tensor], side: int, labels: tuple[list[int], list[int]]
) -> None:
    drawn = draw(*labels)
    drawn[side][4, 2] = torch.nan
    assert outcome(loss, drawn)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mining", MININGS)
def test_a_memory_that_holds_copies_of_the_batch_has_finite_gradients(mining: Mining, dtype: torch.dtype) -> None:
    rows, labels, _, _ = draw([i // 4 for i in range(24)], [])
    # Copies with the same label are positives at a distance of 0; copies with another are ties of these.
    copies, theirs = rows.repeat(2, 1).to(dtype), torch.cat([labels, labels.roll(4)])
    drawn = (rows.to(dtype), labels, copies, theirs)
    for loss in (triplets(0.2, mining), pairs(0.0, 1.0)):
        value, queries, references = outcome(loss, drawn)
        assert value > 0
        assert queries.isfinite().all()
        assert references.isfinite().all()
    exact = outcome(all_triplets(0.2, mining, None), tuple(x.double() if x.is_floating_point() else x for x in drawn))  # type: ignore[arg-type]
    assert math.isclose(
        outcome(triplets(0.2, mining), drawn)[0].item(),
        exact[0].item(),
        rel_tol=1e-2 if dtype == torch.float32 else 1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_at_the_same_point_has_a_distance_of_zero_and_no_gradient(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    value, *gradients = outcome(pairs(0.0, 0.1), (rows, torch.tensor([1, 2, 3]), rows, torch.tensor([4, 5, 6])))
    assert value == torch.tensor(0.1, dtype=dtype)  # the other pairs are farther apart
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", [triplets(0.004, "all"), pairs(0.0, 0.008)], ids=["triplets", "pairs"])
def test_float32_near_a_collapse_keeps_the_precision_that_its_rows_have(loss: Callable[..., Tensor]) -> None:
    # All rows are within 0.03 of one another: of squared distances that are not of centred rows, rounding is 1 %.
    drawn = draw(*LABELS["4 and 16 each"], dim=64)
    near = [nn.functional.normalize(1 + 0.002 * x).float() for x in (drawn[0], drawn[2])]

    def run(dtype: torch.dtype) -> Outcome:
        rows, references = (x.to(dtype, copy=True).requires_grad_() for x in near)
        value = loss(rows, drawn[1], references, drawn[3])
        gradients = torch.autograd.grad(value, [rows, references])
        return value.detach(), gradients[0].double(), gradients[1].double()

    close(run(torch.float32), run(torch.float64), 1e-5)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        # An expanded tensor has one element in memory.
        held = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *held, 0)
        return result


@pytest.mark.parametrize(
    "loss", [triplets(0.3, "semihard", block=32), pairs(0.1, 1.2, block=32)], ids=["triplets", "pairs"]
)
def test_memory_is_that_of_a_block_and_of_the_rows(loss: Callable[..., Tensor]) -> None:
    size, held, dim = 256, 1024, 8
    drawn = draw([i // 4 for i in range(size)], [i // 16 for i in range(held)], dim=dim)
    rows, references = (nn.functional.normalize(x).requires_grad_() for x in (drawn[0], drawn[2]))
    with Largest() as largest:
        loss(rows, drawn[1], references, drawn[3]).backward()
    assert largest.elements <= held * dim  # 8192; size * held is 262144, and all triplets are 4 million


@pytest.mark.parametrize(
    ("references", "own", "error", "message"),
    [
        ((torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)), None, VectorError, r"shape \(M, 4\).* of \(6, 5\)"),
        ((torch.ones(6, 4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)), None, VectorError, "int64 of"),
        ((torch.randn(6), torch.zeros(6, dtype=torch.int64)), None, VectorError, r"of \(6,\)"),
        ((torch.randn(6, 4), torch.zeros(5, dtype=torch.int64)), None, VectorError, r"\(6,\) integer .* of \(5,\)"),
        ((torch.randn(6, 4), torch.zeros(6)), None, VectorError, "integer labels.*float32"),
        ((torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), 4, ConfigError, "from 0 to 3; got 4"),
        ((torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), -1, ConfigError, "got -1"),
        ((torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), 1, ConfigError, "own=1 .* their labels differ"),
        (None, 2, ConfigError, "there are none; got own=2"),
    ],
)
def test_references_that_do_not_fit_are_one_clear_error(
    references: tuple[Tensor, Tensor] | None, own: int | None, error: type[Exception], message: str
) -> None:
    rows, labels = torch.randn(3, 4), torch.arange(3)
    with pytest.raises(error, match=message) as caught:
        exact_triplets(rows, labels, margin=0.2, mining="all", references=references, own=own)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        exact_pairs(
            rows, labels, positive_margin=0.0, negative_margin=1.0, squared=False, references=references, own=own
        )


def test_references_of_another_type_are_taken_and_keep_theirs_for_their_gradient() -> None:
    drawn = draw(*LABELS["ragged"], pull=0.5)
    rows, references = drawn[0].float(), drawn[2].bfloat16().requires_grad_()
    for loss in (triplets(0.3, "all"), pairs(0.1, 1.2)):
        value = loss(rows, drawn[1].to(torch.int16), references, drawn[3])
        assert torch.equal(value, loss(rows, drawn[1], references.float(), drawn[3]))
        (gradient,) = torch.autograd.grad(value, references)
        assert gradient.dtype == torch.bfloat16
        assert gradient.any()


def test_a_second_derivative_is_refused() -> None:
    drawn = draw(*LABELS["ragged"])
    rows = nn.functional.normalize(drawn[0]).requires_grad_()
    for loss in (triplets(0.3, "all"), pairs(0.1, 1.2)):
        with pytest.raises(ConfigError, match="no second derivative"):
            torch.autograd.grad(loss(rows, *drawn[1:]), rows, create_graph=True)
