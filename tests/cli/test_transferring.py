"""`vitembed index export` and `import`: thin, one JSON document, one line for an error."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import typer
from pyarrow import parquet

from tests.conftest import Runner
from vitembed.cli import transferring
from vitembed.index import Index

DIM = 4
VECTORS = np.eye(DIM, dtype=np.float32)
NAMES = ["a.jpg", "ä b.jpg", "猫😀", "d"]


@pytest.fixture(autouse=True)
def two_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an application of these two commands in the place of the whole."""
    group = typer.Typer()
    group.command("export")(transferring.export_index)
    group.command("import")(transferring.import_index)
    app = typer.Typer(no_args_is_help=True, add_completion=False)
    app.callback()(lambda: None)
    app.add_typer(group, name="index")
    monkeypatch.setattr("vitembed.cli.app.app", app)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    with Index.create(tmp_path / "photos.index", DIM, "model-1") as index:
        index.add(NAMES, VECTORS, [{"n": n} for n in range(4)])
    return tmp_path / "photos.index"


def content(path: Path) -> list[tuple[str, bytes, object]]:
    with Index.open(path) as index:
        return [(name, index.get(name).vector.tobytes(), index.get(name).metadata) for name in index.ids()]


@pytest.mark.parametrize(("out", "form"), [("x.parquet", "parquet"), ("X.PARQUET", "parquet"), ("x-faiss", "faiss")])
def test_what_is_exported_makes_the_same_index(cli: Runner, photos: Path, tmp_path: Path, out: str, form: str) -> None:
    outcome = cli("index", "export", photos, tmp_path / out, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.json == {"index": str(photos), "out": str(tmp_path / out), "format": form, "rows": 4}
    assert (tmp_path / out).is_dir() == (form == "faiss")
    outcome = cli("index", "import", tmp_path / "copy.index", tmp_path / out, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    made = {"index": str(tmp_path / "copy.index"), "imported": 4, "size": 4, "dim": DIM, "left_out": []}
    assert outcome.json == made
    assert content(tmp_path / "copy.index") == content(photos)


def test_an_existing_index_takes_the_entries_in_addition(cli: Runner, photos: Path, tmp_path: Path) -> None:
    cli("index", "export", photos, tmp_path / "x.parquet")
    with Index.create(tmp_path / "more.index", DIM) as index:
        index.add(["other", "d"], VECTORS[:2])
    outcome = cli("index", "import", tmp_path / "more.index", tmp_path / "x.parquet")
    assert outcome.status == 0, outcome.err
    assert [line.split() for line in outcome.out.splitlines()[1:]] == [["imported", "4"], ["size", "5"], ["dim", "4"]]
    assert [row[0] for row in content(tmp_path / "more.index")] == ["other", *NAMES]


@pytest.mark.parametrize("out", ["x.parquet", "x-faiss"])
def test_an_existing_export_is_replaced_only_when_asked(cli: Runner, photos: Path, tmp_path: Path, out: str) -> None:
    assert cli("index", "export", photos, tmp_path / out).status == 0
    outcome = cli("index", "export", photos, tmp_path / out)
    assert (outcome.status, outcome.out) == (2, "")
    assert "--overwrite" in outcome.err
    assert outcome.err.count("\n") == 1
    with Index.open(photos) as index:
        index.remove(["d"])
    assert cli("index", "export", photos, tmp_path / out, "--overwrite", "--json").json["rows"] == 3


def test_an_empty_folder_is_imported_into_and_stays_after_an_error(cli: Runner, photos: Path, tmp_path: Path) -> None:
    cli("index", "export", photos, tmp_path / "x-faiss")
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "v.npy", VECTORS * 3)
    (tmp_path / "ids.txt").write_text("\n".join(NAMES), encoding="utf-8")
    failed = cli("index", "import", tmp_path / "mine", tmp_path / "v.npy", "--ids", tmp_path / "ids.txt")
    assert (failed.status, failed.err.count("\n")) == (2, 1)
    assert list((tmp_path / "mine").iterdir()) == []
    done = cli("index", "import", tmp_path / "mine", tmp_path / "x-faiss")
    assert done.status == 0, done.err
    assert content(tmp_path / "mine") == content(photos)


def test_vectors_of_numpy_come_with_a_file_of_ids(cli: Runner, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS * 3)
    (tmp_path / "ids.txt").write_text("\n".join(NAMES), encoding="utf-8")
    arguments = ["index", "import", tmp_path / "new.index", tmp_path / "v.npy"]
    without_ids = cli(*arguments)
    assert (without_ids.status, without_ids.err.count("\n")) == (2, 1)
    assert "--ids" in without_ids.err
    too_long = cli(*arguments, "--ids", tmp_path / "ids.txt")
    assert (too_long.status, too_long.err.count("\n")) == (2, 1)
    assert "row 1: the vector of 'a.jpg' has length 3" in too_long.err
    assert "--normalise" in too_long.err
    assert not (tmp_path / "new.index").exists()
    assert cli(*arguments, "--ids", tmp_path / "ids.txt", "--normalise").status == 0
    assert content(tmp_path / "new.index") == [
        (name, vector.tobytes(), {}) for name, vector in zip(NAMES, VECTORS, strict=True)
    ]


def test_columns_are_chosen_and_those_not_taken_are_told(cli: Runner, tmp_path: Path) -> None:
    table = pa.table({"key": NAMES, "emb": list(VECTORS), "about": ['{"x": 1}'] * 4, "more": ["y"] * 4})
    parquet.write_table(table, tmp_path / "t.parquet")
    arguments = ["index", "import", tmp_path / "new.index", tmp_path / "t.parquet"]
    columns = ["--id-column", "key", "--vector-column", "emb", "--metadata-column", "about"]
    unnamed = cli(*arguments)
    assert unnamed.status == 2
    assert "--id-column" in unnamed.err
    outcome = cli(*arguments, *columns, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.err == "vitembed: warning: these columns were not taken: more\n"
    assert outcome.json["left_out"] == ["more"]
    assert [row[2] for row in content(tmp_path / "new.index")] == [{"x": 1}] * 4
    assert cli(*arguments, *columns[:4]).status == 0
    assert [row[2] for row in content(tmp_path / "new.index")] == [{"about": '{"x": 1}', "more": "y"}] * 4


def test_an_index_that_is_missing_is_not_exported(cli: Runner, tmp_path: Path) -> None:
    outcome = cli("index", "export", tmp_path / "none.index", tmp_path / "x.parquet")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_has_an_example(cli: Runner, command: str) -> None:
    outcome = cli("index", command, "--help")
    assert outcome.status == 0
    assert f"Example: vitembed index {command} photos.index photos.parquet" in outcome.out
    assert json.dumps(outcome.out).count("INDEX") >= 1
