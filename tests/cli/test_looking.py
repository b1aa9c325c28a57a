"""`duplicates`, `cluster` and `map`: what they print and write, and that a bad target is told before the work."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from vitembed.cli import looking
from vitembed.errors import DataError, SearchIndexError, VitembedError
from vitembed.index import Index, Records, duplicates
from vitembed.index.clusters import cluster
from vitembed.index.duplicates import near_duplicates
from vitembed.index.reading import RewrittenError
from vitembed.index.rows import Rows

app = typer.Typer()
app.command()(looking.duplicates)
app.command()(looking.cluster)
app.command("map")(looking.map_entries)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of three bunches of four pictures each; ids `colour/number`."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 32))
    with Index.create(tmp_path / "i", 32) as made:
        for colour, centre in zip(("red", "green", "blue"), centres, strict=True):
            rows = centre + 0.02 * rng.standard_normal((4, 32))
            paths = [tmp_path / f"{colour}{number}.png" for number in range(4)]
            for path in paths:
                Image.new("RGB", (20, 20), colour).save(path)
            made.add(
                [f"{colour}/{number}" for number in range(4)],
                rows / np.linalg.norm(rows, axis=1, keepdims=True),
                [{"path": str(path), "colour": colour} for path in paths],
            )
    return tmp_path / "i"


def test_duplicates_prints_what_the_library_finds(index: Path) -> None:
    with Index.open(index) as opened:
        groups = near_duplicates(opened, 0.9)
    assert len(groups) == 3
    done = call("duplicates", index, "--score", "0.9", "--json")
    printed = [
        {
            "representative": one.representative,
            "weakest": one.weakest,
            "members": [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in one.members],
        }
        for one in groups
    ]
    assert json.loads(done.stdout) == {"score": 0.9, "groups": printed}
    printed = call("duplicates", index, "--score", "0.9").stdout
    assert "3 groups, 12 entries" in printed
    assert re.findall(r"(\S+)  \*$", printed, flags=re.MULTILINE) == [one.representative for one in groups]
    assert all(f"{hit.score:.4f}  {hit.id}" in printed for one in groups for hit in one.members)


def test_duplicates_says_when_there_are_none(index: Path) -> None:
    assert call("duplicates", index, "--score", "1").stdout == "no duplicates\n"


def test_cluster_prints_and_draws_what_the_library_finds(index: Path, tmp_path: Path) -> None:
    with Index.open(index) as opened:
        found = cluster(opened)
    document = json.loads(call("cluster", index, "--json").stdout)
    assert document["silhouette"] == found.silhouette
    assert [one["medoid"] for one in document["clusters"]] == [one.medoid for one in found.clusters]
    assert [hit["id"] for hit in document["clusters"][0]["members"]] == [hit.id for hit in found.clusters[0].members]
    printed = call("cluster", index, "--clusters", "1", "--html", tmp_path / "x.html").stdout
    assert "cluster 1, 12 entries" in printed
    assert "and 2 more" in printed
    assert "silhouette" not in printed
    assert (tmp_path / "x.html").read_text(encoding="utf-8").count("<img ") == 12


def test_a_contact_sheet_of_duplicates_shows_them_and_missing_pictures_are_told(index: Path, tmp_path: Path) -> None:
    (tmp_path / "red0.png").unlink()
    done = call("duplicates", index, "--html", tmp_path / "x.html")
    assert "1 picture could not be shown" in done.stderr
    assert (tmp_path / "x.html").read_text(encoding="utf-8").count("<img ") == 11


def test_map_writes_its_page_and_prints_what_it_shows(index: Path, tmp_path: Path) -> None:
    done = call(
        "map", index, "--out", tmp_path / "x.html", "--method", "pca", "--label", "colour", "--limit", 9, "--json"
    )
    figures = json.loads(done.stdout)
    expected = {"entries": 12, "shown": 9, "method": "pca", "thumbnails": 9}
    assert figures == {"map": str(tmp_path / "x.html"), **expected}
    assert "by colour" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "pca" in call("map", index, "--out", tmp_path / "x.html", "--method", "pca").stdout


@pytest.mark.parametrize(
    "command", [["duplicates", "{i}", "--html"], ["cluster", "{i}", "--html"], ["map", "{i}", "--out"]]
)
def test_a_file_in_a_missing_folder_is_told_before_the_work_starts(
    index: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has started")

    monkeypatch.setattr(Index, "stream", never)
    monkeypatch.setattr(Rows, "frozen", never)
    with pytest.raises(VitembedError, match="no folder"):
        call(*(part.format(i=index) for part in command), tmp_path / "missing" / "x.html")


def test_errors_of_the_library_come_through_and_leave_no_file(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nothing'"):
        call("map", index, "--out", tmp_path / "x.html", "--label", "nothing")
    with pytest.raises(SearchIndexError, match="not an index"):
        call("duplicates", tmp_path / "none", "--html", tmp_path / "x.html")
    assert call("duplicates", index, "--score", "2").exit_code == 2
    assert not list(tmp_path.glob("*.html"))
    assert not list(tmp_path.glob(".x*"))


def test_groups_show_how_far_they_are_on_standard_error_and_nothing_of_it_in_json(index: Path) -> None:
    for name in ("duplicates", "cluster"):
        done = call(name, index, "--json")
        assert "100%" in done.stderr
        json.loads(done.stdout)


@pytest.mark.parametrize("command", [["duplicates", "--html"], ["cluster", "--html"], ["map", "--out"]])
def test_an_index_that_another_process_compacts_meanwhile_is_told_in_one_line(
    index: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Index.open(index) as opened:
        opened.add(["red/0"], opened.get("red/0").vector[None])

    def compact() -> None:
        monkeypatch.undo()
        with Index.open(index) as other:
            assert other.compact() == 1

    whole, distinct = Index.stream, duplicates._first_rows

    def streaming(self: Index) -> Iterator[Records]:
        batches = whole(self, 5)
        yield next(batches)
        compact()
        yield from batches

    monkeypatch.setattr(Index, "stream", streaming)
    monkeypatch.setattr(duplicates, "_first_rows", lambda source: (compact(), distinct(source))[1])
    with pytest.raises(RewrittenError) as caught:
        call(command[0], index, command[1], tmp_path / "x.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("name", ["duplicates", "cluster", "map"])
def test_the_help_of_each_command_has_an_example_and_explains_every_option(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert re.search(rf"^Example: vitembed {name} ", command.help, flags=re.MULTILINE)
    assert [parameter.name for parameter in command.params if not parameter.help] == []
