"""`search` with images, entries, vectors and filters, and `index optimize`, `compact` and `check --repair`."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Outcome, Runner
from vitembed.cli import searching
from vitembed.index import Index, combined

VECTORS = np.random.default_rng(0).standard_normal((1_200, 8)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An index whose vectors no model made, with a picture for the first entries."""
    with Index.create(tmp_path / "i", 8) as index:
        metadata = [{"path": str(tmp_path / f"{n}.png"), "year": 2000 + n % 30} for n in range(1_200)]
        index.add([f"id{n}" for n in range(1_200)], VECTORS, metadata)
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path / "i"


def line(outcome: Outcome) -> str:
    assert (outcome.status, outcome.out) == (2, "")
    [only] = [text for text in re.split(r"[\r\n]+", outcome.err) if text]
    return only


def ids(outcome: Outcome) -> list[list[str]]:
    assert outcome.status == 0, outcome.err
    return [[hit["id"] for hit in answer["hits"]] for answer in outcome.json]


def test_entries_are_searched_with_singly_and_together_without_themselves(cli: Runner, place: Path) -> None:
    with Index.open(place) as index:
        single = [[hit.id for hit in hits[1:6]] for hits in index.search(VECTORS[:2], 6)]
        both = [hit.id for hit in index.search(combined(VECTORS[:2]), 9)[0] if hit.id not in ("id0", "id1")][:5]
    options = ["--id", "id0", "--id", "id1", "-k", 5, "--json"]
    assert ids(cli("search", place, *options)) == single
    together = cli("search", place, *options, "--together")
    assert (ids(together), together.json[0]["query"]) == ([both], ["id0", "id1"])


def test_vectors_are_searched_with_from_a_file(cli: Runner, place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", VECTORS[[7, 9]])
    answer = cli("search", place, "--vectors", tmp_path / "q.npy", "-k", 1, "--json")
    assert ids(answer) == [["id7"], ["id9"]]
    assert [one["query"] for one in answer.json] == [f"{tmp_path / 'q.npy'}[{row}]" for row in (0, 1)]
    assert "id7" in cli("search", place, "--vectors", tmp_path / "q.npy").out


def test_filters_are_joined(cli: Runner, place: Path) -> None:
    options = ["--where", "year>=2010", "--where", '{"year": {"$lt": 2012}}', "-k", 2_000, "--json"]
    answer = cli("search", place, "--id", "id0", *options)
    assert set(ids(answer)[0]) == {f"id{n}" for n in range(1_200) if n % 30 in (10, 11)}
    assert "no entry matches" in cli("search", place, "--id", "id0", "--where", "year=1").out


def test_a_page_shows_the_queries_and_their_hits(cli: Runner, place: Path, tmp_path: Path) -> None:
    outcome = cli("search", place, "--id", "id0", "--id", "id1", "-k", 3, "--html", tmp_path / "hits.html")
    assert outcome.status == 0
    page = (tmp_path / "hits.html").read_text()
    with Index.open(place) as index:
        for name in ("id0", "id1", *(hit.id for hit in index.search(VECTORS[0], 4)[0][1:])):
            assert name in page
    assert page.count("data:image") >= 2
    assert re.search(r"warning: [2-9] pictures could not be shown; the page says why\n", outcome.err)


def test_a_page_shows_the_image_that_was_searched_with_and_not_the_entry_of_that_name(
    cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        fingerprint = "model"

        def encode(self, images: list[Path]) -> np.ndarray:
            return VECTORS[[5] * len(images)]

    monkeypatch.setattr(searching, "open_model", lambda *_: Model())
    monkeypatch.setattr(searching, "find_model", lambda *_: "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (300, 300), "red").save("photos/cat.png")
    Image.new("RGB", (300, 300), "blue").save("cat.png")
    with Index.create("i", 8, "model") as index:
        index.add(["cat.png"], VECTORS[:1], [{"path": str(tmp_path / "photos" / "cat.png")}])
    assert cli("search", "i", "./cat.png", "--html", "x.html").status == 0
    assert pixels(Path("x.html")) == ["blue", "red"]
    assert cli("search", "i", "cat.png", "--id", "cat.png", "--together", "--html", "x.html").status == 0
    assert pixels(Path("x.html")) == ["red", "blue"]


def pixels(page: Path) -> list[str]:
    """Return whether the pictures of a page are red or blue."""
    data = [base64.b64decode(text) for text in re.findall(r'base64,([^"]+)"', page.read_text(encoding="utf-8"))]
    images = [Image.open(io.BytesIO(one)).convert("RGB") for one in data]
    return ["red" if np.asarray(image)[5, 5, 0] > 128 else "blue" for image in images]


def test_a_page_names_vectors_and_takes_them_for_no_pictures(cli: Runner, place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", VECTORS[:2])
    outcome = cli("search", place, "--vectors", tmp_path / "q.npy", "-k", 1, "--html", tmp_path / "x.html")
    assert (outcome.status, outcome.err) == (0, "")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("a vector, no picture") == 2
    assert [f"{tmp_path / 'q.npy'}[{row}]</h2>" in page for row in (0, 1, 2)] == [True, True, False]


def test_no_hits_are_told_apart(cli: Runner, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", VECTORS[0])
    with Index.create(tmp_path / "i", 8) as index:
        assert "[0]: the index is empty" in cli("search", tmp_path / "i", "--vectors", tmp_path / "q.npy").out
        index.add(["only"], VECTORS[:1])
    assert cli("search", tmp_path / "i", "--id", "only").out == "only: no other entry\n"
    assert cli("search", tmp_path / "i", "--id", "only", "--where", "x=1").out == "only: no entry matches\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to search with"),
        (["--id", "nobody"], "not in the index: 'nobody'"),
        (["--vectors", "missing.npy"], "no file missing.npy"),
        (["--vectors", __file__], "is not a .npy file"),
        (["--id", "id0", "--where", "year"], "year"),
        (["--id", "id0", "--where", '{"year": {"$gtr": 1}}'], "did you mean '$gt'"),
        (["--id", "id0", "--recall", "2"], "recall must be"),
        (["--id", "id0", "--html", "no/such/folder.html"], "there is no folder"),
        ([__file__], "does not say where its model is"),
    ],
)
def test_bad_searches_are_one_line(cli: Runner, place: Path, options: list[str], words: str) -> None:
    assert words in line(cli("search", place, *options))


def test_an_index_is_optimised_compacted_checked_and_repaired(cli: Runner, place: Path) -> None:
    chosen = cli("index", "optimize", place, "--kind", "ivf", "--recall", 0.8, "--memory", "1.5MB", "--json")
    assert chosen.status == 0, chosen.err
    assert (chosen.json["kind"], chosen.json["entries"]) == ("ivf", 1_200)
    assert cli("index", "info", place, "--json").json["structure"] == "ivf"
    assert "effort, recall and ms" in cli("index", "optimize", place, "--kind", "ivf", "--recall", 0.7).out
    [file] = place.glob("structure-*.faiss")
    file.write_bytes(b"no structure")
    broken = cli("index", "check", place)
    assert (broken.status, file.name in broken.out) == (1, True)
    repaired = cli("index", "check", place, "--repair")
    assert (repaired.status, repaired.out.startswith("repaired: ")) == (0, True)
    assert cli("index", "check", place, "--repair", "--json").json == {
        "index": str(place),
        "problems": [],
        "repaired": [],
    }
    cli("index", "remove", place, "id0", "id1")
    compacted = cli("index", "compact", place, "--json")
    assert (compacted.json["dropped"], "searches are exact again" in compacted.err) == (2, True)
    assert json.loads(cli("search", place, "--id", "id2", "-k", 1, "--json").out)
    for options in (
        ["--memory", "much"],
        ["--kind", "graph"],
        ["--recall", "0"],
        ["--kind", "hnsw", "--memory", "1KB"],
    ):
        line(cli("index", "optimize", place, *options))


def test_entries_are_annotated_from_a_table_and_listed(cli: Runner, place: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,town\nid3,Bern\nid4,Genf\n")
    assert cli("index", "annotate", place, tmp_path / "t.csv", "--json").json["annotated"] == 2
    assert cli("index", "list", place, "--where", "town^=Be").out == "id3\n"
    [entry] = cli("index", "list", place, "--where", "town=Genf", "--json").json
    assert (entry["id"], entry["metadata"]["year"]) == ("id4", 2004)
    assert len(cli("index", "list", place).out.splitlines()) == 1_200
    assert cli("index", "info", place, "--json").json["dead_rows"] == 2
    (tmp_path / "t.csv").write_text("id,town\nnobody,Bern\n")
    assert "not in the index: 'nobody'" in line(cli("index", "annotate", place, tmp_path / "t.csv"))
    assert "an argument is empty" in line(cli("index", "sync", place, ""))


def test_json_is_json_whatever_the_name_of_a_file(cli: Runner, place: Path, tmp_path: Path) -> None:
    import sys

    if sys.platform != "linux":
        pytest.skip("names that are no UTF-8")
    name = str(tmp_path) + "/odd\udcff.npy"
    np.save(name, VECTORS[:1])
    assert cli("search", place, "--vectors", name, "-k", 1, "--json").json[0]["query"] == f"{name}[0]"
