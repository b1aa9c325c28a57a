"""The index as its users see it: changes, searches, bad input."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest

from vitembed.errors import ConfigError, DataError, ModelMismatchError, SearchIndexError, VectorError
from vitembed.index import Hit, Index, blocks, changes, codes, database, exact, rows

DIM = 8


def unit(rows, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(rows, prefix="id"):
    return [f"{prefix}{number}" for number in range(rows)]


def brute_force(vectors, queries, k):
    """Positions of the k best by float64 cosine, ties by position."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [sorted(range(len(vectors)), key=lambda n, row=row: (-row[n], n))[:k] for row in scores.round(12)]


def vector_file(path):
    [file] = path.glob("vectors-*.f32")
    return file


@pytest.fixture
def small_blocks(monkeypatch):
    """Code every 128 rows, and score nothing outright: so that a few hundred rows go the way of many."""
    for module in (codes, exact, rows, changes):
        monkeypatch.setattr(module, "CODE_ROWS", 128)
    monkeypatch.setattr(exact, "FEW_ROWS", 0)
    monkeypatch.setattr(exact, "QUERY_ROWS", 16)


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        yield index


@pytest.mark.usefixtures("small_blocks")
def test_search_equals_brute_force_over_many_blocks(tmp_path):
    vectors, queries = unit(3_000, 1), unit(40, 2)
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add(names(3_000), vectors)
        dead = set(range(0, 3_000, 7)) | set(range(300, 590)) | set(range(900, 1_200))
        index.remove([f"id{n}" for n in dead])
        alive = [n for n in range(3_000) if n not in dead]
        for count in (1, 3, 40):  # over the codes, and by matrices
            hits = index.search(queries[:count], k=12)
            expected = brute_force(vectors[alive], queries[:count], 12)
            assert [[hit.id for hit in row] for row in hits] == [[f"id{alive[n]}" for n in row] for row in expected]


def test_scores_are_cosines_and_do_not_depend_on_the_batch(index):
    vectors, queries = unit(500, 3), unit(30, 4)
    index.add(names(500), vectors)
    together = index.search(queries, k=5)
    assert together == [index.search(query, k=5)[0] for query in queries]
    for row, query in zip(together, queries, strict=True):
        for hit in row:
            assert hit.score == pytest.approx(float(vectors[int(hit.id[2:])].astype(float) @ query), abs=1e-12)


def test_scores_stay_within_minus_one_and_one(index):
    vector = unit(1)[0] * np.float32(1.0005)
    index.add(["same", "opposite"], [vector, -vector])
    assert [hit.score for hit in index.search(vector, k=2)[0]] == [1.0, -1.0]


@pytest.mark.usefixtures("small_blocks")
def test_equal_scores_come_in_the_order_of_insertion_however_many_there_are(index):
    copies, others = unit(1, 5), unit(300, 6)
    index.add(names(300, "other"), others)
    index.add(names(200, "copy"), np.repeat(copies, 200, axis=0))
    index.add(["copy0"], copies)  # replaced, so last
    for queries in (copies, np.repeat(copies, 30, axis=0)):
        found = [hit.id for hit in index.search(queries, k=150)[-1]]
        assert found == [f"copy{n}" for n in range(1, 151)]


def test_more_hits_than_entries_gives_all_entries_once(index):
    assert index.search(unit(2), k=5) == [[], []]
    index.add(names(3), unit(3))
    assert [sorted(hit.id for hit in row) for row in index.search(unit(2, 7), k=1_000)] == [names(3)] * 2
    assert index.search(np.empty((0, DIM))) == []


def test_hits_carry_their_metadata_and_are_frozen(index):
    index.add(["ä/猫😀.jpg", "plain"], unit(2), [{"label": "猫", "sizes": [1, 2.5, None]}, None])
    [[hit, other]] = index.search(unit(2)[0], k=2)
    assert (hit.id, hit.metadata) == ("ä/猫😀.jpg", {"label": "猫", "sizes": [1, 2.5, None]})
    assert (other.id, other.metadata) == ("plain", {})
    assert isinstance(hit, Hit)
    with pytest.raises(AttributeError):
        hit.score = 0
    hit.metadata["label"] = "changed"
    assert index.get("ä/猫😀.jpg").metadata["label"] == "猫"


def test_adding_a_known_id_replaces_its_vector_and_metadata(index):
    index.add(["a", "b"], unit(2, 1), [{"v": 1}, {"v": 1}])
    index.add(["a"], unit(1, 2), [{"v": 2}])
    assert len(index) == 2
    assert index.ids() == ["b", "a"]
    record = index.get("a")
    np.testing.assert_array_equal(record.vector, unit(1, 2)[0])
    assert (record.id, record.metadata) == ("a", {"v": 2})
    assert sorted(hit.id for hit in index.search(unit(1, 1), k=9)[0]) == ["a", "b"]


def test_removed_ids_are_never_returned(index):
    vectors = unit(50)
    index.add(names(50), vectors)
    assert index.remove(["id3", "id4", "id3"]) == 2
    assert "id3" not in index
    assert "id5" in index
    assert len(index) == 48
    assert not {"id3", "id4"} & {hit.id for hit in index.search(vectors[3], k=50)[0]}
    with pytest.raises(DataError, match="not in the index: 'id3'"):
        index.get("id3")


def test_removing_unknown_ids_names_three_of_them_and_changes_nothing(index):
    index.add(names(2), unit(2))
    with pytest.raises(DataError, match=r"'p', 'q', 'r', \.\.\. \(4 in all\)"):
        index.remove(["id0", "p", "q", "r", "s"])
    assert index.ids() == names(2)
    assert index.remove(["id0", "p"], missing_ok=True) == 1
    assert index.remove([]) == 0


def test_everything_is_there_after_reopening(tmp_path):
    with Index.create(tmp_path / "x.index", DIM, "sha256:abc", location="runs/birds") as index:
        index.add(names(9_000), unit(9_000), [{"n": n} for n in range(9_000)])
        index.remove(["id10"])
        before = index.search(unit(3, 9), k=20)
    with Index.open(tmp_path / "x.index") as index:
        assert (index.dim, index.fingerprint, len(index), index.path.name) == (DIM, "sha256:abc", 8_999, "x.index")
        assert index.location == "runs/birds"
        assert index.search(unit(3, 9), k=20) == before
        assert index.ids() == [name for name in names(9_000) if name != "id10"]
        assert index.check() == []
        assert "8999 vectors of 8" in repr(index)


def test_a_transaction_is_one_change_and_an_inner_failure_undoes_only_itself(index):
    index.add(["a"], unit(1))
    with index.transaction():
        index.add(["b"], unit(1, 1))
        assert {hit.id for hit in index.search(unit(1))[0]} == {"a", "b"}
        with suppress(KeyError), index.transaction():
            index.add(["c"], unit(1, 2))
            assert len(index.search(unit(1))[0]) == 3
            raise KeyError
        assert {hit.id for hit in index.search(unit(1))[0]} == {"a", "b"}
        index.add(["d"], unit(1, 3))
        index.remove(["a"])
        assert {hit.id for hit in index.search(unit(1))[0]} == {"b", "d"}
    assert index.ids() == ["b", "d"]
    assert index.check() == []


def test_a_failed_transaction_leaves_no_trace_even_after_a_search_inside(index):
    index.add(names(5), unit(5))
    before = index.search(unit(2, 3), k=9)

    def change_and_fail():
        with index.transaction():
            index.add(["new"], unit(1, 1))
            index.remove(["id0"])
            assert "new" in {hit.id for hit in index.search(unit(1, 1))[0]}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        change_and_fail()
    assert index.search(unit(2, 3), k=9) == before
    index.add(["other"], unit(1, 2))
    assert index.search(unit(1, 2), k=1)[0][0].id == "other"
    assert index.ids() == [*names(5), "other"]
    assert index.check() == []


# Filters


def test_where_finds_exactly_the_entries_with_that_value(index):
    values = [1, 1.0, True, "1", None, [1], {"a": 1}, 0, False, 0.1, "x'\"\\\n", "猫", 2**62, -5]
    vectors = unit(len(values))
    index.add(names(len(values)), vectors, [{"v": value, 'odd."key': n} for n, value in enumerate(values)])
    index.add(["none"], unit(1, 9))
    for wanted in [1, 1.0, True, "1", None, 0, False, 0.1, "x'\"\\\n", "猫", 2**62, -5, "y", np.float64(0.1)]:
        expected = {
            f"id{n}"
            for n, value in enumerate(values)
            if value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
        }
        assert {hit.id for hit in index.search(unit(1), k=99, where={"v": wanted})[0]} == expected, wanted
    assert [hit.id for hit in index.search(unit(1), where={"v": 1, 'odd."key': 1})[0]] == ["id1"]
    assert len(index.search(unit(1), k=99, where={})[0]) == len(values) + 1


@pytest.mark.parametrize("modulus", [2, 10, 500])
@pytest.mark.usefixtures("small_blocks")
def test_filtered_search_is_exact_at_any_selectivity(index, modulus):
    vectors, queries = unit(1_000), unit(25, 1)
    index.add(names(1_000), vectors, [{"class": n % modulus} for n in range(1_000)])
    index.remove(["id1"])
    matching = [n for n in range(2, 1_000) if n % modulus == 1]
    expected = [[f"id{matching[n]}" for n in row] for row in brute_force(vectors[matching], queries, 7)]
    assert [[hit.id for hit in row] for row in index.search(queries, 7, where={"class": 1})] == expected
    assert [hit.id for hit in index.search(queries[0], 7, where={"class": 1})[0]] == expected[0]


@pytest.mark.parametrize("where", [["v"], {"v": [1]}, {1: "v"}, {"v": float("nan")}], ids=repr)
def test_a_filter_that_makes_no_sense_is_refused(index, where):
    with pytest.raises(ConfigError, match="where must"):
        index.search(unit(1), where=where)


def test_metadata_are_nested_no_deeper_than_can_be_read_back(index):
    def nested(depth):
        return {"v": nested(depth - 1)} if depth > 1 else {"v": "[" * 300}

    index.add(["deep"], unit(1), [nested(100)])
    assert index.search(unit(1))[0][0].metadata == nested(100)
    with pytest.raises(DataError, match="metadata of 'deeper' cannot be written as JSON: it is nested 101 deep"):
        index.add(["deeper"], unit(1), [nested(101)])
    assert index.ids() == ["deep"]


# Bad input: an error that names the item, and nothing changed


def with_value(value, row=1):
    vectors = unit(3)
    vectors[row, 2] = value
    return vectors


BAD_ADDS = {
    "ids are one string": ("abc", unit(3), None, DataError, "list of strings"),
    "empty id": (["a", "", "c"], unit(3), None, DataError, "'' is empty"),
    "id with a line break": (["a", "b\nc", "d"], unit(3), None, DataError, "control characters"),
    "id with a C1 control": (["a", "b\x85c", "d"], unit(3), None, DataError, "control characters"),
    "id of 10 kB": (["a", "b" * 10_000, "c"], unit(3), None, DataError, "longer than 1,024 bytes"),
    "id that is no text": (["a", 7, "c"], unit(3), None, DataError, "got int"),
    "id with a lone surrogate": (["a", "\udc80", "c"], unit(3), None, DataError, "not valid Unicode"),
    "the same id twice": (["a", "b", "a"], unit(3), None, DataError, "'a' comes twice"),
    "fewer vectors than ids": (["a", "b", "c"], unit(2), None, VectorError, "3 ids and 2 vectors"),
    "another width": (["a", "b", "c"], unit(3, dim=5), None, VectorError, r"shape \(n, 8\) .* got \(3, 5\)\. Was it"),
    "one-dimensional": (["a"], unit(1)[0], None, VectorError, r"got \(8,\)"),
    "ragged": (["a", "b"], [[1.0], [1.0, 0.0]], None, VectorError, "array"),
    "text": (["a"], [["x"] * DIM], None, VectorError, "numbers"),
    "NaN": (["a", "b", "c"], with_value(np.nan), None, VectorError, "'b' holds NaN"),
    "infinite": (["a", "b", "c"], with_value(np.inf), None, VectorError, "'b' holds NaN or infinite"),
    "too large for float32": (["a"], np.full((1, DIM), 1e300), None, VectorError, "'a' holds NaN or infinite"),
    "too long, squares overflow": (["a"], np.full((1, DIM), 1e30), None, VectorError, "'a' has length inf"),
    "zero": (["a"], np.zeros((1, DIM)), None, VectorError, "length 0. Normalise"),
    "not of unit length": (["a", "b", "c"], with_value(3.0), None, VectorError, "'b' has length 3"),
    "metadata of another length": (["a", "b", "c"], unit(3), [{}], DataError, "each of the 3 ids; got 1"),
    "metadata as one mapping": (["a"], unit(1), {"a": 1}, DataError, "list with one mapping"),
    "metadata that is a list": (["a"], unit(1), [[1]], DataError, "metadata of 'a' must be a dict"),
    "metadata with a number as key": (["a"], unit(1), [{1: 2}], DataError, "strings as keys"),
    "metadata that is no JSON": (["a", "b"], unit(2), [{}, {"x": object()}], DataError, "'b' cannot be written"),
    "metadata with NaN": (["a"], unit(1), [{"x": math.nan}], DataError, "'a' cannot be written"),
    "metadata that is no Unicode": (["a"], unit(1), [{"x": "\udc80"}], DataError, "'a' cannot be written"),
}


@pytest.mark.parametrize("case", BAD_ADDS)
def test_a_bad_add_names_the_item_and_changes_nothing(index, case):
    ids, vectors, metadata, kind, message = BAD_ADDS[case]
    index.add(["old"], unit(1, 8), [{"kept": True}])
    size = vector_file(index.path).stat().st_size
    with pytest.raises(kind, match=message) as caught:
        index.add(ids, vectors, metadata)
    assert "\n" not in str(caught.value)
    assert index.ids() == ["old"]
    assert index.get("old").metadata == {"kept": True}
    assert vector_file(index.path).stat().st_size == size
    assert index.check() == []


def test_ids_up_to_the_limit_and_float64_or_float16_vectors_are_accepted(index):
    long = "ä" * 512
    index.add([long, np.str_("numpy")], unit(2).astype(np.float64))
    index.add(["half"], unit(1, 3).astype(np.float16))
    index.add([], np.empty((0, DIM)))
    assert index.ids() == [long, "numpy", "half"]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_k_must_be_a_whole_number_of_at_least_one(index, k):
    with pytest.raises(ConfigError, match="k must be"):
        index.search(unit(1), k=k)


def test_bad_queries_are_refused(index):
    with pytest.raises(VectorError, match=r"shape \(n, 8\) to match this index; got \(10, 128\)"):
        index.search(unit(10, dim=128))
    with pytest.raises(VectorError, match="row 1 holds NaN"):
        index.search(with_value(np.nan))
    with pytest.raises(VectorError, match="Normalise"):
        index.search(2 * unit(1)[0])


@pytest.mark.parametrize("dim", [0, -1, 1.0, "8", True, 70_000])
def test_dim_must_be_a_whole_number_in_range(tmp_path, dim):
    with pytest.raises(ConfigError, match="dim must be"):
        Index.create(tmp_path / "x.index", dim)
    assert list(tmp_path.iterdir()) == []


def test_create_refuses_what_exists_but_takes_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    Index.create(tmp_path / "empty", DIM).close()
    with pytest.raises(SearchIndexError, match="is an index already; open it"):
        Index.create(tmp_path / "empty", DIM)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(SearchIndexError, match="not empty"):
        Index.create(tmp_path / "full", DIM)
    with pytest.raises(SearchIndexError, match="not empty"):
        Index.create(tmp_path / "full" / "a.txt", DIM)
    with pytest.raises(SearchIndexError, match="cannot create"):
        Index.create(tmp_path / "no" / "folder", DIM)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_closed_index_says_so(index):
    index.close()
    index.close()
    assert "closed" in repr(index)
    for use in (index.ids, lambda: len(index), lambda: index.search(unit(1)), lambda: index.add(["a"], unit(1))):
        with pytest.raises(SearchIndexError, match="is closed; open it again"):
            use()


def test_another_model_is_refused(tmp_path):
    with Index.create(tmp_path / "a", DIM, "sha256:one") as index:
        index.require_model("sha256:one")
        with pytest.raises(ModelMismatchError, match="sha256:one, not of sha256:two"):
            index.require_model("sha256:two")
    with Index.create(tmp_path / "b", DIM) as index:
        assert index.fingerprint is None
        index.require_model("sha256:any")


# Other processes and threads


def test_a_reader_sees_a_writers_commits_without_reopening(index):
    index.add(names(3), unit(3))
    with Index.open(index.path) as reader:
        assert len(reader.search(unit(1), k=9)[0]) == 3
        index.add(names(9_000, "more"), unit(9_000, 1))  # more than one block
        assert len(reader) == 9_003
        assert reader.search(unit(9_000, 1)[8_765], k=1)[0][0].id == "more8765"
        index.remove(["more8765"])
        assert reader.search(unit(9_000, 1)[8_765], k=1)[0][0].id != "more8765"
        assert reader.check() == []


def test_a_second_writer_gets_a_clear_error_and_the_first_is_not_disturbed(index, monkeypatch):
    monkeypatch.setattr(database, "WRITER_WAIT", 0.05)
    with Index.open(index.path) as other:
        with index.transaction():
            index.add(["mine"], unit(1))
            with pytest.raises(SearchIndexError, match="another process is writing"):
                other.add(["theirs"], unit(1))
            assert other.ids() == []  # a reader is not kept waiting
        other.add(["theirs"], unit(1))
        assert index.ids() == ["mine", "theirs"]


def test_the_lock_of_a_killed_writer_does_not_survive_it(index, monkeypatch):
    monkeypatch.setattr(database, "WRITER_WAIT", 0.05)
    script = (
        "import sys, time; from vitembed.index import Index; index = Index.open(sys.argv[1])\n"
        "with index.transaction():\n"
        "    index.add(['theirs'], [[1] + [0] * 7]); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(index.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with Index.open(index.path) as other, pytest.raises(SearchIndexError, match="another process is writing"):
            other.add(["mine"], unit(1))
        process.kill()
    index.add(["mine"], unit(1))
    assert index.ids() == ["mine"]
    assert index.check() == []


def test_threads_may_share_an_index(index):
    index.add(names(200), unit(200))
    problems = []

    def work(seed):
        try:
            for step in range(10):
                index.add([f"thread{seed}-{step}"], unit(1, 100 + seed))
                if len(index.search(unit(1, seed), k=50)[0]) != 50:
                    problems.append("short")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(index) == 240


def test_importing_the_index_loads_neither_faiss_nor_torch(tmp_path):
    script = (
        "import sys; import vitembed.index as i; x = i.Index.create(sys.argv[1], 2); x.add(['a'], [[1, 0]]); "
        "assert x.get('a').vector[0] == 1; assert not {'faiss', 'torch'} & set(sys.modules); x.close()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=True, env={**os.environ})


# Damage


def damaged_calls(path):
    """Open, search and read everything; return the errors' messages."""
    messages = []
    try:
        with Index.open(path) as index:
            for use in (lambda: index.search(unit(1), k=5), lambda: index.get("id1"), index.ids):
                try:
                    use()
                except SearchIndexError as error:
                    messages.append(str(error))
    except SearchIndexError as error:
        messages.append(str(error))
    return messages


@pytest.fixture
def filled(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        index.add(names(100), unit(100), [{"n": n} for n in range(100)])
    return tmp_path / "x.index"


def test_a_truncated_or_missing_vector_file_is_an_error_on_opening(filled):
    file = vector_file(filled)
    with file.open("r+b") as stream:
        stream.truncate(99 * DIM * 4 + 3)
    with pytest.raises(SearchIndexError, match="100 rows were committed, 99 are there"):
        Index.open(filled)
    file.unlink()
    with pytest.raises(SearchIndexError, match="cannot read it"):
        Index.open(filled)


def test_a_file_truncated_under_an_open_index_is_an_error_and_no_crash(filled):
    with Index.open(filled) as index:
        index.search(unit(1))
        with vector_file(filled).open("r+b") as stream:
            stream.truncate(5)
        with pytest.raises(SearchIndexError, match="damaged"):
            index.search(unit(1))
        with pytest.raises(SearchIndexError, match="damaged"):
            index.add(["new"], unit(1))
        assert any("damaged" in problem for problem in index.check())


def test_rows_beyond_the_committed_ones_are_ignored_and_overwritten(filled):
    with vector_file(filled).open("ab") as stream:
        stream.write(b"left by a killed writer" * 10)
    with Index.open(filled) as index:
        assert len(index.search(unit(1), k=200)[0]) == 100
        index.add(["new"], unit(1, 4))
        np.testing.assert_array_equal(index.get("new").vector, unit(1, 4)[0])
        assert index.check() == []
    assert vector_file(filled).stat().st_size == 101 * DIM * 4


def test_a_flipped_bit_in_the_vectors_is_an_error_and_not_a_hit(filled):
    file = vector_file(filled)
    content = bytearray(file.read_bytes())
    content[1_234] ^= 1
    file.write_bytes(content)
    with Index.open(filled) as index:
        for use in (lambda: index.search(unit(1)), lambda: index.get("id38")):
            with pytest.raises(
                SearchIndexError, match=r"vector of 'id38' \(row 38\) does not match its checksum; remove this entry"
            ):
                use()
        assert [problem for problem in index.check() if "checksum" in problem]


def test_flipped_and_cut_catalogs_give_an_error_or_the_right_answer(filled):
    with Index.open(filled) as index:
        right = index.search(unit(1), k=5)
        everything = {name: index.get(name).metadata for name in index.ids()}
    file = filled / "catalog.sqlite"
    content = file.read_bytes()
    random = np.random.default_rng(0)
    errors = 0
    for trial in range(150):
        broken = bytearray(content)
        if trial % 10 == 0:
            del broken[int(random.integers(len(broken))) :]
        else:
            broken[int(random.integers(len(broken)))] ^= 1 << int(random.integers(8))
        file.write_bytes(broken)
        for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
            (filled / name).unlink(missing_ok=True)
        try:
            with Index.open(filled) as index:
                assert index.search(unit(1), k=5) == right
                assert everything == {name: index.get(name).metadata for name in everything}
        except (SearchIndexError, DataError):
            errors += 1
    assert 10 < errors < 150


def edit(path, sql):
    import sqlite3

    connection = sqlite3.connect(path / "catalog.sqlite")
    with connection:
        connection.execute(sql)
    connection.close()


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("UPDATE items SET id = 'wrong' WHERE id = 'id1'", "entry of row 1 does not match"),
        ("UPDATE items SET metadata = '{}' WHERE id = 'id1'", "entry of row 1 does not match"),
        ("DELETE FROM items WHERE id = 'id1'", "live"),
        ("UPDATE blocks SET bitmap = x'00'", "block 0 does not match"),
        ("UPDATE blocks SET number = 1", "block 1 does not match"),
        ("DELETE FROM blocks", "0 rows live and 100 have an entry"),
        ("INSERT INTO files VALUES ('/r', 'ghost', 1, 1, 'd', NULL)", "the file 'ghost' has no entry"),
    ],
)
def test_check_finds_what_was_changed_behind_its_back(filled, sql, message):
    edit(filled, sql)
    try:
        with Index.open(filled) as index:
            problems = index.check()
    except SearchIndexError as error:
        problems = [str(error)]
    assert any(message in problem for problem in problems), problems


def test_an_id_that_was_changed_behind_its_back_is_not_listed(filled):
    edit(filled, "UPDATE items SET id = 'another' WHERE id = 'id1'")
    with Index.open(filled) as index, pytest.raises(SearchIndexError, match="entry of row 1 does not match"):
        index.ids()


def test_an_entry_that_was_deleted_behind_the_bitmap_is_an_error_and_not_a_short_answer(filled):
    edit(filled, "DELETE FROM items WHERE id = 'id1'")
    with Index.open(filled) as index:
        with pytest.raises(SearchIndexError, match="live row 1 has no entry"):
            index.search(unit(1), k=100)
        with pytest.raises(SearchIndexError, match="others live than have an entry"):
            index.ids()
        with pytest.raises(DataError, match="not in the index"):
            index.get("id1")


def test_an_entry_that_has_strayed_to_another_row_is_an_error_and_not_another_list(filled):
    mark = database.seal(5_000, "id1", "{}")
    edit(filled, "DELETE FROM items WHERE id = 'id1'")
    edit(filled, f"INSERT INTO items VALUES (5000, 'id1', '{{}}', {mark})")
    with Index.open(filled) as index:
        for use in (index.ids, index.entries, lambda: list(index.stream())):
            with pytest.raises(SearchIndexError, match=r"others live|no entry"):
                use()
        assert any("others live" in problem for problem in index.check())


def test_settings_and_formats_that_do_not_fit_are_refused(filled, tmp_path):
    edit(filled, "PRAGMA user_version = 3")
    with pytest.raises(SearchIndexError, match="has format 3, this vitembed reads format 2; upgrade"):
        Index.open(filled)
    edit(filled, "PRAGMA user_version = 1")
    with pytest.raises(SearchIndexError, match="has the old format 1, not 2; build the index again"):
        Index.open(filled)
    edit(filled, "PRAGMA user_version = 2")
    edit(filled, "UPDATE meta SET value = '7' WHERE key = 'dim'")
    with pytest.raises(SearchIndexError, match="'dim' does not match its checksum"):
        Index.open(filled)
    edit(filled, "PRAGMA application_id = 1")
    with pytest.raises(SearchIndexError, match="is not the catalog of an index"):
        Index.open(filled)
    (filled / "catalog.sqlite").write_text("no database at all" * 100)
    with pytest.raises(SearchIndexError, match="is damaged"):
        Index.open(filled)
    with pytest.raises(SearchIndexError, match="there is no such folder"):
        Index.open(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SearchIndexError, match="has no catalog"):
        Index.open(tmp_path / "folder")


def test_a_lost_block_is_an_error(tmp_path):
    with Index.create(tmp_path / "x.index", 2) as index:
        count = 2 * blocks.BLOCK_ROWS + 1
        index.add(names(count), np.tile(np.float32([[0, 1]]), (count, 1)))
    edit(tmp_path / "x.index", "DELETE FROM blocks WHERE number = 1")
    with pytest.raises(SearchIndexError, match="lost blocks"):
        Index.open(tmp_path / "x.index")


def test_an_error_while_the_vectors_are_written_changes_nothing(filled, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Index.open(filled) as index:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(SearchIndexError, match=r"No space left.*nothing was changed"):
                index.add(["new", "id1"], unit(2, 5))
        assert index.ids() == names(100)
        index.add(["new"], unit(1, 6))
        assert index.search(unit(1, 6), k=1)[0][0].id == "new"
        assert index.check() == []


def test_a_full_disk_changes_nothing(filled):
    resource = pytest.importorskip("resource")
    script = (
        "import json, resource, signal, sys, numpy as np\n"
        "from vitembed.errors import SearchIndexError\n"
        "from vitembed.index import Index\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Index.open(sys.argv[1]) as index:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        index.add([f'n{i}' for i in range(3000)], np.eye(8, dtype='f4')[np.arange(3000) % 8])\n"
        "    except SearchIndexError as error:\n"
        "        print(json.dumps([str(error), len(index), index.check()]))\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    # Too small for the vectors; then large enough for them and too small for the catalog's log.
    for limit in (8_000, 110_000):
        command = [sys.executable, "-c", script, str(filled), str(limit)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        message, entries, problems = json.loads(output)
        assert "nothing was changed" in message
        assert (entries, problems) == (100, [])
