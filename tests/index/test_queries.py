"""Queries of several images and of entries."""

import numpy as np
import pytest

from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.index import Index, combined, more_like
from vitembed.index.queries import search_others

VECTORS = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", 6) as index:
        index.add([f"id{n}" for n in range(50)], VECTORS, [{"even": n % 2 == 0} for n in range(50)])
        yield index


def test_the_combined_query_ranks_by_the_mean_cosine(index):
    several = VECTORS[:3]
    expected = np.argsort(-(VECTORS @ several.T).mean(axis=1), kind="stable")
    assert [hit.id for hit in index.search(combined(several), 50)[0]] == [f"id{n}" for n in expected]
    np.testing.assert_allclose(combined(VECTORS[:1]), VECTORS[0], rtol=1e-6)


def test_more_like_leaves_out_the_entries_themselves(index):
    ranked = np.argsort(-(VECTORS @ combined(VECTORS[[4, 7]])), kind="stable")
    expected = [f"id{n}" for n in ranked if n not in (4, 7)]
    assert [hit.id for hit in more_like(index, ["id4", "id7"], 5)] == expected[:5]
    assert [hit.id for hit in more_like(index, ["id4", "id7"], 99)] == expected
    even = [name for name in expected if int(name[2:]) % 2 == 0]
    assert [hit.id for hit in more_like(index, ["id4", "id7"], 4, where={"even": True})] == even[:4]


def test_queries_that_make_no_sense_are_refused(index):
    for wrong in (np.empty((0, 6)), VECTORS[0], [VECTORS[0], -VECTORS[0]], np.full((1, 6), np.nan)):
        with pytest.raises(VectorError):
            combined(wrong)
    with pytest.raises(DataError, match="not in the index: 'x'"):
        more_like(index, ["x"])
    for k in (0, -1, True, 2.5):
        with pytest.raises(ConfigError, match="k must be"):
            more_like(index, ["id1", "id2"], k)
    for nothing in ([], "id1"):
        with pytest.raises(DataError, match="list of at least one id"):
            more_like(index, nothing)


def test_each_query_is_searched_without_its_own_entries_alone(index):
    found = search_others(index, VECTORS[[4, 7, 9]], [{"id4", "id7"}, set(), {"id9"}], 6)
    ranked = [[f"id{n}" for n in np.argsort(-(VECTORS @ VECTORS[q]), kind="stable")] for q in (4, 7, 9)]
    expected = [[n for n in ranked[0] if n not in ("id4", "id7")], ranked[1], ranked[2][1:]]
    assert [[hit.id for hit in hits] for hits in found] == [names[:6] for names in expected]
