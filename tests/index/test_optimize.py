"""Structures: the recall that was promised, new and removed entries, damage, and when exact search is better."""

import subprocess
import sys

import numpy as np
import pytest

from vitembed.errors import ConfigError, SearchIndexError
from vitembed.index import Index, optimize, structure

DIM = 32
KINDS = ["hnsw", "ivf", "ivfpq"]


def clustered(rows, seed):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, DIM))
    vectors = centres[random.integers(0, 40, rows)] + random.standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS, QUERIES = clustered(3_000, 0), clustered(200, 1)


def nearest(alive, query, k):
    alive = np.asarray(sorted(alive))
    scores = VECTORS[alive].astype(np.float64) @ query.astype(np.float64)
    return {f"id{row}" for row in alive[np.argsort(-scores, kind="stable")[:k]]}


def recall(index, alive, k=10, **options):
    found = index.search(QUERIES, k, **options)
    shares = [
        len({hit.id for hit in hits} & nearest(alive, query, k)) / k for hits, query in zip(found, QUERIES, strict=True)
    ]
    assert all(len({hit.id for hit in hits}) == k for hits in found), "fewer than k hits, or one twice"
    assert all(int(hit.id[2:]) in alive for hits in found for hit in hits), "a removed id"
    return float(np.mean(shares))


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add(
            [f"id{row}" for row in range(2_500)], VECTORS[:2_500], [{"even": row % 2 == 0} for row in range(2_500)]
        )
        yield index


@pytest.mark.parametrize("kind", KINDS)
def test_a_structure_reaches_its_recall_on_unseen_queries_and_survives_reopening(index, kind):
    chosen = index.optimize(0.9, kind=kind)
    assert (chosen.kind, chosen.entries, chosen.covers) == (kind, 2_500, 2_500)
    assert [point.recall for point in chosen.curve] == sorted(point.recall for point in chosen.curve)
    assert chosen.point().recall >= 0.9
    alive = set(range(2_500))
    assert recall(index, alive) >= 0.88
    assert recall(index, alive, recall=1.0) == 1.0
    assert recall(index, alive, effort=chosen.curve[0].effort) <= recall(index, alive, effort=4_096)
    with Index.open(index.path) as again:
        assert again.optimization == chosen
        assert again.search(QUERIES[:20]) == index.search(QUERIES[:20])
        assert again.check() == []


@pytest.mark.parametrize("kind", KINDS)
def test_new_entries_are_found_at_once_and_removed_ones_never(index, kind):
    index.optimize(0.9, kind=kind)
    removed = set(range(0, 2_500, 3))
    index.remove([f"id{row}" for row in removed])
    index.add([f"id{row}" for row in range(2_500, 3_000)], VECTORS[2_500:])
    alive = set(range(3_000)) - removed
    assert recall(index, alive) >= 0.85
    for row in range(2_500, 3_000, 50):
        assert index.search(VECTORS[row], 1)[0][0].id == f"id{row}"
    assert (
        recall(index, {row for row in range(2_500) if row not in removed and row % 2 == 0}, where={"even": True}) == 1.0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_never_fewer_hits_than_there_are_entries_that_match(index, kind):
    index.optimize(0.9, kind=kind)
    index.remove([f"id{row}" for row in range(2_480)])
    assert [len(hits) for hits in index.search(QUERIES[:8], 30, effort=1)] == [20] * 8
    where = {"$and": [{"even": True}, {"even": {"$ne": None}}]}
    assert [len(hits) for hits in index.search(QUERIES[:8], 30, where=where, effort=1)] == [10] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_optimizing_again_folds_the_new_entries_in(index, kind, monkeypatch):
    first = index.optimize(0.9, kind=kind)
    assert index.optimize(0.9, kind=kind) == first, "nothing came since"
    index.add([f"id{row}" for row in range(2_500, 3_000)], VECTORS[2_500:])
    with monkeypatch.context() as patch:
        patch.setattr(structure.Structure, "train", None)  # it must not be built anew
        second = index.optimize(0.9, kind=kind)
    assert (second.entries, second.covers) == (3_000, 3_000)
    assert recall(index, set(range(3_000))) >= 0.88
    index.add([f"copy{row}" for row in range(3_000)], VECTORS)
    assert index.optimize(0.9, kind=kind).entries == 6_000, "too many for folding in"
    assert len(list(index.path.glob("structure-*"))) == 1


def test_a_damaged_or_missing_structure_is_exact_search_until_it_is_repaired(index):
    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    index.optimize(0.9, kind="ivf")
    for damage in (flip, lambda file: file.unlink()):
        [file] = index.path.glob("structure-*.faiss")
        damage(file)
        with Index.open(index.path) as other:
            assert recall(other, set(range(2_500))) == 1.0
            assert any(str(file) in problem for problem in other.check())
            assert other.check(repair=True) == []
            assert other.check() == []
            assert other.optimization.kind == "ivf"


def test_small_indices_and_a_recall_of_one_stay_exact(index):
    assert index.optimize(0.9).kind == "exact"
    index.optimize(0.9, kind="ivf")
    assert index.optimize(1.0).kind == "exact"
    assert list(index.path.glob("structure-*")) == []
    assert recall(index, set(range(2_500))) == 1.0


def test_the_kind_is_chosen_by_the_memory_allowed(index, monkeypatch):
    monkeypatch.setattr(optimize, "SMALL", 0)
    monkeypatch.setattr(optimize, "_TIMED", 1)

    def needed(kind, size=0):
        return structure.memory_needed(kind, DIM, 2_500, size)

    wanted = {needed("hnsw"): "hnsw", needed("ivf"): "ivf", needed("ivfpq", 8): "ivfpq", 10: "exact"}
    for memory, kind in wanted.items():
        monkeypatch.setattr(optimize.exact, "nearest", slowly(optimize.exact.nearest))
        chosen = index.optimize(0.5, memory=memory)
        assert (chosen.kind, chosen.memory <= memory) == (kind, True)


def slowly(search):
    """Return a search that loses against every structure, so that only memory decides."""
    import time

    def nearest(source, mask, queries, k):
        time.sleep(0.02)
        return search(source, mask, queries, k)

    return nearest


def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(index):
    before = index.optimize(0.9, kind="ivf")
    with pytest.raises(SearchIndexError, match=r"'hnsw' does not fit 1,000 bytes of memory"):
        index.optimize(0.9, memory=1_000, kind="hnsw")
    with pytest.raises(ConfigError, match="did you mean 'hnsw'"):
        index.optimize(0.9, kind="hsnw")
    for wrong in (0, -0.5, 1.5, "0.9", float("nan")):
        with pytest.raises(ConfigError, match="recall must be"):
            index.optimize(wrong)
    for wrong in ({"memory": -1}, {"memory": "1GB"}, {"seed": -1}, {"seed": True}):
        with pytest.raises(ConfigError, match="must be a whole number of at least 0"):
            index.optimize(0.9, **wrong)
    with pytest.raises(ConfigError, match="recall or effort, not both"):
        index.search(QUERIES[0], recall=0.9, effort=3)
    for wrong in (0, 1.5, True):
        with pytest.raises(ConfigError, match="effort must be"):
            index.search(QUERIES[0], effort=wrong)
    assert index.optimization == before
    index.remove([f"id{row}" for row in range(2_000)])
    with pytest.raises(SearchIndexError, match="at least 1,000 entries; there are 500"):
        index.optimize(0.9, kind="ivfpq")


def test_an_index_that_is_rewritten_meanwhile_refuses_the_structure(index, monkeypatch):
    run = optimize.Optimizer.run

    def rewritten(self, known):
        with Index.open(index.path) as other:
            other.remove(["id0"])
            other.compact()
        return run(self, known)

    monkeypatch.setattr(optimize.Optimizer, "run", rewritten)
    with pytest.raises(SearchIndexError, match="was rewritten while its structure was built"):
        index.optimize(0.9, kind="ivf")
    assert index.optimization is None
    assert index.check() == []


def test_a_graph_is_not_asked_for_more_than_it_can_say(index):
    index.optimize(0.9, kind="hnsw")
    assert len(index.search(QUERIES[0], 500)[0]) == 500


def test_a_recall_of_one_is_exact_whatever_was_measured(index):
    chosen = index.optimize(0.5, kind="ivf")
    assert chosen.effort(1.0) is None
    assert recall(index, set(range(2_500)), recall=1.0) == 1.0


def test_a_structure_is_searched_beside_faiss_for_torch(tmp_path):
    # pytorch-metric-learning imports it, and it replaces FAISS's own search.
    code = """
import sys, numpy as np, faiss.contrib.torch_utils
from vitembed.index import Index
rows = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
with Index.create(sys.argv[1], 16) as index:
    index.add([str(row) for row in range(2000)], rows)
    assert index.optimize(0.9, kind="hnsw").file is not None
    assert [hits[0].id for hits in index.search(rows[:3], k=5)] == ["0", "1", "2"]
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
