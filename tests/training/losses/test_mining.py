"""The miners against plain loops as the papers write them, pytorch-metric-learning, and the exact probabilities."""

import math

import pytest
import torch
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

from vitembed.errors import ConfigError, VectorError
from vitembed.training.losses import mining as mining_module
from vitembed.training.losses import rows as rows_module
from vitembed.training.losses.mining import BatchHardMiner, DistanceWeightedMiner, EasyPositiveMiner, TripletMiner

RAGGED = [0] * 7 + [5] * 2 + [9] + [-3] * 11 + [4] * 2 + [8]

MINERS = [
    BatchHardMiner(),
    EasyPositiveMiner("semihard"),
    EasyPositiveMiner("hard"),
    EasyPositiveMiner("all"),
    DistanceWeightedMiner(),
]
every_miner = pytest.mark.parametrize("miner", MINERS, ids=str)


def batch(labels: list[int], *, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float64 embeddings of many lengths, half-way to their class's centre, and shuffled labels."""
    random = torch.Generator().manual_seed(seed)
    shuffled = torch.tensor(labels)[torch.randperm(len(labels), generator=random)]
    centres = torch.randn(20, dim, generator=random, dtype=torch.float64)
    embeddings = torch.randn(len(labels), dim, generator=random, dtype=torch.float64) + centres[shuffled]
    return embeddings * torch.rand(len(labels), 1, generator=random, dtype=torch.float64).add(0.1), shuffled


def sides(
    embeddings: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, *, same: bool
) -> list[tuple[dict[int, float], dict[int, float]]]:
    """Return for each anchor the distances of its positives and of its negatives, by their numbers: a plain loop."""
    x, y = nn.functional.normalize(embeddings), nn.functional.normalize(others)
    found = []
    for a in range(len(x)):
        near: dict[int, float] = {}
        far: dict[int, float] = {}
        for j in range(len(y)):
            if not (same and j == a):
                (near if labels[a] == other_labels[j] else far)[j] = (x[a] - y[j]).norm().item()
        found.append((near, far))
    return found


def by_the_papers(name: str, found: list[tuple[dict[int, float], dict[int, float]]]) -> list[tuple[int, int, int]]:
    """Choose triplets one anchor at a time."""
    chosen = []
    for a, (near, far) in enumerate(found):
        if not near or not far:
            continue
        if name == "batch-hard":
            chosen.append((a, max(near, key=near.__getitem__), min(far, key=far.__getitem__)))
            continue
        easy = min(near, key=near.__getitem__)
        if name == "all":
            chosen += [(a, easy, n) for n in far]
            continue
        beyond = {n: d for n, d in far.items() if name == "hard" or d > near[easy]}
        if beyond:
            chosen.append((a, easy, min(beyond, key=beyond.__getitem__)))
    return chosen


def as_list(tuples: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(index.tolist() for index in tuples), strict=True))


DETERMINISTIC = [
    ("batch-hard", BatchHardMiner()),
    ("semihard", EasyPositiveMiner()),
    ("hard", EasyPositiveMiner("hard")),
    ("all", EasyPositiveMiner("all")),
]


@pytest.fixture(params=["one chunk", "a query at a time"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setitem(rows_module.CHUNK, "cpu", 1)


@pytest.mark.parametrize("labels", [RAGGED, [i // 4 for i in range(24)], [0] * 12 + [1]], ids=["ragged", "4", "one"])
@pytest.mark.parametrize(("name", "miner"), DETERMINISTIC)
@pytest.mark.usefixtures("chunk")
def test_a_miner_chooses_what_a_plain_loop_does(name: str, miner: TripletMiner, labels: list[int]) -> None:
    embeddings, classes = batch(labels)
    expected = by_the_papers(name, sides(embeddings, classes, embeddings, classes, same=True))
    assert as_list(miner(embeddings, classes)) == expected
    assert expected


@pytest.mark.parametrize(("name", "miner"), DETERMINISTIC)
@pytest.mark.usefixtures("chunk")
def test_references_are_searched_in_place_of_the_batch(name: str, miner: TripletMiner) -> None:
    embeddings, classes = batch(RAGGED)
    others, other_classes = batch([0, 0, 5, -3, -3, 9, 4, 4, 17], seed=1)
    found = sides(embeddings, classes, others, other_classes, same=False)
    assert as_list(miner(embeddings, classes, others, other_classes)) == by_the_papers(name, found)


@pytest.mark.parametrize(("name", "miner"), DETERMINISTIC)
def test_a_batch_within_its_references_is_not_its_own_positive(name: str, miner: TripletMiner) -> None:
    embeddings, classes = batch(RAGGED)
    before, labels_before = batch([0, 4, 4], seed=1)
    others, other_classes = torch.cat([before, embeddings]), torch.cat([labels_before, classes])
    found = sides(embeddings, classes, others, other_classes, same=False)
    for a, (near, _) in enumerate(found):
        del near[a + 3]
    assert as_list(miner(embeddings, classes, others, other_classes, own=3)) == by_the_papers(name, found)


@every_miner
def test_the_batch_as_its_own_reference_is_the_batch(miner: TripletMiner) -> None:
    embeddings, classes = batch(RAGGED)
    torch.manual_seed(1)
    expected = as_list(miner(embeddings, classes))
    torch.manual_seed(1)
    assert as_list(miner(embeddings, classes, embeddings, classes)) == expected
    torch.manual_seed(1)
    assert as_list(miner(embeddings, classes, embeddings, classes.clone())) == expected


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize(
    ("ours", "strategies"),
    [
        (BatchHardMiner(), None),
        (EasyPositiveMiner("hard"), ("easy", "hard")),
        (EasyPositiveMiner("semihard"), ("easy", "semihard")),
    ],
    ids=["batch-hard", "easy-hard", "easy-semihard"],
)
def test_a_miner_agrees_with_the_peer(
    ours: TripletMiner, strategies: tuple[str, str] | None, *, references: bool
) -> None:
    embeddings, classes = batch([i // 4 for i in range(64)], dim=16)
    refs = batch(RAGGED, dim=16, seed=2) if references else ()
    if strategies is None:
        expected = miners.BatchHardMiner(distance=LpDistance())(embeddings, classes, *refs)
    else:
        a, p, again, n = miners.BatchEasyHardMiner(*strategies, distance=LpDistance())(embeddings, classes, *refs)
        assert torch.equal(a, again)
        expected = a, p, n
    assert as_list(ours(embeddings, classes, *refs)) == as_list(expected)
    assert len(expected[0])


def test_all_negatives_of_the_easy_positive_agree_with_the_peer() -> None:
    embeddings, classes = batch(RAGGED)
    a, p, others, n = miners.BatchEasyHardMiner("easy", "all", distance=LpDistance())(embeddings, classes)
    positive = dict(zip(a.tolist(), p.tolist(), strict=True))
    expected = [(x, positive[x], y) for x, y in as_list((others, n)) if x in positive]
    assert as_list(EasyPositiveMiner("all")(embeddings, classes)) == expected


def exact_probabilities(distances: dict[int, float], dim: int, cutoff: float, limit: float) -> dict[int, float]:
    """Return the chance of each negative, as the paper has it: inverse to the density of distances, cut off."""
    weights = {}
    for n, distance in distances.items():
        d = max(distance, cutoff)
        density = d ** (dim - 2) * (1 - d**2 / 4) ** ((dim - 3) / 2)
        weights[n] = 1 / density if distance < limit else 0.0
    total = sum(weights.values())
    return {n: weight / total for n, weight in weights.items() if total}


def frequencies(miner: nn.Module, embeddings: Tensor, labels: Tensor, repeats: int) -> dict[int, dict[int, float]]:
    """Return how often each anchor got each negative, as shares."""
    counts: dict[int, dict[int, int]] = {}
    for _ in range(repeats):
        anchors, _, negatives = miner(embeddings, labels)
        for a, n in zip(anchors.tolist(), negatives.tolist(), strict=True):
            counts.setdefault(a, {}).setdefault(n, 0)
            counts[a][n] += 1
    return {a: {n: k / sum(row.values()) for n, k in row.items()} for a, row in counts.items()}


def far_apart(first: dict[int, float], second: dict[int, float]) -> float:
    """Return the total variation of two distributions."""
    return sum(abs(first.get(n, 0.0) - second.get(n, 0.0)) for n in first.keys() | second.keys()) / 2


@pytest.mark.parametrize(("dim", "cutoff", "limit"), [(3, 0.5, 1.4), (5, 0.5, 1.4), (5, 0.9, 1.2), (4, 0.2, 2.0)])
def test_negatives_are_drawn_with_the_papers_probabilities(dim: int, cutoff: float, limit: float) -> None:
    torch.manual_seed(0)
    embeddings, labels = batch([0] * 9 + [1] * 8 + [2] * 8, dim=dim, seed=3)
    shares = frequencies(DistanceWeightedMiner(cutoff, limit), embeddings, labels, 200)
    for a, (_, far) in enumerate(sides(embeddings, labels, embeddings, labels, same=True)):
        expected = exact_probabilities(far, dim, cutoff, limit)
        assert far_apart(shares.get(a, {}), expected) < 0.08  # 1,400 draws of at most 17: 0.04 is to be expected
        assert all(expected[n] > 0 for n in shares.get(a, {}))


def test_draws_agree_with_the_peers() -> None:
    torch.manual_seed(0)
    embeddings, labels = batch([0] * 9 + [1] * 8 + [2] * 8, dim=5, seed=3)
    ours = frequencies(DistanceWeightedMiner(), embeddings, labels, 150)
    peers = frequencies(miners.DistanceWeightedMiner(), embeddings, labels, 150)
    assert ours.keys() == peers.keys()
    assert max(far_apart(ours[a], peers[a]) for a in ours) < 0.13


def test_every_positive_pair_gets_one_negative() -> None:
    embeddings, labels = batch(RAGGED)
    anchors, positives, negatives = DistanceWeightedMiner(nonzero_loss_cutoff=2.0)(embeddings, labels)
    expected = torch.nonzero((labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool))
    assert as_list((anchors, positives)) == [tuple(pair) for pair in expected.tolist()]
    assert (labels[anchors] != labels[negatives]).all()


def test_draws_follow_the_generator_alone_and_not_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = batch(RAGGED)
    state = torch.get_rng_state()
    first = as_list(DistanceWeightedMiner()(embeddings, labels))
    assert as_list(DistanceWeightedMiner()(embeddings, labels)) != first
    torch.set_rng_state(state)
    monkeypatch.setitem(rows_module.CHUNK, "cpu", 1)
    assert as_list(DistanceWeightedMiner()(embeddings, labels)) == first


@pytest.mark.parametrize("dim", [2, 384, 4096])
def test_far_negatives_of_many_dimensions_are_drawn_and_not_lost(dim: int) -> None:
    # The weights of one anchor are 10^80 times those of another: each anchor must be scaled by its own.
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, dim, generator=random)
    embeddings[8] = embeddings[0] + 0.01 * torch.randn(dim, generator=random)
    anchors, _, negatives = DistanceWeightedMiner(nonzero_loss_cutoff=2.0)(embeddings, torch.arange(16) // 8)
    assert sorted(set(anchors.tolist())) == list(range(16))
    if dim > 2:
        assert set(negatives[anchors == 0].tolist()) == {8}


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])  # the first where a device has nothing wider
def test_the_greatest_chance_falls_on_a_negative(wide: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining_module, "wide_type", lambda _: wide)
    # The negatives come before the positives: beyond the last of them the sums stay, and a draw must not go there.
    monkeypatch.setattr(torch, "rand", lambda n, dtype: torch.full((n,), 1 - 2**-53, dtype=dtype))
    random = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(60, 5, generator=random), torch.tensor([1] * 30 + [0] * 30)
    for dtype in (torch.float32, torch.float64):
        anchors, _, negatives = DistanceWeightedMiner(nonzero_loss_cutoff=2.0)(embeddings.to(dtype), labels)
        assert len(anchors) == 2 * 30 * 29
        assert negatives.max() < 60
        assert (labels[anchors] != labels[negatives]).all()


def test_an_anchor_whose_negatives_are_all_too_far_is_left_out() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    assert len(DistanceWeightedMiner()(embeddings, torch.tensor([0, 0, 1, 1]))[0]) == 0


@every_miner
@pytest.mark.parametrize("labels", [[], [3], [5] * 6, list(range(6))], ids=str)
def test_without_positives_or_negatives_nothing_is_chosen(miner: TripletMiner, labels: list[int]) -> None:
    tuples = miner(torch.randn(len(labels), 4), torch.tensor(labels, dtype=torch.int64))
    assert [index.dtype for index in tuples] == [torch.int64] * 3
    assert as_list(tuples) == []


@every_miner
def test_an_empty_memory_has_nothing_to_choose_from(miner: TripletMiner) -> None:
    embeddings, labels = batch(RAGGED)
    assert as_list(miner(embeddings, labels, embeddings[:0], labels[:0])) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [12, 331])
def test_of_equal_images_the_first_is_taken(dtype: torch.dtype, size: int) -> None:
    # 0 is the anchor; its positives are one point, and so are its negatives: rounding must not tell them apart.
    points = torch.randn(3, 37, dtype=dtype, generator=torch.Generator().manual_seed(4))
    embeddings = points[torch.tensor([0] + [1] * size + [2] * size)]
    labels = torch.tensor([0] * (size + 1) + [1] * size)
    for miner in (BatchHardMiner(), EasyPositiveMiner("hard")):
        anchors, positives, negatives = miner(embeddings, labels)
        assert (anchors[0], positives[0], negatives[0]) == (0, 1, size + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_images_that_differ_by_their_scale_alone_the_first_is_taken(dtype: torch.dtype) -> None:
    # Equal once they are of unit length, but for rounding.
    random = torch.Generator().manual_seed(4)
    points = torch.randn(3, 37, dtype=dtype, generator=random)
    embeddings = points[torch.tensor([0] + [1] * 40 + [2] * 40)]
    labels = torch.tensor([0] * 41 + [1] * 40)
    scales = torch.rand(81, 1, dtype=dtype, generator=random) + 0.1
    for miner in (BatchHardMiner(), EasyPositiveMiner("hard"), EasyPositiveMiner("all")):
        anchors, positives, negatives = miner(embeddings * scales, labels)
        assert (anchors[0], positives[0], negatives[0]) == (0, 1, 41)
    # The first negatives of image 0 are at the point of its positives: not farther than they.
    near, far = nn.functional.normalize(points)[0] @ nn.functional.normalize(points)[1:].T
    embeddings[41:] = points[2 if near > far else 1]
    embeddings[1:41] = points[1 if near > far else 2]
    _, positives, negatives = EasyPositiveMiner()(embeddings * scales, torch.tensor([0] * 21 + [1] * 60))
    assert (positives[0], negatives[0]) == (1, 41)


def test_a_negative_as_near_as_the_positive_is_not_semihard() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert as_list(EasyPositiveMiner()(embeddings, labels))[0] == (0, 1, 3)
    assert as_list(EasyPositiveMiner("hard")(embeddings, labels))[0] == (0, 1, 2)


@every_miner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(miner: TripletMiner, dtype: torch.dtype) -> None:
    embeddings, labels = batch(RAGGED)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = as_list(miner(embeddings.to(dtype), labels))
    torch.manual_seed(0)
    assert chosen == as_list(miner(embeddings.to(dtype).float(), labels))


@every_miner
def test_a_choice_has_no_graph_and_leaves_the_embeddings_alone(miner: TripletMiner) -> None:
    embeddings, labels = batch(RAGGED)
    before = embeddings.clone()
    assert not any(index.requires_grad for index in miner(embeddings.requires_grad_(), labels))
    assert torch.equal(embeddings, before)
    assert embeddings.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutoff": 0.0}, "0 < cutoff < nonzero_loss_cutoff <= 2; got cutoff=0.0"),
        ({"cutoff": 1.5}, "got cutoff=1.5, nonzero_loss_cutoff=1.4"),
        ({"nonzero_loss_cutoff": 2.5}, "nonzero_loss_cutoff=2.5"),
        ({"cutoff": math.nan}, "cutoff=nan"),
        ({"cutoff": True}, "cutoff=True"),
        ({"nonzero_loss_cutoff": True}, "nonzero_loss_cutoff=True"),
    ],
)
def test_cutoffs_that_draw_nothing_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistanceWeightedMiner(**arguments)


def test_unknown_negatives_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown negatives 'semi-hard'; did you mean 'semihard'"):
        EasyPositiveMiner("semi-hard")  # type: ignore[arg-type]


@every_miner
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_cannot_be_compared_is_refused_and_not_chosen_from(miner: TripletMiner, number: float) -> None:
    embeddings, labels = batch(RAGGED)
    broken = embeddings.clone()
    broken[3, 2] = number
    for given in ((broken, labels), (embeddings, labels, broken, labels)):
        with pytest.raises(VectorError, match="hold NaN or inf, which a miner cannot compare"):
            miner(*given)


@every_miner
def test_labels_that_are_not_the_batchs_where_it_stands_are_refused(miner: TripletMiner) -> None:
    embeddings, labels = batch(RAGGED)
    with pytest.raises(ConfigError, match="ref_emb is embeddings, but ref_labels differ"):
        miner(embeddings, labels, embeddings, labels + 1)
    with pytest.raises(ConfigError, match="own=0 says that the references hold the batch"):
        miner(embeddings, labels, embeddings.clone(), labels + 1, own=0)


@every_miner
def test_references_that_do_not_fit_are_one_clear_error(miner: TripletMiner) -> None:
    embeddings, labels = batch(RAGGED)
    with pytest.raises(VectorError, match="ref_emb came without ref_labels"):
        miner(embeddings, labels, embeddings)
    with pytest.raises(VectorError, match=r"ref_emb must be floating-point of shape \(M, 8\)"):
        miner(embeddings, labels, embeddings[:, :5], labels)
