"""Exact search: against a plain sort of float64 products, whatever the rows, the mask and the way taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitembed.index import codes, exact
from vitembed.index.codes import encode


class Coded(exact.Plain):
    """Rows in memory with codes of their full blocks, and a note of what was looked at."""

    def __init__(self, vectors):
        super().__init__(vectors)
        full = range(len(vectors) // codes.CODE_ROWS)
        self.blocks = [encode(vectors[n * codes.CODE_ROWS : (n + 1) * codes.CODE_ROWS]) for n in full]
        self.looked_at = 0

    def verified(self, rows):
        self.looked_at += len(rows)
        return super().verified(rows)

    def coded(self, number):
        return self.blocks[number] if number < len(self.blocks) else None


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors, mask, query, k):
    rows = np.flatnonzero(mask)
    scores = np.array([np.multiply(vectors[row], query, dtype=np.float64).sum() for row in rows])
    order = sorted(range(len(rows)), key=lambda n: (-scores[n], rows[n]))[:k]
    return rows[order].tolist(), scores[order].tolist()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    for module in (codes, exact):
        monkeypatch.setattr(module, "CODE_ROWS", 64)
    monkeypatch.setattr(exact, "FEW_ROWS", 0)


def data(kind, rows, dim, random):
    if kind == "spread":
        return unit(random.standard_normal((rows, dim)))
    if kind == "copies":
        return unit(random.standard_normal((3, dim)))[random.integers(0, 3, rows)]
    if kind == "crowded":  # all within the error of a code of each other
        return unit(random.standard_normal(dim) + 1e-3 * random.standard_normal((rows, dim)))
    if kind == "one large dimension":
        return unit(random.standard_normal((rows, dim)) * np.geomspace(100, 0.01, dim))
    return np.eye(dim, dtype=np.float32)[random.integers(0, dim, rows)]  # axes: dimensions of zeros in many blocks


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["spread", "copies", "crowded", "one large dimension", "axes"]),
    rows=st.integers(1, 400),
    dim=st.sampled_from([1, 2, 3, 8, 33]),
    k=st.sampled_from([1, 2, 10, 200]),
    queries=st.sampled_from([1, 3, exact.FEW_QUERIES + 1]),
    share=st.sampled_from([0.02, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 1_000),
)
def test_nearest_equals_a_plain_sort_to_the_last_bit(kind, rows, dim, k, queries, share, seed):
    random = np.random.default_rng(seed)
    vectors = data(kind, rows, dim, random)
    mask = random.random(rows) < share
    questions = data(kind, queries, dim, random)
    for query, (found, scores) in zip(questions, exact.nearest(Coded(vectors), mask, questions, k), strict=True):
        assert (found.tolist(), scores.tolist()) == brute_force(vectors, mask, query, k)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["spread", "copies", "crowded", "one large dimension", "axes"]),
    rows=st.integers(1, 400),
    queries=st.sampled_from([1, exact.FEW_QUERIES + 1]),
    floor=st.sampled_from([-1.0, 0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1_000),
)
def test_within_equals_a_plain_comparison(kind, rows, queries, floor, seed):
    random = np.random.default_rng(seed)
    vectors = data(kind, rows, 8, random)
    mask = random.random(rows) < 0.7
    questions = data(kind, queries, 8, random)
    for query, (found, scores) in zip(questions, exact.within(Coded(vectors), mask, questions, floor), strict=True):
        rows_all, scores_all = brute_force(vectors, mask, query, rows)
        expected = [(row, score) for row, score in zip(rows_all, scores_all, strict=True) if score >= floor]
        assert list(zip(found.tolist(), scores.tolist(), strict=True)) == expected


def test_the_bound_of_a_code_holds_for_every_row_and_query():
    random = np.random.default_rng(0)
    for kind in ("spread", "crowded", "one large dimension", "axes"):
        vectors = data(kind, 64, 48, random)
        coded = encode(vectors)
        for query in data("spread", 20, 48, random):
            rough, positions, bound = exact._scan_codes(coded, coded.codes, query, 64)
            errors = rough - vectors[positions].astype(np.float64) @ query
            assert np.abs(errors).max() <= bound
            assert bound < 0.1, "a bound that is so loose chooses nothing"


def test_a_search_over_codes_looks_at_few_rows():
    random = np.random.default_rng(0)
    vectors = unit(random.standard_normal((64 * 64, 128)))
    source = Coded(vectors)
    exact.nearest(source, np.ones(len(vectors), bool), vectors[:1], 1)
    assert source.looked_at < len(vectors) / 4


def test_half_precision_rows_are_scored_as_they_are_stored():
    random = np.random.default_rng(0)
    stored = unit(random.standard_normal((300, 16))).astype(np.float16)
    query = unit(random.standard_normal((1, 16)))
    [(rows, scores)] = exact.nearest(Coded(stored), np.ones(300, bool), query, 5)
    assert (rows.tolist(), scores.tolist()) == brute_force(stored, np.ones(300, bool), query[0], 5)


def test_scans_share_the_work_among_threads_and_keep_its_order():
    assert exact.in_parallel(lambda number: number * number, range(1_000)) == [n * n for n in range(1_000)]
    assert exact.in_parallel(str, []) == []
    with pytest.raises(ZeroDivisionError):
        exact.in_parallel(lambda number: 1 // number, range(100))
