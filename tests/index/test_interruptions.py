"""Changes that are interrupted, nested, undone or meet those of others: what becomes of files, caches and locks."""

import os
import signal

import numpy as np
import pytest

from vitembed.errors import DataError, SearchIndexError, VectorError
from vitembed.index import Index, Records, changes, codes, exact, rows

DIM = 8


def unit(count, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add([f"id{n}" for n in range(1_500)], unit(1_500), [{"n": n} for n in range(1_500)])
        yield index


class InterruptedConnection:
    """A connection of SQLite during one statement of which Ctrl-C is pressed, right after it was carried out."""

    def __init__(self, real, statement):
        self._real, self._statement = real, statement

    def __getattr__(self, name):
        return getattr(self._real, name)

    def execute(self, sql, values=()):
        result = self._real.execute(sql, values)
        if sql == self._statement:
            self._statement = None
            os.kill(os.getpid(), signal.SIGINT)
        return result


def interrupt(index, statement):
    database = index.catalog._db
    database._connection = InterruptedConnection(database._connection, statement)


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "COMMIT"])
def test_an_interrupted_compaction_is_wholly_done_or_not_at_all(index, statement):
    index.remove(["id0"])
    interrupt(index, statement)
    with pytest.raises(KeyboardInterrupt):
        index.compact()
    with Index.open(index.path) as other:
        assert len(other) == 1_499
        assert other.check() == []
        other.add(["new"], unit(1))  # no lock was left behind
    assert index.search(unit(1), 1)[0][0].id == "new" or len(index) == 1_500
    assert index.check() == []


@pytest.mark.parametrize("statement", ["BEGIN", "BEGIN IMMEDIATE"])
def test_an_interrupt_at_the_beginning_leaves_no_transaction_open(index, statement):
    interrupt(index, statement)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        index.add(["x"], unit(1))
        index.search(unit(1))
    with Index.open(index.path) as other:
        other.add(["y"], unit(1))
    index.add(["z"], unit(1))
    assert "y" in index


def test_undoing_several_rewritings_leaves_the_committed_files(index):
    before = index.search(unit(3, 5), 5)
    with pytest.raises(DataError), index.transaction():  # noqa: PT012
        for name in ("id0", "id1"):
            index.remove([name])
            index.compact()
            index.optimize(0.5, kind="ivf")
        index.remove(["unknown"])
    assert index.search(unit(3, 5), 5) == before
    assert index.check() == []
    assert sorted(path.suffix for path in index.path.iterdir()) == [
        ".codes",
        ".f32",
        ".sqlite",
        ".sqlite-shm",
        ".sqlite-wal",
    ]
    with Index.open(index.path) as other:
        assert other.search(unit(3, 5), 5) == before


def test_an_inner_failure_is_undone_and_the_outer_change_goes_on(index):
    with index.transaction():
        index.remove(["id0"])
        with pytest.raises(DataError), index.transaction():  # noqa: PT012
            index.compact()
            index.remove(["unknown"])
        index.add(["new"], unit(1, 9))
    assert ("id0" in index, "new" in index, len(index)) == (False, True, 1_500)
    assert index.search(unit(1, 9), 1)[0][0].id == "new"
    assert index.check() == []


def test_a_refused_change_does_not_forget_what_searches_keep(index):
    index.search(unit(1), where={"n": {"$lt": 5}})
    with index.snapshot() as kept:
        pass
    with pytest.raises(DataError):
        index.remove(["unknown"])
    with index.snapshot() as now:
        assert now is kept


def test_vectors_of_another_width_are_refused_though_the_width_changed_meanwhile(index, monkeypatch):
    transaction = Index.transaction

    def late(self):
        with Index.open(index.path) as other:
            monkeypatch.setattr(Index, "transaction", transaction)
            other.rewrite([Records(["a"], unit(1, dim=4), [{}])], 4)
        return transaction(self)

    monkeypatch.setattr(Index, "transaction", late)
    with pytest.raises(VectorError, match=r"shape \(n, 4\)"):
        index.add(["x"], unit(1))
    assert (index.ids(), index.check()) == (["a"], [])


def test_an_index_is_of_the_process_that_opened_it(index):
    child = os.fork()
    if not child:
        try:
            index.add(["from the child"], unit(1))
        except SearchIndexError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(index) == 1_500


def test_an_index_is_not_closed_within_a_change(index):
    with index.transaction():
        with pytest.raises(SearchIndexError, match="cannot be closed within a change"):
            index.close()
        index.add(["x"], unit(1))
    assert "x" in index


def test_check_sees_files_that_were_deleted_under_an_open_index(index):
    assert index.check() == []
    [file] = index.path.glob("vectors-*.f32")
    file.unlink()
    assert any(file.name in problem for problem in index.check())
    assert any(file.name in problem for problem in index.check(repair=True))


def test_a_damaged_row_is_named_when_its_block_fills_up(tmp_path, monkeypatch):
    for module in (codes, exact, rows, changes):
        monkeypatch.setattr(module, "CODE_ROWS", 128)
    with Index.create(tmp_path / "y.index", DIM) as index:
        index.add([f"id{n}" for n in range(100)], unit(100))
        [file] = index.path.glob("vectors-*.f32")
        with file.open("r+b") as stream:
            stream.seek(77 * DIM * 4)
            stream.write(b"\xff" * 8)
    with Index.open(tmp_path / "y.index") as index:
        with pytest.raises(SearchIndexError, match=r"vector of 'id77' \(row 77\).*remove this entry"):
            index.add([f"new{n}" for n in range(100)], unit(100, 1))
        index.remove(["id77"])
        index.add([f"new{n}" for n in range(100)], unit(100, 1))
        assert index.search(unit(100, 1)[5], 1)[0][0].id == "new5"
        assert index.check() == []


def test_repair_drops_a_structure_that_can_no_longer_be_built(index):
    index.optimize(0.5, kind="hnsw")
    index.remove([f"id{n}" for n in range(800)])
    [file] = index.path.glob("structure-*.faiss")
    file.unlink()
    assert index.check(repair=True) == []
    assert index.optimization.kind == "exact"


def test_repair_keeps_to_the_size_of_code_that_was_chosen(index):
    before = index.optimize(0.05, memory=90_000, kind="ivfpq")
    [file] = index.path.glob("structure-*.faiss")
    file.write_bytes(b"")
    assert index.check(repair=True) == []
    assert (index.optimization.code_bytes, index.optimization.memory) == (before.code_bytes, before.memory)


def test_a_structure_described_in_another_form_is_exact_search(index):
    index.optimize(0.5, kind="ivf")
    with index.transaction():
        index.catalog.set_meta("structure", '{"kind": "of the future"}')
    with Index.open(index.path) as other:
        assert other.optimization is None
        assert other.search(unit(1), 3) == other.search(unit(1), 3, recall=1.0)
        assert other.optimize(0.5, kind="ivf").entries == 1_500
        assert other.check() == []


def test_compacting_gives_the_space_of_the_catalog_back(index):
    def size():
        return sum(path.stat().st_size for path in index.path.glob("catalog.*"))

    index.annotate([f"id{n}" for n in range(1_500)], [{"text": "x" * 1_000}] * 1_500)
    index.remove([f"id{n}" for n in range(1_400)])
    before = size()
    assert index.compact() == 2_900
    assert size() < before / 3
    assert index.check() == []


def test_annotating_keeps_the_vector_and_the_record_of_the_file(index):
    from vitembed.index.files import FileRecord

    with index.transaction():
        index.catalog.file_records.put([FileRecord("/photos", "id7", 1, 1, "digest")])
    vector = index.get("id7").vector
    index.annotate(["id7"], [{"year": 2020}])
    assert index.get("id7").metadata == {"year": 2020}
    np.testing.assert_array_equal(index.get("id7").vector, vector)
    assert list(index.catalog.file_records.owners(["id7"])) == ["id7"]
    assert [hit.id for hit in index.search(vector, where={"year": 2020})[0]] == ["id7"]
    with pytest.raises(DataError, match="not in the index: 'unknown'"):
        index.annotate(["id8", "unknown"], [{}, {}])
    assert index.get("id8").metadata == {"n": 8}
    assert index.check() == []


def test_rows_whose_lengths_are_off_by_the_tolerance_are_ranked_right(tmp_path):
    step = 1 / 127
    vectors = np.zeros((codes.CODE_ROWS, 3), np.float32)
    vectors[:, 2] = 1
    vectors[0], vectors[1] = (1, 0, 0), (0, 1, 0)
    vectors[100:140] = (80 * step - 4e-6, 79 * step, 59 * step)
    vectors[16_000] = (79.5 * step * (1 - 1e-6), 79.5 * step * (1 - 1e-6), 59 * step)
    query = (np.array([1, 1, 0]) / np.sqrt(2) * 1.0009).astype(np.float32)
    with Index.create(tmp_path / "y.index", 3) as index:
        index.add([f"r{n}" for n in range(len(vectors))], vectors)
        assert int(np.argmax(vectors.astype(np.float64) @ query)) == 16_000
        assert index.search(query, 1)[0][0].id == "r16000"
