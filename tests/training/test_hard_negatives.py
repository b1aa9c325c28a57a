"""Hard negatives from the whole set, the guard against false ones, and the list of suspected label errors."""

import csv
import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, VectorError, VitembedError
from vitembed.preprocess import Preprocess
from vitembed.training import ImageDataset, hard_negatives, label_errors
from vitembed.training.hard_negatives import (
    HardNegatives,
    Mined,
    embed_all,
    find_hard_negatives,
    require_search,
    write_suspects,
)
from vitembed.training.label_errors import Suspect

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def unit(vectors: NDArray[Any]) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def on_circle(*degrees: float) -> Floats:
    """Return unit rows at these angles, whose cosines can be worked out by hand."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def clusters(classes: int, per_class: int, *, spread: float = 0.1, dim: int = 16, seed: int = 0) -> tuple[Floats, Ints]:
    """Return unit rows around a random centre a class, and their true labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return unit(unit(rng.normal(size=(classes, dim)))[labels] + spread * rng.normal(size=(len(labels), dim))), labels


def by_the_book(
    vectors: Floats, labels: Ints, m: int, guard: float | None, known: NDArray[np.bool_], forgery_of: Ints
) -> tuple[list[list[int]], int]:
    """Return the hard negatives, and how many of the m nearest the guard left out, by a plain loop over all pairs."""
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    there = np.flatnonzero(known)

    def ceiling(i: int) -> float:
        positives = [scores[i, j] for j in there if j != i and labels[j] == labels[i]]
        if not positives or guard is None:
            return math.inf
        return min(max(positives), guard * max(positives))

    result, guarded = [], 0
    for i in range(len(vectors)):
        wrong = [int(j) for j in there if known[i] and labels[j] != labels[i]]
        kept = []
        for rank, j in enumerate(sorted(wrong, key=lambda j: -scores[i, j])):
            forged = forgery_of[i] == labels[j] or forgery_of[j] == labels[i]
            one_writer = forgery_of[i] >= 0 and forgery_of[i] == forgery_of[j]
            if one_writer or scores[i, j] >= hard_negatives.COPY:
                continue
            if forged or scores[i, j] < min(ceiling(i), ceiling(j)):
                kept.append(j)
            else:
                guarded += rank < m
        result.append(kept[:m])
    return result, guarded


def listed(mined: Mined) -> list[list[int]]:
    """Return the neighbours as lists without the -1, which may stand at the end only."""
    rows = [row.tolist() for row in mined.neighbours]
    assert all(row == sorted(row, key=lambda j: j < 0) for row in rows)
    return [[j for j in row if j >= 0] for row in rows]


@pytest.mark.parametrize("large", [1, 128])  # search class by class, and all together
@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    forged=st.integers(0, 4),
    m=st.integers(1, 12),
    guard=st.sampled_from([None, 1.0, 0.9, 0.5]),
    missing=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_neighbours_are_those_of_a_plain_loop_over_all_pairs(
    large: int, counts: list[int], forged: int, m: int, guard: float | None, missing: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    forgery_of = np.full(len(labels), -1)
    writers = rng.integers(0, len(counts), forged)
    labels = np.concatenate([labels, len(counts) + np.arange(forged)])
    forgery_of = np.concatenate([forgery_of, writers])
    order = rng.permutation(len(labels))
    labels, forgery_of = labels[order], forgery_of[order]
    vectors = unit(rng.normal(size=(len(labels), 3)))
    known = rng.random(len(labels)) < 0.8 if missing else np.ones(len(labels), np.bool_)
    expected, guarded = by_the_book(vectors, labels, m, guard, known, forgery_of)
    # Nobody may look at the images that are not known.
    vectors[~known] = unit(rng.normal(size=vectors.shape))[~known] if seed % 2 else np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard_negatives, "_LARGE", large)
        patch.setattr(hard_negatives, "_QUERIES", 5)
        patch.setattr(hard_negatives, "_PRODUCTS", 16)
        mined = find_hard_negatives(
            vectors, labels, HardNegatives(neighbours=m, guard=guard), known=known, forgery_of=forgery_of
        )
    assert mined.neighbours.shape == (len(labels), m)
    assert mined.neighbours.dtype == np.int64
    assert listed(mined) == expected
    assert mined.guarded == guarded
    assert mined.without == sum(1 for i, row in enumerate(expected) if known[i] and not row)
    assert not {suspect.position for suspect in mined.suspects} & set(np.flatnonzero((forgery_of >= 0) | ~known))


def test_a_hand_worked_case() -> None:
    # a, a, b, b at 0, 20, 31 and 60 degrees: the ceilings are the cosines of 20, 20, 29 and 29 degrees. Of the wrong
    # pairs, 11 (the second with the third), 31, 40 and 60 degrees apart, only the first is above them.
    mined = find_hard_negatives(on_circle(0, 20, 31, 60), np.array([0, 0, 1, 1]), HardNegatives(neighbours=2))
    assert mined.neighbours.tolist() == [[2, 3], [3, -1], [0, -1], [1, 0]]
    assert (mined.guarded, mined.copies, mined.without) == (2, 0, 0)


def test_a_negative_must_stay_below_a_share_of_the_positive_score_of_both_images() -> None:
    # Positives at 10 degrees: 0.985. The wrong pair at 25 degrees scores 0.906, a share of 0.92.
    vectors, labels = on_circle(0, 10, 35, 45), np.array([0, 0, 1, 1])
    for guard, found in ((1.0, [2, 3]), (0.93, [2, 3]), (0.91, [3])):
        mined = find_hard_negatives(vectors, labels, HardNegatives(neighbours=2, guard=guard))
        assert listed(mined)[1] == found
    # The second b turns away: its mate's ceiling falls to cos 60 = 0.5, and from either side of the pair it counts.
    mined = find_hard_negatives(on_circle(0, 10, 35, 95), labels, HardNegatives(neighbours=2))
    assert listed(mined)[1] == [3]
    assert listed(mined)[2] == []


def test_a_mislabelled_image_is_no_negative_of_its_true_class() -> None:
    vectors, truth = clusters(6, 12)
    labels = truth.copy()
    labels[[0, 13, 50]] = [3, 5, 1]

    def false_negatives(guard: float | None) -> int:
        mined = find_hard_negatives(vectors, labels, HardNegatives(guard=guard))
        return sum(truth[i] == truth[j] for i, row in enumerate(listed(mined)) for j in row)

    assert false_negatives(None) > 30
    assert false_negatives(1.0) == 0


def test_a_positive_below_zero_does_not_open_the_guard() -> None:
    # The positives of 0 and 100 degrees score -0.17; half of that would let the wrong pair at 96 degrees (-0.10) in.
    vectors, labels = on_circle(0, 100, -96), np.array([0, 0, 1])
    assert listed(find_hard_negatives(vectors, labels, HardNegatives(guard=0.5)))[0] == []


@pytest.mark.parametrize("per_class", [100, 300])  # searched together, and class by class
def test_large_classes_never_crowd_out_the_wrong_neighbours(per_class: int) -> None:
    vectors, labels = clusters(3, per_class, spread=0.05)
    mined = find_hard_negatives(vectors, labels, HardNegatives(neighbours=hard_negatives.DEPTH, guard=None))
    assert (mined.neighbours >= 0).all()
    scores = np.where(labels[:, None] == labels, -np.inf, vectors @ vectors.T)
    best = -np.sort(-scores, axis=1)[:, : hard_negatives.DEPTH]
    found = np.take_along_axis(scores, mined.neighbours, 1)
    np.testing.assert_allclose(found, best, atol=1e-6)


def test_copies_under_another_label_are_counted_and_never_negatives() -> None:
    vectors, labels = on_circle(0, 90, 0, 180), np.array([0, 0, 1, 2])
    mined = find_hard_negatives(vectors, labels, HardNegatives(neighbours=1, guard=None))
    assert listed(mined)[0] == [3]  # beyond the copy
    assert listed(mined)[2] == [1]
    assert mined.copies == 2
    assert mined.guarded == 0


def test_forgeries_are_hard_negatives_however_alike_but_not_of_each_other() -> None:
    # Two genuine images 30 degrees apart, two forgeries between them, and a writer far away.
    vectors = on_circle(0, 30, 10, 12, 120, 150)
    labels = np.array([0, 0, 2, 3, 1, 1])
    forgery_of = np.array([-1, -1, 0, 0, -1, -1])
    plain = find_hard_negatives(vectors, labels, HardNegatives(neighbours=3))
    assert listed(plain)[0] == [4, 5]  # the guard takes them for images of the writer
    told = find_hard_negatives(vectors, labels, HardNegatives(neighbours=3), forgery_of=forgery_of)
    assert listed(told)[0] == [2, 3, 4]
    assert listed(told)[2] == [0, 1, 4]
    assert listed(told)[3] == [0, 1, 4]
    assert told.suspects == ()


def test_a_set_of_one_class_or_of_nothing_has_no_negatives() -> None:
    vectors, labels = clusters(1, 200)
    mined = find_hard_negatives(vectors, labels, HardNegatives())
    assert (mined.neighbours == -1).all()
    assert (mined.without, mined.suspects) == (200, ())
    empty = find_hard_negatives(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), HardNegatives())
    assert empty.neighbours.shape == (0, 8)


def test_a_collapsed_model_gives_copies_instead_of_negatives() -> None:
    vectors = np.repeat(on_circle(20), 30, axis=0)
    mined = find_hard_negatives(vectors, np.arange(30) % 3, HardNegatives())
    assert mined.without == 30
    assert mined.copies == 30 * 8


def suspects_by_the_book(vectors: Floats, labels: Ints) -> list[Suspect]:
    """Return the suspects by a plain loop: ten nearest vote, and the own class is twice as far."""
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    found = []
    for i in range(len(vectors)):
        ranked = sorted((j for j in range(len(vectors)) if j != i), key=lambda j: -scores[i, j])
        votes = [int(labels[j]) for j in ranked[:10]]
        others = [label for label in votes if label != labels[i]]
        if not others:
            continue
        suggested = max(others, key=lambda label: (votes.count(label), -votes.index(label)))
        own = [scores[i, j] for j in ranked if labels[j] == labels[i]]
        theirs = [scores[i, j] for j in ranked if labels[j] == suggested]
        count = min(5, len(own), len(theirs))
        if votes.count(suggested) < 2 or votes.count(suggested) <= votes.count(int(labels[i])) or not count:
            continue
        near, far = (math.sqrt(2 - 2 * sum(each[:count]) / count) for each in (theirs, own))
        if far > label_errors.FAR * near:
            agreeing = votes.count(suggested) / len(votes)
            found.append(Suspect(i, int(labels[i]), suggested, 1 - near / far, agreeing))
    return sorted(found, key=lambda each: (-each.score, each.position))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    spread=st.sampled_from([0.05, 0.2, 0.4]),
    flips=st.integers(0, 6),
    seed=st.integers(0, 10_000),
)
def test_suspects_are_those_of_a_plain_loop(counts: list[int], spread: float, flips: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(counts)), counts)
    vectors = unit(rng.normal(size=(len(counts), 8))[truth] + spread * rng.normal(size=(len(truth), 8)))
    labels = truth.copy()
    flipped = rng.choice(len(labels), min(flips, len(labels)), replace=False)
    labels[flipped] = rng.integers(0, len(counts), len(flipped))
    found, expected = (
        find_hard_negatives(vectors, labels, HardNegatives()).suspects,
        suspects_by_the_book(vectors, labels),
    )
    assert [dataclasses.astuple(each)[:3] for each in found] == [dataclasses.astuple(each)[:3] for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-5)
    assert [each.agreeing for each in found] == [each.agreeing for each in expected]


def test_flipped_labels_in_clear_classes_are_listed_with_their_true_class() -> None:
    vectors, truth = clusters(8, 15)
    assert find_hard_negatives(vectors, truth, HardNegatives()).suspects == ()
    labels = truth.copy()
    labels[[3, 40, 77]] = [5, 0, 2]
    suspects = find_hard_negatives(vectors, labels, HardNegatives()).suspects
    assert {each.position: (each.label, each.suggested) for each in suspects} == {3: (5, 0), 40: (0, 2), 77: (2, 5)}
    assert all(0.5 < each.score <= 1 and each.agreeing == 1 for each in suspects)
    assert [each.score for each in suspects] == sorted((each.score for each in suspects), reverse=True)


def test_what_is_found_does_not_depend_on_the_order_of_images_or_a_rotation() -> None:
    vectors, truth = clusters(6, 10, spread=0.12)
    rng = np.random.default_rng(1)
    labels = truth.copy()
    labels[rng.choice(60, 6, replace=False)] = rng.integers(0, 6, 6)
    order = rng.permutation(60)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    one = find_hard_negatives(vectors, labels, HardNegatives())
    two = find_hard_negatives(unit((vectors @ turn)[order]), labels[order], HardNegatives())
    assert one.suspects
    assert {each.position for each in one.suspects} == {int(order[each.position]) for each in two.suspects}
    assert listed(one) == [[int(order[j]) for j in listed(two)[place]] for place in np.argsort(order)]


def test_an_image_alone_in_its_class_is_never_a_suspect() -> None:
    vectors, labels = clusters(3, 12)
    labels[5] = 7
    assert find_hard_negatives(vectors, labels, HardNegatives()).suspects == ()


def test_one_neighbour_by_itself_makes_no_suspect() -> None:
    # Far from its only positive, beside one image of another class, with nine classes of one image in between.
    vectors = on_circle(0, 170, 1, *range(20, 29), 3)
    labels = np.array([0, 0, 1, *range(2, 11), 1])
    assert [each.position for each in find_hard_negatives(vectors, labels, HardNegatives()).suspects] == [0]
    labels[-1] = 11
    assert find_hard_negatives(vectors, labels, HardNegatives()).suspects == ()


def test_forgeries_are_neither_suspects_nor_suggested_even_if_they_share_a_label() -> None:
    # Among the writer's images lies one forgery, far from the others; among these one image of the writer.
    vectors = on_circle(0, 1, 2, 3, 4, 90, 91, 92, 93, 94)
    labels, forged = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0], np.bool_)
    plain = find_hard_negatives(vectors, labels, HardNegatives())
    assert {each.position for each in plain.suspects} == {4, 9}
    told = find_hard_negatives(vectors, labels, HardNegatives(), forgery_of=np.where(forged, 0, -1))
    assert told.suspects == ()


def suspicious(paths: list[Any]) -> tuple[ImageDataset, Mined]:
    dataset = ImageDataset.from_arrays(paths, ["cat", "dog", "dog, small"])
    suspects = (Suspect(2, 2, 0, 0.81, 0.9), Suspect(0, 0, 1, 0.5, 1.0))
    return dataset, Mined(np.full((3, 1), -1), suspects, guarded=0, copies=0, without=3)


def test_the_list_has_a_line_a_suspect_the_most_suspect_first(tmp_path: Path) -> None:
    table = tmp_path / "suspected_label_errors.csv"
    write_suspects(table, *suspicious([Path("a/1.png"), "b.png", Path("ä, 2.png")]))
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "suggested_label", "score", "neighbours_agreeing"],
        ["ä, 2.png", "dog, small", "cat", "0.8100", "0.90"],
        [str(Path("a/1.png")), "cat", "dog", "0.5000", "1.00"],
    ]


def test_images_without_a_path_go_by_their_position(tmp_path: Path) -> None:
    dataset, mined = suspicious([np.zeros((4, 4), np.uint8)] * 3)
    write_suspects(tmp_path / "list.csv", dataset, mined)
    assert [line.split(",")[0] for line in (tmp_path / "list.csv").read_text().splitlines()[1:]] == [
        "image 2",
        "image 0",
    ]


def test_a_search_without_suspects_clears_an_earlier_list(tmp_path: Path) -> None:
    dataset, mined = suspicious(["a", "b", "c"])
    write_suspects(tmp_path / "list.csv", dataset, mined)
    write_suspects(tmp_path / "list.csv", dataset, dataclasses.replace(mined, suspects=()))
    assert (tmp_path / "list.csv").read_text() == ",".join(hard_negatives.COLUMNS) + "\n"


def test_a_list_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    dataset, mined = suspicious(["a", "b", "c"])
    with pytest.raises(VitembedError, match="no folder"):
        write_suspects(tmp_path / "nowhere" / "list.csv", dataset, mined)
    write_suspects(tmp_path / "list.csv", dataset, mined)
    before = (tmp_path / "list.csv").read_bytes()
    with pytest.raises(DataError, match="expected the 3 images that were searched; got 2"):
        write_suspects(tmp_path / "list.csv", dataset.subset(np.array([0, 1])), mined)
    assert (tmp_path / "list.csv").read_bytes() == before


@pytest.fixture(scope="module")
def model() -> Embedder:
    return Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), device="cpu")


def batches(pixels: Tensor, *parts: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(pixels[part], torch.zeros(len(part), dtype=torch.int64), torch.tensor(part)) for part in parts]


def test_vectors_lie_where_their_images_do_and_what_did_not_come_is_told(model: Embedder) -> None:
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model.network.train()
    vectors, known = embed_all(model, batches(pixels, [4, 0], [1, 5, 3]), 6)
    assert model.network.training
    model.network.eval()
    assert known.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(vectors[known], model.embed_pixels(pixels)[known], atol=1e-5)
    assert vectors.dtype == np.float32
    assert not vectors[2].any()
    mined = find_hard_negatives(vectors, np.array([0, 0, 0, 1, 1, 1]), HardNegatives(guard=None), known=known)
    assert listed(mined)[2] == []
    assert 2 not in mined.neighbours
    assert mined.without == 0


def test_a_diverged_network_is_an_error_and_no_list_of_neighbours() -> None:
    broken = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), device="cpu")
    with torch.no_grad():
        for weights in broken.network.parameters():
            weights.fill_(math.nan)
    with pytest.raises(VectorError, match="NaN or infinity"):
        embed_all(broken, batches(torch.zeros((2, 1, 8, 8), dtype=torch.uint8), [0, 1]), 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every": 0}, "every of hard negatives must be a whole number of at least 1; got 0"),
        ({"first": 1.5}, "first of hard negatives must be a whole number of at least 1; got 1.5"),
        ({"neighbours": True}, "neighbours of hard negatives must be a whole number of at least 1; got True"),
        ({"neighbours": 65}, "neighbours of hard negatives must be at most 64; got 65"),
        ({"guard": 0.0}, "guard of hard negatives must lie in (0, 1], or be None for none; got 0.0"),
        ({"guard": 1.01}, "guard of hard negatives must lie in (0, 1], or be None for none; got 1.01"),
        ({"guard": "1"}, "guard of hard negatives must lie in (0, 1], or be None for none; got '1'"),
        ({"guard": math.nan}, "guard of hard negatives must lie in (0, 1], or be None for none; got nan"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        HardNegatives(**setting)


def test_searches_come_every_so_many_epochs_from_the_first_on() -> None:
    assert [epoch for epoch in range(1, 10) if HardNegatives(every=3, first=2).due(epoch)] == [2, 5, 8]
    assert [epoch for epoch in range(1, 5) if HardNegatives(every=1, first=1).due(epoch)] == [1, 2, 3, 4]


def test_input_that_does_not_fit_is_refused() -> None:
    vectors, labels = clusters(2, 3)
    given: dict[str, Any] = {"settings": HardNegatives()}
    with pytest.raises(VectorError, match=r"expected float32 vectors of shape \(n, d\); got float64"):
        find_hard_negatives(vectors.astype(np.float64), labels, **given)  # type: ignore[arg-type]
    with pytest.raises(VectorError, match=r"row 1 is not \(1 such rows\)"):
        find_hard_negatives(vectors * np.array([[1], [2], [1], [1], [1], [1]], np.float32), labels, **given)
    vectors[4] = np.nan
    with pytest.raises(VectorError, match="row 4 is not"):
        find_hard_negatives(vectors, labels, **given)
    vectors[4] = vectors[3]
    with pytest.raises(DataError, match=r"expected one label a vector; got \(5,\) for 6 vectors"):
        find_hard_negatives(vectors, labels[:5], **given)
    with pytest.raises(DataError, match="expected one known a vector"):
        find_hard_negatives(vectors, labels, known=np.ones(5, np.bool_), **given)
    with pytest.raises(DataError, match="expected one forgery_of a vector"):
        find_hard_negatives(vectors, labels, forgery_of=np.full(7, -1), **given)
    with pytest.raises(DataError, match="labels must be 0 or above; got -1"):
        find_hard_negatives(vectors, labels - 1, **given)


def test_without_faiss_the_error_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    require_search()
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (require_search, lambda: find_hard_negatives(*clusters(2, 3), HardNegatives())):
        with pytest.raises(ConfigError, match="pip install faiss-cpu") as caught:
            call()
        assert "\n" not in str(caught.value)
