"""What goes out of an index and comes in: round trips, other programs' files, damaged files, interruptions."""

import json
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from vitembed.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    ModelMismatchError,
    SearchIndexError,
    VectorError,
    VitembedError,
)
from vitembed.index import Index, faiss_files, sources
from vitembed.index.transfer import (
    Imported,
    TableColumns,
    export_faiss,
    export_parquet,
    import_faiss,
    import_file,
    import_parquet,
    import_vectors,
    index_from,
)

DIM = 6
NAMES = ["b/1.jpg", "a b.jpg", "ä/猫😀.jpg", "line\u2028separator", " 007", '"quoted"']
METADATA = [{"label": "猫", "sizes": [1, 2.5, None, True], "deep": {"a": "\n"}}, {}, {"n": 2**60}, {}, {"x": 0.1}, {}]


def unit(rows, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(rows, prefix="id"):
    return [f"{prefix}{number}" for number in range(rows)]


def content(index):
    """Everything that an index holds, vectors as bytes."""
    return [(name, index.get(name).vector.tobytes(), index.get(name).metadata) for name in index.ids()]


def jsonl(path, ids):
    path.write_text("".join(json.dumps({"id": name, "metadata": {"n": n}}) + "\n" for n, name in enumerate(ids)))
    return path


def write_table(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


def lists(vectors, kind=None):
    return pa.array(list(vectors), pa.list_(kind or pa.float32()))


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", DIM, "model-1", location="runs/x") as index:
        yield index


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(sources, "ROWS", 7)


def fill(index, count):
    """Add `count` entries under difficult names, some replaced and some removed on the way."""
    ids = [*NAMES, *names(200)][:count]
    metadata = [*METADATA, *({"n": n} for n in range(200))][:count]
    index.add([*ids, "gone"], unit(count + 1), [*metadata, None])
    index.remove(["gone"])
    if count > 1:
        index.add(ids[:1], unit(1, seed=9), [{"replaced": True}])
    return ids


# Round trips


@pytest.mark.parametrize("count", [0, 1, 6, 7, 50])
@pytest.mark.parametrize("form", ["parquet", "faiss"])
def test_export_then_import_gives_the_same_ids_vectors_and_metadata(tmp_path, index, small_batches, form, count):
    fill(index, count)
    out = tmp_path / ("x.parquet" if form == "parquet" else "x-faiss")
    export = export_parquet if form == "parquet" else export_faiss
    assert export(index, out) == count
    assert index_from(out, tmp_path / "y.index") == Imported(count)
    with Index.open(tmp_path / "y.index") as copy:
        assert content(copy) == content(index)
        assert copy.check() == []
        assert (copy.dim, copy.fingerprint, copy.location) == (DIM, "model-1", "runs/x")


@pytest.mark.parametrize("form", ["parquet", "faiss"])
def test_an_index_of_float16_comes_back_as_one(tmp_path, small_batches, form):
    out = tmp_path / ("x.parquet" if form == "parquet" else "x-faiss")
    with Index.create(tmp_path / "half.index", DIM, dtype="float16") as half:
        fill(half, 20)
        (export_parquet if form == "parquet" else export_faiss)(half, out)
        index_from(out, tmp_path / "copy.index")
        with Index.open(tmp_path / "copy.index") as copy:
            assert (copy.dtype, copy.fingerprint, copy.location) == ("float16", None, None)
            assert content(copy) == content(half)


def test_parquet_is_what_pyarrow_reads_without_us(tmp_path, index, small_batches):
    fill(index, 20)
    export_parquet(index, tmp_path / "x.parquet")
    file = parquet.ParquetFile(tmp_path / "x.parquet")
    assert file.num_row_groups >= 3
    assert file.schema_arrow.field("vector").type == pa.list_(pa.float32(), DIM)
    table = file.read()
    assert table.column("id").to_pylist() == index.ids()
    assert [json.loads(text) for text in table.column("metadata").to_pylist()] == [row[2] for row in content(index)]
    about = json.loads(table.schema.metadata[b"vitembed"])
    assert about == {
        "format": 1,
        "dim": DIM,
        "fingerprint": "model-1",
        "location": "runs/x",
        "dtype": "float32",
    }
    file.close()


def test_plain_faiss_finds_in_the_export_what_the_index_finds(tmp_path, index, small_batches):
    fill(index, 60)
    export_faiss(index, tmp_path / "out")
    written = ["README.txt", "ids.jsonl", "index.faiss", "index.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    plain = faiss.read_index(str(tmp_path / "out" / "index.faiss"))
    assert (type(plain), plain.ntotal, plain.d, plain.is_trained) == (faiss.IndexFlatIP, 60, DIM, True)
    lines = (tmp_path / "out" / "ids.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    entries = [json.loads(line) for line in lines]
    queries = unit(15, seed=3)
    scores, rows = plain.search(queries, 8)
    for hits, row, score in zip(index.search(queries, k=8), rows, scores, strict=True):
        assert [(hit.id, hit.metadata) for hit in hits] == [(entries[n]["id"], entries[n]["metadata"]) for n in row]
        np.testing.assert_allclose([hit.score for hit in hits], score, atol=1e-6)
    readme = (tmp_path / "out" / "README.txt").read_text(encoding="utf-8")
    assert readme.count("\n") == 4
    assert "60 vectors of 6" in readme
    assert '{"id": ..., "metadata": ...}' in readme
    assert "model-1" in readme


def test_the_flat_file_is_the_one_that_faiss_writes(tmp_path, index):
    index.add(names(5), unit(5))
    export_faiss(index, tmp_path / "out")
    theirs = faiss.IndexFlatIP(DIM)
    theirs.add(unit(5))
    assert (tmp_path / "out" / "index.faiss").read_bytes() == faiss.serialize_index(theirs).tobytes()


# Exports appear whole


def test_an_export_replaces_nothing_unasked(tmp_path, index):
    fill(index, 3)
    export_parquet(index, tmp_path / "x.parquet")
    export_faiss(index, tmp_path / "out")
    before = (tmp_path / "x.parquet").read_bytes()
    index.remove([NAMES[1]])
    for export, path in ((export_parquet, "x.parquet"), (export_faiss, "out")):
        with pytest.raises(ConfigError, match=r"exists; .*--overwrite"):
            export(index, tmp_path / path)
    assert (tmp_path / "x.parquet").read_bytes() == before
    for export, path in ((export_parquet, "x.parquet"), (export_faiss, "out")):
        assert export(index, tmp_path / path, overwrite=True) == 2
        index_from(tmp_path / path, tmp_path / f"{path}.index")
        with Index.open(tmp_path / f"{path}.index") as copy:
            assert content(copy) == content(index)


def test_overwriting_never_removes_a_folder_of_others(tmp_path, index):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    for place in ("photos", "x.index"):
        with pytest.raises(ConfigError, match="no folder that a FAISS export wrote"):
            export_faiss(index, tmp_path / place, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="no folder that a FAISS export wrote"):
        export_faiss(index, tmp_path / "file", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export_faiss(index, tmp_path / "empty") == 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("export", "name"), [(export_parquet, "x.parquet"), (export_faiss, "out")])
def test_a_failing_export_leaves_what_was_there(tmp_path, index, small_batches, monkeypatch, export, name, overwrite):
    fill(index, 30)
    if overwrite:
        export(index, tmp_path / name)
    before = {path: path.read_bytes() for path in (tmp_path / name, *(tmp_path / name).rglob("*")) if path.is_file()}
    whole = index.stream

    def broken(size):
        yield next(whole(size))
        raise SearchIndexError("a block is damaged")

    monkeypatch.setattr(index, "stream", broken)
    with pytest.raises(SearchIndexError, match="a block is damaged"):
        export(index, tmp_path / name, overwrite=overwrite)
    after = {path: path.read_bytes() for path in (tmp_path / name, *(tmp_path / name).rglob("*")) if path.is_file()}
    assert after == before
    assert bool(before) == overwrite
    assert {path.name for path in tmp_path.iterdir()} == {"x.index", *([name] if overwrite else [])}


@pytest.mark.parametrize(("export", "name"), [(export_parquet, "x.parquet"), (export_faiss, "out")])
def test_an_export_to_a_place_that_cannot_be_is_one_line(tmp_path, index, export, name):
    with pytest.raises(VitembedError, match="cannot write") as caught:
        export(index, tmp_path / "missing" / name)
    assert "\n" not in str(caught.value)


def test_a_renamed_export_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, index, monkeypatch):
    fill(index, 2)
    export_faiss(index, tmp_path / "out")
    rename = Path.rename

    def fail(self, target):
        if (self / "index.faiss").exists() and not self.name.endswith("-old") and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(VitembedError, match="Input/output error"):
        export_faiss(index, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.index"]
    assert (tmp_path / "out" / "index.faiss").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_export_killed_anywhere_leaves_the_earlier_one_or_the_new_one_after_the_next(tmp_path, index, step):
    fill(index, 2)
    export_faiss(index, tmp_path / "out")
    earlier = (tmp_path / "out" / "index.faiss").read_bytes()
    index.add(["new"], unit(1, 4))
    code = (
        "import os, sys, pathlib, shutil\n"
        "from vitembed.index import Index\n"
        "from vitembed.index.exports import export_faiss\n"
        "calls, rename, rmtree = [], pathlib.Path.rename, shutil.rmtree\n"
        "def count():\n"
        "    calls.append(0)\n"
        "    len(calls) == int(sys.argv[3]) and os.kill(os.getpid(), 9)\n"
        "def renaming(self, target):\n"
        "    count()\n"  # 1: the new one is written, and 2: the earlier one is moved
        "    return rename(self, target)\n"
        "def removing(path, **options):\n"
        "    count()\n"  # 3: the new one has its name
        "    rmtree(path, **options)\n"
        "pathlib.Path.rename, shutil.rmtree = renaming, removing\n"
        "export_faiss(Index.open(sys.argv[1]), sys.argv[2], overwrite=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, index.path, tmp_path / "out", str(step)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "out").exists() == (step != 2)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert len(left) == (2 if step == 2 else 1)
    (tmp_path / f"{left[0]}.mine").mkdir()
    (tmp_path / ".out-01234567").mkdir()
    (tmp_path / ".out-01234567" / "index.jpg").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_faiss(index, tmp_path / "out")
    now = (tmp_path / "out" / "index.faiss").read_bytes()
    assert (now == earlier) == (step != 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x.index", "out", f"{left[0]}.mine", ".out-01234567"}  # what others have made stays
    assert (tmp_path / ".out-01234567" / "index.jpg").read_text() == "mine"
    assert export_faiss(index, tmp_path / "out", overwrite=True) == 3


# Parquet of others


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("form", ["list", "large", "fixed"])
def test_a_foreign_table_of_any_list_of_floats_comes_in(tmp_path, index, small_batches, kind, form):
    vectors = unit(20).astype(kind.to_pandas_dtype())
    kinds = {"list": pa.list_(kind), "large": pa.large_list(kind), "fixed": pa.list_(kind, DIM)}
    path = write_table(tmp_path / "t.parquet", id=names(20), vector=pa.array(list(vectors), kinds[form]))
    assert import_parquet(index, path) == Imported(20)
    assert index.ids() == names(20)
    stored = np.stack([index.get(name).vector for name in names(20)])
    np.testing.assert_array_equal(stored, vectors.astype(np.float32))


def test_named_columns_numbers_as_ids_and_other_columns_as_metadata(tmp_path, index):
    path = write_table(
        tmp_path / "t.parquet",
        key=pa.array([7, 8, 9]),
        embedding=lists(unit(3)),
        label=pa.array(["猫", None, "dog"]).dictionary_encode(),
        price=pa.array([1.5, float("nan"), None]),
        half=pa.array(np.float16([0.5, 1, 2])),
        ok=[True, False, None],
        day=pa.array([0, 1, None], pa.date32()),
        at=pa.array([0, 1_500_000, None], pa.timestamp("us")),
        nothing=pa.nulls(3),
        blob=[b"x", b"y", b"z"],
        tags=[["a"], [], None],
    )
    done = import_parquet(index, path, TableColumns("key", "embedding"))
    assert done == Imported(3, ("blob", "tags"))
    assert index.ids() == ["7", "8", "9"]
    first, second, third = (index.get(name).metadata for name in index.ids())
    plain = {"label": "猫", "price": 1.5, "half": 0.5, "ok": True, "nothing": None}
    assert {key: first[key] for key in plain} == plain
    assert set(first) == {*plain, "day", "at"}
    assert (first["day"], first["at"][:19]) == ("1970-01-01", "1970-01-01 00:00:00")
    assert (second["label"], second["price"], second["at"][:21]) == (None, None, "1970-01-01 00:00:01.5")
    assert third == dict.fromkeys(third) | {"label": "dog", "half": 2.0}


def test_metadata_may_be_json_or_a_struct_and_then_other_columns_are_named_as_left_out(tmp_path, index):
    path = write_table(
        tmp_path / "t.parquet",
        id=["a", "b"],
        vector=lists(unit(2)),
        metadata=['{"x": 1}', None],
        info=[{"y": 2}, {"y": None}],
    )
    assert import_parquet(index, path) == Imported(2, ("info",))
    assert [index.get(name).metadata for name in ("a", "b")] == [{"x": 1}, {}]
    assert import_parquet(index, path, TableColumns(metadata="info")) == Imported(2, ("metadata",))
    assert [index.get(name).metadata for name in ("a", "b")] == [{"y": 2}, {"y": None}]


def test_known_ids_are_replaced_and_others_stay(tmp_path, index):
    index.add(["old", "both"], unit(2), [{"from": "index"}] * 2)
    path = write_table(tmp_path / "t.parquet", id=["both", "new"], vector=lists(unit(2, 5)))
    assert import_parquet(index, path).rows == 2
    assert index.ids() == ["old", "both", "new"]
    assert [index.get(name).metadata for name in index.ids()] == [{"from": "index"}, {}, {}]
    np.testing.assert_array_equal(index.get("both").vector, unit(2, 5)[0])


def changed(row, value):
    vectors = unit(20).astype(np.float64)
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("columns", "kind", "words"),
    [
        ({"id": [*names(19), "id3"]}, DataError, "'id3' comes twice, in rows 4 and 20"),
        ({"id": [*names(19), ""]}, DataError, "row 20: the id '' is empty"),
        ({"id": [*names(19), None]}, DataError, "row 20: the id None must be a string"),
        ({"id": [*names(19), "a\tb"]}, DataError, "row 20: the id .* holds control characters"),
        ({"id": [0.5] * 20}, DataError, "row 1: the id 0.5 must be a string; got float"),
        ({"vector": lists(changed(15, 0))}, VectorError, "row 16: the vector of 'id15' is all zeros"),
        ({"vector": lists(changed(15, np.nan))}, VectorError, "row 16: the vector of 'id15' holds NaN"),
        ({"vector": lists(changed(15, 1e300), pa.float64())}, VectorError, "row 16: .*'id15'"),
        ({"vector": lists(changed(15, 2))}, VectorError, "'id15' has length 4.899 and not 1; .*--normalise"),
        (
            {"vector": lists([*unit(19), unit(1, dim=5)[0]])},
            VectorError,
            "row 20: the vector has 5 numbers instead of 6",
        ),
        ({"vector": lists([*unit(19), None])}, VectorError, "row 20: the vector has 0 numbers"),
        ({"vector": lists([*unit(19), [None, *[0.5] * 5]])}, VectorError, "row 20: a number of the vector is missing"),
        ({"vector": pa.array([["a"]] * 20)}, DataError, "must hold lists of numbers; it holds list<.*string>"),
        ({"vector": names(20)}, DataError, "must hold lists of numbers; it holds string"),
        ({"metadata": ["{}"] * 15 + ["[1]"] * 5}, DataError, r"row 16: expected a JSON object; got '\[1\]'"),
        ({"metadata": ["{}"] * 15 + ["{"] * 5}, DataError, "row 16: expected a JSON object; got '{'"),
        ({"metadata": [[1]] * 20}, DataError, "row 1: metadata must be a JSON object or a struct"),
        ({"metadata": ['{"x": NaN}'] * 20}, DataError, "metadata of 'id0' cannot be written as JSON"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_imported(tmp_path, index, small_batches, columns, kind, words):
    index.add(["old", "id3"], unit(2))
    before = content(index)
    path = write_table(tmp_path / "t.parquet", **{"id": names(20), "vector": lists(unit(20)), **columns})
    with pytest.raises(kind, match=words) as caught:
        import_parquet(index, path)
    assert "\n" not in str(caught.value)
    assert content(index) == before
    with pytest.raises(kind, match=words):
        index_from(path, tmp_path / "new.index")
    assert not (tmp_path / "new.index").exists()


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 5)])
@pytest.mark.parametrize("rows", [0, 20])
def test_vectors_of_another_width_are_refused(tmp_path, index, kind, rows):
    vectors = pa.array(list(unit(rows, dim=5)), kind)
    path = write_table(tmp_path / "t.parquet", id=pa.array(names(rows), pa.string()), vector=vectors)
    if rows or pa.types.is_fixed_size_list(kind):
        with pytest.raises(VectorError, match="has vectors of 5, the index takes 6"):
            import_parquet(index, path)
    else:
        assert import_parquet(index, path) == Imported(0)  # nothing has no width
    assert len(index) == 0


@pytest.mark.parametrize("rows", [0, 3])
def test_vectors_of_no_numbers_are_refused(tmp_path, index, rows):
    np.save(tmp_path / "v.npy", np.ones((rows, 0)))
    jsonl(tmp_path / "ids.jsonl", names(rows))
    with pytest.raises(VectorError, match="has vectors of 0, the index takes 6"):
        import_vectors(index, tmp_path / "v.npy", tmp_path / "ids.jsonl")
    with pytest.raises(DataError, match="how wide its vectors are"):
        index_from(tmp_path / "v.npy", tmp_path / "n.index", tmp_path / "ids.jsonl")
    empty = pa.array([[]] * rows, pa.list_(pa.float32()))
    path = write_table(tmp_path / "t.parquet", id=pa.array(names(rows), pa.string()), vector=empty)
    with pytest.raises(DataError, match="how wide its vectors are"):
        index_from(path, tmp_path / "n.index")
    assert not (tmp_path / "n.index").exists()


def test_columns_that_are_missing_or_there_twice_are_named(tmp_path, index):
    path = write_table(tmp_path / "t.parquet", key=["a"], vector=lists(unit(1)))
    with pytest.raises(DataError, match=r"lacks the column 'id'; it has key, vector.*--id-column"):
        import_parquet(index, path)
    with pytest.raises(DataError, match=r"lacks the column 'emb'.*--vector-column"):
        import_parquet(index, path, TableColumns("key", "emb"))
    with pytest.raises(DataError, match=r"lacks the column 'about'.*--metadata-column"):
        import_parquet(index, path, TableColumns("key", metadata="about"))
    with pytest.raises(ConfigError, match="a column each"):
        import_parquet(index, path, TableColumns("key", "key"))
    twice = pa.table([pa.array(["a"]), pa.array(["b"]), lists(unit(1))], ["id", "id", "vector"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="the column 'id' twice"):
        import_parquet(index, tmp_path / "twice.parquet")


def test_normalise_scales_to_unit_length(tmp_path, index):
    vectors = unit(5).astype(np.float64) * [[1e-30], [1e30], [3], [1], [0.2]]
    path = write_table(tmp_path / "t.parquet", id=names(5), vector=lists(vectors, pa.float64()))
    import_parquet(index, path, normalise=True)
    stored = np.stack([index.get(name).vector for name in names(5)])
    np.testing.assert_allclose(stored, unit(5), atol=1e-6)
    zero = write_table(tmp_path / "zero.parquet", id=["z"], vector=lists(np.zeros((1, DIM))))
    with pytest.raises(VectorError, match="row 1: the vector of 'z' is all zeros"):
        import_parquet(index, zero, normalise=True)


def test_another_models_vectors_are_refused(tmp_path, index):
    fill(index, 2)
    export_parquet(index, tmp_path / "x.parquet")
    export_faiss(index, tmp_path / "out")
    for name in ("x.parquet", "out"):
        with Index.create(tmp_path / f"other {name}", DIM, "model-2") as other:
            with pytest.raises(ModelMismatchError, match=r"model-2.*model-1"):
                import_file(other, tmp_path / name)
            assert len(other) == 0
        with Index.create(tmp_path / f"unnamed {name}", DIM) as unnamed:
            assert import_file(unnamed, tmp_path / name).rows == 2


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (b"{", "does not name a model"),
        (b"[1]", "does not name a model"),
        (b'{"format": 1, "fingerprint": 5}', "does not name a model"),
        (b"\xff", "does not name a model"),
        (b'{"format": 1, "location": []}', "does not name a model"),
        (b'{"format": 1, "dtype": "float8"}', "does not name a model"),
        (b'{"format": 1, "dim": 7}', "vectors of 6, and .* says 7"),
        (b'{"format": 2, "fingerprint": "a"}', "has format 2, this vitembed reads 1; upgrade"),
    ],
)
def test_a_note_on_the_model_that_is_damaged_or_newer_is_an_error(tmp_path, index, about, words):
    table = pa.table({"id": ["a"], "vector": lists(unit(1))}).replace_schema_metadata({b"vitembed": about})
    parquet.write_table(table, tmp_path / "t.parquet")
    fill(index, 3)
    export_faiss(index, tmp_path / "out")
    (tmp_path / "out" / "index.json").write_bytes(about)
    before = content(index)
    for name in ("t.parquet", "out"):
        with pytest.raises(DataError, match=words) as caught:
            import_file(index, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert content(index) == before


def test_a_folder_of_an_earlier_version_has_no_note_and_comes_in(tmp_path, index):
    fill(index, 3)
    export_faiss(index, tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    index_from(tmp_path / "out", tmp_path / "new.index")
    with Index.open(tmp_path / "new.index") as copy:
        assert content(copy) == content(index)
        assert (copy.fingerprint, copy.dtype) == (None, "float32")
    assert export_faiss(index, tmp_path / "out", overwrite=True) == 3


def test_damaged_parquet_is_an_error_or_right_and_never_a_wrong_entry(tmp_path, index, small_batches):
    fill(index, 20)
    export_parquet(index, tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    expected = content(index)
    rng = np.random.default_rng(0)
    refused = 0
    for n in range(60):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "d.parquet").write_bytes(damaged if n % 3 else data[: int(rng.integers(len(data)))])
        try:
            index_from(tmp_path / "d.parquet", tmp_path / f"{n}.index")
        except VitembedError:
            refused += 1
            assert not (tmp_path / f"{n}.index").exists()
        else:
            with Index.open(tmp_path / f"{n}.index") as copy:
                assert content(copy) == expected
    assert refused > 30


def test_parquet_without_pyarrow_names_the_extra(tmp_path, index, monkeypatch):
    path = write_table(tmp_path / "t.parquet", id=["a"], vector=lists(unit(1)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"vitembed\[parquet\]"):
        import_parquet(index, path)
    with pytest.raises(MissingExtraError, match=r"vitembed\[parquet\]"):
        export_parquet(index, tmp_path / "out.parquet")


# NumPy


def test_a_numpy_file_comes_in_under_lines_of_ids(tmp_path, index, small_batches):
    np.save(tmp_path / "v.npy", unit(26).astype(">f8"))
    ids = [*NAMES, *names(20)]
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(ids).encode())
    assert import_vectors(index, tmp_path / "v.npy", tmp_path / "ids.txt") == Imported(26)
    assert index.ids() == ids
    np.testing.assert_array_equal(np.concatenate([batch.vectors for batch in index.stream()]), unit(26))
    import_file(index, tmp_path / "v.npy", jsonl(tmp_path / "ids.jsonl", ids))
    assert [index.get(name).metadata for name in ids] == [{"n": n} for n in range(26)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\n", "has 2 ids and .* has 3 vectors"),
        ("a\nb\nc\nd", "has 4 ids and .* has 3 vectors"),
        ("a\n\nc", "row 2: the id '' is empty"),
        ("a\nb\na", "'a' comes twice, in rows 1 and 3"),
        ("", "has 0 ids"),
        ("a\nb\n\udcff", "cannot be read"),
    ],
)
def test_ids_that_do_not_fit_are_named(tmp_path, index, text, words):
    np.save(tmp_path / "v.npy", unit(3))
    (tmp_path / "ids.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=words):
        import_vectors(index, tmp_path / "v.npy", tmp_path / "ids.txt")
    assert len(index) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "b", "meta": {}}', "row 2: expected .* got the keys"),
        ('{"metadata": {}}', "row 2: expected .* got the keys"),
        ('{"id": 5}', "row 2: the id 5 must be a string"),
        ('{"id": []}', "row 2: the id .* must be a string"),
        ('{"id": "b", "metadata": [1]}', "row 2: metadata must be a JSON object"),
        ("b", "row 2: expected a JSON object; got 'b'"),
        ("[" * 100_000, "row 2: expected a JSON object"),
    ],
)
def test_lines_of_json_that_do_not_fit_are_named(tmp_path, index, line, words):
    np.save(tmp_path / "v.npy", unit(2))
    (tmp_path / "ids.jsonl").write_text(f'{{"id": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=words):
        import_vectors(index, tmp_path / "v.npy", tmp_path / "ids.jsonl")
    assert len(index) == 0


def test_what_is_no_array_of_vectors_is_refused(tmp_path, index):
    ids = jsonl(tmp_path / "ids.jsonl", ["a"])
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "object.npy", np.array([[{}]], object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=unit(1))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    np.save(tmp_path / "cut.npy", unit(9))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    (tmp_path / "empty.npy").touch()
    for name in ("flat", "text", "object", "many", "cut", "empty", "missing"):
        with pytest.raises(DataError, match=f"{name}.npy") as caught:
            import_vectors(index, tmp_path / f"{name}.npy", ids)
        assert "\n" not in str(caught.value)
    np.save(tmp_path / "ok.npy", unit(1))
    with pytest.raises(ConfigError, match="--ids"):
        import_file(index, tmp_path / "ok.npy")
    with pytest.raises(DataError, match=r"no-ids\.txt cannot be read \(No such file"):
        import_vectors(index, tmp_path / "ok.npy", tmp_path / "no-ids.txt")


# FAISS


def faiss_file(path, kind, metric=faiss.METRIC_INNER_PRODUCT, rows=40):
    made = faiss.index_factory(DIM, kind, metric)
    made.train(unit(rows))
    made.add(unit(rows))
    faiss.write_index(made, str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "metric", "tolerance"),
    [
        ("Flat", faiss.METRIC_INNER_PRODUCT, 0),
        ("Flat", faiss.METRIC_L2, 0),
        ("Flat", faiss.METRIC_L1, 0),
        ("IVF2,Flat", faiss.METRIC_INNER_PRODUCT, 0),
        ("HNSW4", faiss.METRIC_L2, 0),
        ("SQfp16", faiss.METRIC_INNER_PRODUCT, 1e-3),
    ],
)
def test_any_faiss_index_that_reconstructs_comes_in(tmp_path, index, small_batches, kind, metric, tolerance):
    path = faiss_file(tmp_path / "f.index", kind, metric)
    done = import_faiss(index, path, jsonl(tmp_path / "ids.jsonl", names(40)), normalise=tolerance > 0)
    assert done.rows == 40
    assert index.ids() == names(40)
    stored = np.concatenate([batch.vectors for batch in index.stream()])
    np.testing.assert_allclose(stored, unit(40), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("hidden", "words"), [(False, "an IndexIDMap gives its own numbers"), (True, "reconstruct not implemented")]
)
def test_a_faiss_index_that_does_not_say_which_vector_is_whose_is_refused(tmp_path, index, hidden, words):
    numbered = faiss.IndexIDMap(faiss.IndexFlatIP(DIM))
    numbered.add_with_ids(unit(40), np.arange(40) * 10)
    made = faiss.IndexPreTransform(faiss.NormalizationTransform(DIM), numbered) if hidden else numbered
    made.ntotal = 40
    faiss.write_index(made, str(tmp_path / "f.index"))
    with pytest.raises(DataError, match=rf"FAISS cannot give back the vectors of .*f\.index: {words}"):
        import_faiss(index, tmp_path / "f.index", jsonl(tmp_path / "ids.jsonl", names(40)))
    assert len(index) == 0


def test_a_damaged_flat_file_is_refused_whatever_its_header_says(tmp_path, index):
    ids = jsonl(tmp_path / "ids.jsonl", names(40))
    data = faiss_file(tmp_path / "f.index", "Flat").read_bytes()
    header = [bytearray(data) for _ in range(37 + 8)]
    for position, damaged in enumerate(header):
        damaged[position] ^= 0x80
    unused = {*range(16, 33)}  # two numbers and a flag that FAISS itself does not use
    cases = [damaged for position, damaged in enumerate(header) if position not in unused]
    for damaged in [*cases, data[:-1], data[:44], data[:3], b"", data + b"\0"]:
        (tmp_path / "d.index").write_bytes(damaged)
        with pytest.raises((DataError, VectorError)) as caught:
            import_faiss(index, tmp_path / "d.index", ids)
        assert "\n" not in str(caught.value)
    assert len(index) == 0


@pytest.mark.parametrize("kind", ["IVF2,Flat", "HNSW4"])
def test_a_damaged_structure_is_an_error_and_does_not_end_this_process(tmp_path, index, kind):
    ids = jsonl(tmp_path / "ids.jsonl", names(40))
    data = faiss_file(tmp_path / "f.index", kind).read_bytes()
    huge = bytearray(data)
    huge[8:16] = (2**40).to_bytes(8, "little")  # the number of vectors
    for damaged in (data[: len(data) // 2], bytes(huge), data[:45]):
        (tmp_path / "d.index").write_bytes(damaged)
        with pytest.raises(DataError, match=r"d\.index") as caught:
            import_faiss(index, tmp_path / "d.index", ids)
        assert "\n" not in str(caught.value)
    assert len(index) == 0


def test_a_child_process_that_dies_is_an_error(tmp_path, index, small_batches, monkeypatch):
    path = faiss_file(tmp_path / "f.index", "SQfp16")
    ids = jsonl(tmp_path / "ids.jsonl", names(40))
    # What a crash after two batches of seven rows looks like from here.
    sent = "import os, struct, sys; sys.stdout.buffer.write(struct.pack('<qq', 40, 6) + {!r}); sys.stdout.flush()"
    program = sent.format(unit(15).tobytes()) + "; os.abort()"
    monkeypatch.setattr(faiss_files, "_CHILD", program)
    with pytest.raises(DataError, match="it ended with -6"):
        import_faiss(index, path, ids)
    assert len(index) == 0


def test_what_is_no_faiss_file_is_refused(tmp_path, index):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" * 50)
    with pytest.raises(DataError, match="is no FAISS index"):
        import_file(index, tmp_path / "photo.jpg", tmp_path / "ids.txt")
    with pytest.raises(DataError, match=r"a folder without index\.faiss"):
        import_file(index, tmp_path)
    with pytest.raises(DataError, match="No such file"):
        import_file(index, tmp_path / "missing.faiss", tmp_path / "ids.txt")
    with pytest.raises(ConfigError, match="--ids"):
        import_faiss(index, faiss_file(tmp_path / "f.index", "Flat"))


def test_options_that_do_not_go_with_a_file_are_refused(tmp_path, index):
    with pytest.raises(ConfigError, match="holds its ids itself"):
        import_file(index, tmp_path / "t.parquet", tmp_path / "ids.txt")
    with pytest.raises(ConfigError, match="has no columns"):
        import_file(index, tmp_path / "v.npy", tmp_path / "ids.txt", TableColumns(id="key"))


# All or nothing


@pytest.mark.parametrize("kind", ["parquet", "npy", "faiss"])
def test_an_exception_in_the_middle_changes_nothing(tmp_path, index, small_batches, monkeypatch, kind):
    fill(index, 3)
    before = content(index)
    with Index.create(tmp_path / "s.index", DIM) as source:
        source.add(names(40), unit(40))
        export_parquet(source, tmp_path / "t.parquet")
        export_faiss(source, tmp_path / "out")
    np.save(tmp_path / "v.npy", unit(40))
    ids = jsonl(tmp_path / "ids.jsonl", names(40)) if kind == "npy" else None
    path = tmp_path / {"parquet": "t.parquet", "npy": "v.npy", "faiss": "out"}[kind]
    add, calls = index.add, []

    def failing(*arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(index, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        import_file(index, path, ids)
    assert calls == [7, 7, 7, 7]
    assert content(index) == before
    assert index.check() == []


def test_a_kill_in_the_middle_changes_nothing(tmp_path, index):
    fill(index, 3)
    before = content(index)
    write_table(tmp_path / "t.parquet", id=names(40), vector=lists(unit(40)))
    code = (
        "import os, sys\n"
        "from vitembed.index import Index, sources, transfer\n"
        "sources.ROWS, add, calls = 7, Index.add, []\n"
        "def failing(*arguments):\n"
        "    calls.append(add(*arguments))\n"
        "    len(calls) == 4 and os.kill(os.getpid(), 9)\n"
        "Index.add = failing\n"
        "if len(sys.argv) == 3: transfer.import_parquet(Index.open(sys.argv[1]), sys.argv[2])\n"
        "else: transfer.index_from(sys.argv[2], sys.argv[3])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, index.path, tmp_path / "t.parquet"], check=False)
    assert killed.returncode == -9
    assert content(index) == before
    killed = subprocess.run([sys.executable, "-c", code, "", tmp_path / "t.parquet", tmp_path / "n.index"], check=False)
    assert killed.returncode == -9
    with Index.open(tmp_path / "n.index") as again:  # empty, and an import goes on from there
        assert len(again) == 0
        assert import_parquet(again, tmp_path / "t.parquet").rows == 40
        assert again.ids() == names(40)


def test_a_new_index_needs_a_free_place_and_a_width(tmp_path, index):
    fill(index, 2)
    before = content(index)
    path = write_table(tmp_path / "t.parquet", id=["a"], vector=lists(unit(1)))
    with pytest.raises(SearchIndexError, match="is an index already"):
        index_from(path, index.path)
    assert content(index) == before
    nothing = write_table(tmp_path / "none.parquet", id=pa.array([], pa.string()), vector=lists([]))
    with pytest.raises(DataError, match="does not say how wide its vectors are"):
        index_from(nothing, tmp_path / "n.index")
    assert not (tmp_path / "n.index").exists()
    assert import_parquet(index, nothing) == Imported(0)


def test_an_empty_folder_becomes_the_index_or_is_empty_again(tmp_path, index):
    (tmp_path / "mine").mkdir()
    bad = write_table(tmp_path / "bad.parquet", id=["a"], vector=lists(unit(1) * 3))
    with pytest.raises(VectorError, match="has length 3"):
        index_from(bad, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    good = write_table(tmp_path / "good.parquet", id=["a"], vector=lists(unit(1)))
    assert index_from(good, tmp_path / "mine").rows == 1
    with Index.open(tmp_path / "mine") as made:
        assert made.ids() == ["a"]
