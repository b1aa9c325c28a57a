"""`vitembed explain` draws, reports, and fails with one line."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Runner


def images(world: Path, count: int) -> list[Path]:
    return sorted((world / "data").rglob("*.png"))[:count]


def test_explain_draws_each_image_and_names_the_files(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("explain", world / "model", *images(world, 3), "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    drawn = [Path(line) for line in outcome.out.splitlines()]
    assert drawn == [tmp_path / "out" / f"{number}-rollout.png" for number in range(3)]
    for path in drawn:
        with Image.open(path) as picture:
            picture.verify()


def test_explain_speaks_json_of_the_pair_and_the_distances(cli: Runner, world: Path, tmp_path: Path) -> None:
    pair = images(world, 2)
    options = ["--pair", "--distances", "--fusion", "min", "--discard", 0.5, "--json"]
    outcome = cli("explain", world / "model", *pair, "--out", tmp_path, *options)
    assert outcome.status == 0, outcome.err
    found = outcome.json
    assert [entry["image"] for entry in found["rollouts"]] == [str(path) for path in pair]
    assert found["fusion"] == "min"
    assert found["pair"]["sum first"] + found["pair"]["residual first"] == pytest.approx(found["pair"]["score"])
    assert all(0 <= pixels <= 12 for layer in found["distances"]["pixels"] for pixels in layer)
    files = [entry["picture"] for entry in found["rollouts"]] + [found[key]["picture"] for key in ("pair", "distances")]
    assert sorted(map(str, tmp_path.iterdir())) == sorted(files)


def test_explain_prints_the_sums_of_a_pair(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("explain", world / "model", *images(world, 2), "--out", tmp_path, "--pair")
    figures = dict(re.findall(r"^([a-z ]+?)  +(-?\d+\.\d{4})$", outcome.out, flags=re.MULTILINE))
    for side in ("first", "second"):
        total = float(figures[f"sum {side}"]) + float(figures[f"residual {side}"])
        assert total == pytest.approx(float(figures["score"]), abs=2e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pair"], "exactly two images; got 3"),
        (["--discard", "1"], r"in [0, 1); got 1"),
        (["--fusion", "sum"], "'mean', 'max', 'min'"),
        (["missing.png"], "missing.png: does not exist"),
    ],
)
def test_explain_fails_with_one_line(cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str) -> None:
    outcome = cli("explain", world / "model", *images(world, 3), "--out", tmp_path / "out", *options)
    assert outcome.status == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("vitembed: error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_explain_says_when_there_is_no_model(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("explain", tmp_path / "none", *images(world, 1), "--out", tmp_path / "out")
    assert outcome.status == 2
    assert str(tmp_path / "none") in outcome.err
