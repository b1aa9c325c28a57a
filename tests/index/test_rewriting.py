"""Compaction and rewriting: nothing is lost, readers go on, and what is left lying is swept away."""

import numpy as np
import pytest

from vitembed.errors import DataError, SearchIndexError, VectorError
from vitembed.index import Index, Records, changes, codes, exact, rows

DIM = 8


def unit(count, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def content(index):
    return [
        (name, *entry)
        for batch in index.stream(100)
        for name, *entry in zip(batch.ids, batch.vectors.tolist(), batch.metadata, strict=True)
    ]


@pytest.fixture
def index(tmp_path, monkeypatch):
    for module in (codes, exact, rows, changes):
        monkeypatch.setattr(module, "CODE_ROWS", 128)
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add([f"id{n}" for n in range(600)], unit(600), [{"n": n} for n in range(600)])
        index.remove([f"id{n}" for n in range(0, 600, 4)])
        index.add(["id1", "id2"], unit(2, 1))
        yield index


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_compacting_keeps_every_entry_bit_for_bit_and_gives_the_space_back(tmp_path, dtype):
    with Index.create(tmp_path / "y.index", DIM, dtype=dtype) as index:
        index.add([f"id{n}" for n in range(600)], unit(600), [{"n": n} for n in range(600)])
        index.remove([f"id{n}" for n in range(0, 600, 4)])
        before, query = content(index), unit(1, 5)
        hits = index.search(query, 20, where={"n": {"$gt": 100}})
        assert index.compact() == 150
        assert content(index) == before
        assert index.search(query, 20, where={"n": {"$gt": 100}}) == hits
        [file] = index.path.glob("vectors-*.f*")
        assert file.stat().st_size == 450 * DIM * np.dtype(dtype).itemsize
        assert index.check() == []
        assert index.compact() == 0
        index.add(["new"], unit(1, 7))
        assert index.search(unit(1, 7), 1)[0][0].id == "new"
    with Index.open(tmp_path / "y.index") as again:
        assert content(again)[:-1] == before


def test_a_reader_goes_on_across_a_compaction_and_sees_the_new_state(index):
    with Index.open(index.path) as reader:
        before = reader.search(unit(3, 5), 10)
        index.compact()
        assert reader.search(unit(3, 5), 10) == before
        index.remove([before[0][0].id])
        assert reader.search(unit(3, 5), 10)[0][0].id == before[0][1].id


def test_reading_in_batches_across_a_compaction_is_refused(index):
    batches = index.stream(100)
    next(batches)
    index.compact()
    with pytest.raises(SearchIndexError, match="rewritten while it was read; begin again"):
        list(batches)


def test_rewriting_replaces_entries_width_and_model_in_one_change(index):
    wide = unit(3, 2, dim=12)
    with Index.open(index.path) as reader:
        index.rewrite([Records(["a", "b"], wide[:2], [{"x": 1}, {}]), Records(["c"], wide[2:], [{}])], 12, "f", "/m")
        for one in (index, reader):
            assert (one.ids(), one.dim, one.fingerprint, one.location) == (["a", "b", "c"], 12, "f", "/m")
            assert one.search(wide[2], 1)[0][0].id == "c"
            assert one.check() == []


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([Records(["a"], unit(1), [{}]), Records(["a"], unit(1), [{}])], DataError),
        ([Records(["a"], unit(1), [{}]), Records([""], unit(1), [{}])], DataError),
        ([Records(["a"], unit(1, dim=5), [{}])], VectorError),
        ([Records(["a"], unit(1) * 2, [{}])], VectorError),
    ],
)
def test_a_rewriting_that_fails_changes_nothing(index, records, error):
    before, files = content(index), {path.name for path in index.path.glob("vectors-*.f32")}
    with pytest.raises(error):
        index.rewrite(records, DIM)
    assert content(index) == before
    assert index.check() == []
    index.compact()  # sweeps what the failed one left
    assert len({path.name for path in index.path.glob("vectors-*")} - files) == 2
    assert len(list(index.path.glob("vectors-*.f32"))) == 1


def test_an_outer_failure_undoes_a_compaction(index):
    before = content(index)
    with pytest.raises(DataError, match="not in the index"), index.transaction():  # noqa: PT012
        index.compact()
        index.remove(["unknown"])
    assert content(index) == before
    assert index.check() == []


def test_missing_codes_are_made_again_and_do_not_matter_meanwhile(index):
    [file] = index.path.glob("vectors-*.codes")
    hits = index.search(unit(1, 5), 10)
    file.unlink()
    with Index.open(index.path) as again:
        assert again.search(unit(1, 5), 10) == hits
        assert len(again.check()) == 4
        assert again.check(repair=True) == []
        assert again.search(unit(1, 5), 10) == hits


def test_an_index_cannot_be_rewritten_from_itself(index):
    before = content(index)
    with pytest.raises(SearchIndexError, match="cannot be read while it is rewritten"):
        index.rewrite(index.stream(), DIM)
    assert content(index) == before
