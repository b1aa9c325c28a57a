"""`vitembed index sync` and `migrate`: summaries, files set aside, and what is said when they are stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from tests.conftest import Runner
from tests.index.test_sync import backdate
from vitembed.cli import indexing, syncing
from vitembed.embedder import Embedder
from vitembed.index import Index
from vitembed.preprocess import Preprocess


def commands() -> typer.Typer:
    """Return an application of these two commands and `remove`."""
    group = typer.Typer()
    group.command()(syncing.sync)
    group.command()(syncing.migrate)
    group.command()(indexing.remove)
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.add_typer(group, name="index")
    return app


@pytest.fixture(autouse=True)
def _two_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitembed.cli.app.app", commands())
    backdate(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two untrained models, `old` and `new`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["old", "new"]):
        model = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), stem="conv", seed=seed, device="cpu")
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "photos" / f"class {number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path: Path, models: Path) -> Path:
    model = Embedder.from_pretrained(models / "old", device="cpu")
    with Index.create(tmp_path / "x.index", model.dim, model.fingerprint, location=str(models / "old")):
        return tmp_path / "x.index"


def spoil(photos: Path, count: int) -> list[str]:
    """Add files that are no images; return their paths."""
    paths = [photos / f"bad {number:02}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"bad %d" % number)
        os.utime(path, (1e9, 1e9))
    return [str(path) for path in paths]


def test_sync_sums_up_and_names_at_most_ten_of_the_files_set_aside(cli: Runner, index: Path, photos: Path) -> None:
    bad = spoil(photos, 13)
    first = cli("index", "sync", index, photos, "--json")
    assert first.status == 0
    report = first.json
    assert (report["added"], report["embedded"], report["size"], report["removed"]) == (12, 12, 12, 0)
    assert report["failed"] == dict.fromkeys(bad, "is not an image that Pillow can read")
    assert report["seconds"] > 0
    assert report["read"] > 0
    named = [line for line in first.err.splitlines() if "set aside" in line]
    assert [path for path in bad if any(f"set aside: {path}: is not an image" in line for line in named)] == bad[:10]
    assert named[10:] == ["vitembed: warning: set aside: 3 more; --json lists all of them"]
    assert "sync: 25 of 25 images" in first.err

    second = cli("index", "sync", index, photos)
    assert re.search(r"^unchanged +12$", second.out, re.MULTILINE)
    assert re.search(r"^failed +13$", second.out, re.MULTILINE)
    assert re.search(r"^size +12$", second.out, re.MULTILINE)


def test_sync_tries_bad_files_again_when_asked(cli: Runner, index: Path, photos: Path) -> None:
    [bad] = spoil(photos, 1)
    words = ("index", "sync", index, photos, "--json")
    cli(*words)
    assert cli(*words).json["read"] == 0
    assert cli(*words, "--retry").json["read"] == Path(bad).stat().st_size
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(bad)
    assert cli(*words, "--retry").json["added"] == 1


def test_sync_says_what_to_do_for_a_file_that_was_moved_and_edited(cli: Runner, index: Path, photos: Path) -> None:
    cli("index", "sync", index, photos)
    moved = photos.rename(photos.with_name("moved"))
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(moved / "class 0" / "04.png")
    first = cli("index", "sync", index, moved, "--json")
    assert first.json["added"] == 11
    assert "remove 'class 0/04.png' from the index and sync again" in first.err
    cli("index", "remove", index, "class 0/04.png")
    assert cli("index", "sync", index, moved, "--json").json["added"] == 1


def test_migrate_swaps_the_model_and_reports_the_overlap(cli: Runner, index: Path, photos: Path, models: Path) -> None:
    cli("index", "sync", index, photos)
    outcome = cli("index", "migrate", index, "--model", models / "new", "--device", "cpu", "--json")
    assert outcome.status == 0, outcome.err
    report = outcome.json
    assert (report["entries"], report["embedded"], report["failed"]) == (12, 12, {})
    assert 0 <= report["overlap"] <= 1
    assert report["model"] == str(models / "new")
    model = Embedder.from_pretrained(models / "new", device="cpu")
    with Index.open(index) as opened:
        assert (opened.fingerprint, opened.location) == (model.fingerprint, str(models / "new"))
        for name in opened.ids():
            [expected] = model.encode([photos / name])
            np.testing.assert_allclose(opened.get(name).vector, expected, atol=1e-5)
    assert cli("index", "sync", index, photos, "--json").json["unchanged"] == 12  # with the new model, unasked
    again = cli("index", "migrate", index, "--model", models / "new")
    assert again.status == 2
    assert "of this model already" in again.err


def test_migrate_stops_for_missing_files_or_drops_them(cli: Runner, index: Path, photos: Path, models: Path) -> None:
    cli("index", "sync", index, photos)
    lost = photos / "class 0" / "04.png"
    lost.unlink()
    stopped = cli("index", "migrate", index, "--model", models / "new")
    assert (stopped.status, stopped.out) == (2, "")
    assert f"warning: cannot be read: {lost}: does not exist" in stopped.err
    assert len([line for line in stopped.err.splitlines() if line.startswith("vitembed: error: ")]) == 1
    with Index.open(index) as opened:
        assert (len(opened), opened.location) == (12, str(models / "old"))
    dropped = cli("index", "migrate", index, "--model", models / "new", "--missing", "drop")
    assert dropped.status == 0
    assert f"set aside: {lost}: does not exist" in dropped.err
    assert re.search(r"^entries +11$", dropped.out, re.MULTILINE)
    assert re.search(r"^embedded +0$", dropped.out, re.MULTILINE)  # the stopped call had done it


def test_migrate_refuses_what_it_does_not_know(cli: Runner, index: Path, models: Path) -> None:
    assert "did you mean 'drop'" in cli("index", "migrate", index, "--model", models / "new", "--missing", "drops").err
    assert cli("index", "migrate", index, "--model", models / "none").status == 2


STOPPING = """
import os, signal, sys, time
from vitembed.cli import app as application
from tests.cli.test_syncing import commands
from vitembed.embedder import Embedder

stream = Embedder.stream

def slow(self, images, **options):
    for number, batch in enumerate(stream(self, images, **options)):
        if number == 2:
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
            time.sleep(60)
        yield batch

Embedder.stream = slow
application.app = commands()
application.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_sync_says_what_is_kept_and_how_to_go_on(
    cli: Runner, index: Path, photos: Path, name: str, status: int
) -> None:
    words = ["index", "sync", str(index), str(photos), "--batch-size", "2", "--device", "cpu", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", STOPPING, name, *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == status, run.stderr
    line = f"vitembed: sync stopped; 4 images are in {index}; the same command goes on where it stopped"
    assert line in run.stderr.splitlines()
    assert (run.stdout, "Traceback" in run.stderr) == ("", False)
    report = json.loads(cli(*words).out)
    assert (report["added"], report["embedded"], report["unchanged"]) == (8, 8, 4)


def test_a_stopped_migration_leaves_the_index_as_it_was_and_goes_on(
    cli: Runner, index: Path, photos: Path, models: Path
) -> None:
    cli("index", "sync", index, photos)
    words = ["index", "migrate", str(index), "--model", str(models / "new"), "--batch-size", "2", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", STOPPING, "SIGINT", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 130, run.stderr
    assert f"migration stopped; {index} is as it was; the same command goes on" in run.stderr
    with Index.open(index) as opened:
        assert opened.location == str(models / "old")
    report = cli(*words).json
    assert (report["entries"], report["embedded"]) == (12, 8)


@pytest.mark.parametrize("name", ["sync", "migrate"])
def test_the_help_has_an_example(cli: Runner, name: str) -> None:
    assert f"Example: vitembed index {name} " in cli("index", name, "--help").out
