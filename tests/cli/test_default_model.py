"""`verify`, `index create`, `sync` and `search` without a model: "ink" is taken, it is said, and it works offline."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.conftest import Outcome, Runner
from vitembed.cli.decisions import say_default
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.verify import Verifier
from vitembed.weights import shipped_verifier

README = Path(__file__).parents[2] / "README.md"
SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "tree": lambda pen, by: pen.line(
        [(52 + by, 15), (52, 90 - by), (52, 55 + by), (25 + by, 25), (52, 55 + by), (80, 28 - by)], 0, 3
    ),
    "ring": lambda pen, by: (
        pen.ellipse((22 + by, 25, 80, 82 + by), outline=0, width=3),
        pen.line([(22 + by, 52), (80, 52 - by)], 0, 3),
    )[0],
}


@pytest.fixture(autouse=True)
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the current folder one with drawings: a.png and b.png of one character, c.png of another, and a folder."""
    monkeypatch.chdir(tmp_path)
    for name, shape, by in [
        ("a", "tree", 0),
        ("b", "tree", 3),
        ("c", "ring", 0),
        ("letters/tree1", "tree", 1),
        ("letters/tree2", "tree", 2),
        ("letters/ring1", "ring", 1),
        ("letters/ring2", "ring", 3),
    ]:
        drawing = Image.new("L", (105, 105), 255)
        SHAPES[shape](ImageDraw.Draw(drawing), by)
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        drawing.save(path)
    return tmp_path


def line(outcome: Outcome) -> str:
    assert (outcome.status, outcome.out) == (2, "")
    [only] = [text for text in outcome.err.splitlines() if text]
    return only


def test_two_drawings_of_one_character_match_and_two_of_two_do_not_and_the_default_is_said(cli: Runner) -> None:
    said = say_default(Verifier.load(shipped_verifier("ink")).calibration)
    assert "signatures and photos need a verifier of their own: vitembed calibrate" in said
    for other, status, verdict in (("b.png", 0, "match"), ("c.png", 1, "no match")):
        told = cli("verify", "a.png", other)
        assert told.status == status, told
        assert told.out.startswith(f"{verdict}: score")
        assert f"warning: {said}" in told.err
        assert "pairs of different characters" in told.out
        document = cli("verify", "a.png", other, "--json")
        assert (document.status, document.json["verdict"], document.json["verifier"]) == (status, verdict, "ink")
        assert said in document.json["notes"]


def test_the_page_says_it_too(cli: Runner) -> None:
    assert cli("verify", "a.png", "c.png", "--html", "page.html").status == 1
    page = Path("page.html").read_text(encoding="utf-8")
    assert "no --verifier was given: judged by ink" in page
    assert "pairs of different characters" in page
    assert "measured with another model" in page


def test_a_named_verifier_is_not_the_default_and_says_nothing_of_it(cli: Runner) -> None:
    Path("own.verifier").write_bytes(shipped_verifier("ink").read_bytes())
    told = cli("verify", "a.png", "b.png", "--verifier", "own.verifier")
    assert told.status == 0
    assert "--verifier was given" not in told.out + told.err
    assert "pairs of different identities" in told.out
    document = cli("verify", "a.png", "b.png", "--verifier", "own.verifier", "--json").json
    assert (document["verifier"], document["notes"]) == ("own.verifier", [])


def test_what_needs_a_verifier_of_one_s_own_says_how_to_make_it(cli: Runner) -> None:
    assert "make one with: vitembed calibrate runs/own DATA" in line(
        cli("verify", "a.png", "b.png", "--model", "runs/own")
    )
    assert cli("verify", "a.png", "b.png", "--model", "ink").status == 0
    wrong = line(cli("verify", "--identity", "alice", "a.png"))
    assert "--identity needs --verifier" in wrong
    assert "vitembed calibrate MODEL DATA --out FILE" in wrong


def test_an_index_is_made_filled_and_searched_without_naming_a_model(cli: Runner) -> None:
    made = cli("index", "create", "letters.index", "--json")
    assert (made.status, made.json["model"], made.json["size"]) == (0, "ink", 0)
    assert made.json["fingerprint"] == Embedder.from_pretrained("ink", device="cpu").fingerprint
    assert "warning: no --model was given: letters.index is for embeddings of ink" in made.err
    assert cli("index", "sync", "letters.index", "letters").status == 0
    found = cli("search", "letters.index", "c.png", "a.png", "-k", 2, "--json")
    assert found.status == 0, found.err
    hits = [{hit["id"] for hit in answer["hits"]} for answer in found.json]
    assert hits == [{"ring1.png", "ring2.png"}, {"tree1.png", "tree2.png"}]
    assert "was given" not in cli("index", "create", "named.index", "--model", "ink").err


def test_a_local_model_called_ink_is_told_in_one_line_and_changes_nothing(cli: Runner, tmp_path: Path) -> None:
    assert cli("index", "create", "letters.index", "--model", "ink").status == 0
    other = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), stem="conv", device="cpu")
    other.save_pretrained("ink")
    synced = cli("index", "sync", "letters.index", "letters")
    assert synced.status == 0, synced.err
    told = [text for text in synced.err.splitlines() if "ships with vitembed; the one here is ./ink" in text]
    assert len(told) == 1
    assert told[0].startswith("vitembed: warning: 'ink'")
    assert cli("index", "create", "again.index", "--model", "ink", "--json").json["model"] == "ink"
    assert cli("index", "create", "own.index", "--model", "./ink", "--json").json["model"] == str(tmp_path / "ink")


def test_a_folder_of_images_in_the_place_of_an_index_gets_the_two_commands_that_make_one(cli: Runner) -> None:
    wrong = line(cli("search", "letters", "a.png"))
    assert "letters is not an index (a folder of other things)" in wrong
    commands = re.search(r"make one with: (.*)", wrong)
    assert commands is not None
    for command in commands[1].split(" && "):
        program, *words = shlex.split(command)
        assert program == "vitembed"
        assert cli(*words).status == 0
    assert cli("search", "letters.index", "a.png").status == 0


@pytest.mark.parametrize("command", [("search", "none.index", "a.png"), ("index", "sync", "none.index", "letters")])
def test_a_missing_index_gets_them_too(cli: Runner, command: tuple[str, ...]) -> None:
    assert "none.index is not an index (no such folder); make one with: vitembed index create none.index" in line(
        cli(*command)
    )
    assert "a.png is a file and not an index" in line(cli("search", "a.png", "b.png"))


def test_the_commands_of_the_quickstart_are_true(cli: Runner) -> None:
    text = README.read_text(encoding="utf-8")
    [block] = [part for part in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "letters.index" in part]
    commands = [shlex.split(text, comments=True) for text in block.splitlines() if text.strip()]
    assert [command[1] for command in commands] == ["verify", "index", "index", "search"]
    for program, *words in commands:
        assert program == "vitembed"
        outcome = cli(*words)
        assert outcome.status == 0, outcome.err
