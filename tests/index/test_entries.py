"""What a process keeps of ids and metadata, and the hits that are made of it."""

import copy
import pickle
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from vitembed.errors import SearchIndexError
from vitembed.index import Hit, Index, entries, rows
from vitembed.index.catalog import Catalog

DIM = 8
COUNT = 400


def unit(count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture
def path(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add([f"id {row}" for row in range(COUNT)], unit(COUNT), [{"row": row} for row in range(COUNT)])
    return tmp_path / "x.index"


@pytest.fixture
def asked(monkeypatch):
    """Which rows were asked of the catalog one by one, call for call."""
    calls = []
    items = Catalog.items

    def counted(self, wanted):
        wanted = list(wanted)
        calls.append(wanted)
        return items(self, wanted)

    monkeypatch.setattr(Catalog, "items", counted)
    return calls


def damage_metadata(path, row):
    with closing(sqlite3.connect(path / "catalog.sqlite")) as db:
        db.execute("UPDATE items SET metadata = '{}' WHERE row = ?", (row,))
        db.commit()


def check(index, queries):
    """Compare searches with a plain sort."""
    for query, hits in zip(queries, index.search(queries, k=5), strict=True):
        best = np.argsort(-(unit(COUNT) @ query), kind="stable")[:5]
        assert [(hit.id, hit.metadata) for hit in hits] == [(f"id {row}", {"row": row}) for row in best]


def test_a_block_that_is_often_asked_for_is_read_whole(path, asked):
    with Index.open(path) as index:
        for seed in range(60):
            check(index, unit(2, seed))
        assert sum(map(len, asked)) < entries._OFTEN + 10
        del asked[:]
        check(index, unit(COUNT))
        assert sum(map(len, asked)) == 0


def test_rows_that_come_later_are_found_too(path, asked):
    with Index.open(path) as index:
        check(index, unit(100))
        index.add(["new"], unit(1, 5), [{"new": True}])
        [[hit]] = index.search(unit(1, 5), k=1)
        assert hit == Hit("new", hit.score, {"new": True})
        index.remove(["new"])
        check(index, unit(100))


def test_what_is_kept_makes_room(path, monkeypatch):
    monkeypatch.setattr(entries, "_KEPT", 50)
    with Index.open(path) as index:
        for seed in range(30):
            check(index, unit(4, seed))
            assert len(index._rows._entries._kept) <= 50
        check(index, unit(COUNT))  # more than fit


def test_a_damaged_entry_fails_only_the_searches_that_find_it(path):
    damage_metadata(path, 7)
    with Index.open(path) as index:
        others = np.delete(unit(COUNT), 7, axis=0)
        for query in others:
            hits = index.search(query, k=1)[0]
            assert hits[0].score > 0.999999
        with pytest.raises(SearchIndexError, match="row 7 does not match"):
            index.search(unit(COUNT)[7], k=1)


def test_a_damaged_vector_fails_only_the_searches_that_score_it(path, monkeypatch):
    monkeypatch.setattr(rows, "_OFTEN", 8)
    with Index.open(path) as index:
        vectors = index._rows.vectors.path
    with vectors.open("r+b") as file:
        file.seek(7 * DIM * 4)
        file.write(np.full(DIM, 0.1, np.float32).tobytes())
    with Index.open(path) as index:
        for row in range(COUNT):
            name = f"id {row}"
            if row == 7:
                with pytest.raises(SearchIndexError, match=r"'id 7' \(row 7\) does not match"):
                    index.get(name)
            else:
                assert np.array_equal(index.get(name).vector, unit(COUNT)[row])


# Hits


def test_metadata_of_a_hit_are_its_own(path):
    with Index.open(path) as index:
        one, other = (index.search(unit(1), k=1)[0][0] for _ in range(2))
    one.metadata["row"] = "changed"
    assert other.metadata == {"row": 0}
    assert one.metadata == {"row": "changed"}


def test_hits_are_equal_when_all_they_hold_is():
    hit = Hit("a", 0.5, {"x": [1]})
    assert hit == Hit("a", 0.5, '{"x": [1]}')
    assert hit != Hit("a", 0.5, {"x": [2]}) != Hit("b", 0.5, {"x": [2]})
    assert hit != Hit("a", 0.25, {"x": [1]})
    assert hit != ("a", 0.5, {"x": [1]})


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda hit: pickle.loads(pickle.dumps(hit))])
def test_hits_can_be_copied_sent_and_printed(again):
    hit = Hit("a", 0.5, '{"x":[1]}')
    assert again(hit) == hit
    assert repr(again(hit)) == "Hit(id='a', score=0.5, metadata={'x': [1]})"
    assert hit.as_dict() == {"id": "a", "score": 0.5, "metadata": {"x": [1]}}
    with pytest.raises(AttributeError, match="cannot be changed"):
        hit.id = "b"
