"""Settings from a TOML file: who wins, what is refused, and the way back from a run to a file."""

import math
import tomllib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from vitembed.cli.settings_file import Config, settings_text, to_toml
from vitembed.errors import ConfigError

app = typer.Typer()
seen: list[dict[str, Any]] = []


@app.command()
def fit(
    context: typer.Context,
    data: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option()],
    config: Config = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 1e-3,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    margin: float | None = None,
    workers: int | None = None,
    augment: Literal["none", "photo"] | None = None,
    fast: Annotated[bool, typer.Option("--compile")] = False,
    tracker: Annotated[list[str] | None, typer.Option()] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    seen.append({**context.params, "text": settings_text(context, leave_out=("overwrite",))})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what calls the command with a file of some text, as run.toml, and gives back its parameters."""
    monkeypatch.chdir(tmp_path)

    def call(text: str, *arguments: str) -> dict[str, Any]:
        Path("run.toml").write_text(text, encoding="utf-8")
        app(args=["--config", "run.toml", *arguments], standalone_mode=False)
        return seen.pop()

    return call


def test_required_arguments_and_options_may_stand_in_the_file(run: Any) -> None:
    found = run('data = "birds"\nout = "runs/birds"\nlr = 3e-4\nepochs = 5\nmargin = 1\nworkers = 0\naugment = "photo"')
    assert found["data"] == Path("birds")
    assert found["out"] == Path("runs/birds")
    assert (found["learning_rate"], found["epochs"], found["workers"], found["augment"]) == (3e-4, 5, 0, "photo")
    assert found["margin"] == 1.0
    assert isinstance(found["margin"], float)


@pytest.mark.parametrize("key", ["lr", "learning-rate", "learning_rate"])
def test_a_key_is_any_name_of_the_flag(run: Any, key: str) -> None:
    assert run(f"{key} = 0.5", "d", "--out", "o")["learning_rate"] == 0.5


@pytest.mark.parametrize("before", [True, False])
def test_what_is_typed_goes_before_the_file_wherever_it_stands(tmp_path: Path, before: bool) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = "a"\nout = "b"\nepochs = 5\nmargin = 0.1\ntracker = ["wandb"]')
    typed = ["typed", "--epochs", "7", "--tracker", "mlflow"]
    config = ["--config", str(file)]
    app(args=[*config, *typed] if before else [*typed, *config], standalone_mode=False)
    found = seen.pop()
    assert (found["data"], found["out"], found["epochs"]) == (Path("typed"), Path("b"), 7)
    assert (found["margin"], found["tracker"], found["learning_rate"]) == (0.1, ["mlflow"], 1e-3)


def test_flags_and_lists_are_taken(run: Any) -> None:
    found = run('compile = true\noverwrite = false\ntracker = ["tensorboard", "wandb"]', "d", "--out", "o")
    assert (found["fast"], found["overwrite"], found["tracker"]) == (True, False, ["tensorboard", "wandb"])


def test_without_a_file_nothing_changes() -> None:
    app(args=["d", "--out", "o"], standalone_mode=False)
    assert seen.pop()["epochs"] == 20
    with pytest.raises(typer.TyperException) as error:
        app(args=["d"], standalone_mode=False)
    assert "Missing option '--out'" in error.value.format_message()


def test_an_empty_file_does_not_stand_in_for_what_is_required(run: Any) -> None:
    with pytest.raises(typer.TyperException) as error:
        run("", "--out", "o")
    assert "Missing argument 'data'" in error.value.format_message()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key in run.toml: 'epoch'; did you mean 'epochs'"),
        ("learning-rat = 3", "did you mean 'learning-rate'"),
        ("config = 'other.toml'", "unknown key in run.toml: 'config'"),
        ("help = true", "unknown key in run.toml: 'help'"),
        ("fast = true", "unknown key in run.toml: 'fast'"),
        ("[train]\nepochs = 3", "unknown key in run.toml: 'train'"),
        ("lr = 1.0\nlearning-rate = 2.0", "run.toml: learning-rate is there twice under two names"),
        ("epochs = '10'", "run.toml: epochs must be a whole number; got '10'"),
        ("epochs = true", "run.toml: epochs must be a whole number; got True"),
        ("epochs = 10.0", "run.toml: epochs must be a whole number; got 10.0"),
        ("epochs = 0", "run.toml: epochs: .*greater than or equal to 1"),
        ("epochs = [1, 2]", r"run.toml: epochs must be one value; got \[1, 2\]"),
        ("lr = '0.1'", "run.toml: lr must be a number; got '0.1'"),
        ("lr = false", "run.toml: lr must be a number; got False"),
        ("lr = 'fast'", "run.toml: lr: "),
        ("data = 3", "run.toml: data: "),
        ("compile = 1", "run.toml: compile must be true or false; got 1"),
        ("compile = 'yes'", "run.toml: compile must be true or false; got 'yes'"),
        ("augment = 'photos'", "run.toml: augment: 'photos' is not one of"),
        ("tracker = 'wandb'", "run.toml: tracker must be a list; got 'wandb'"),
        ("tracker = [1]", "run.toml: tracker "),
        ("margin = 1979-05-27", "run.toml: margin: "),
        ("epochs = ", r"run.toml is no TOML file: .*(line 1|end of document)"),
        ("epochs = 1\nepochs = 2\n", "run.toml is no TOML file: .*line 2"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(run: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run(text, "d", "--out", "o")
    assert "\n" not in str(error.value)


def test_a_bad_value_is_refused_even_where_a_typed_one_wins(run: Any) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        run("epochs = 'many'", "d", "--out", "o", "--epochs", "3")


def test_a_missing_file_a_folder_and_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    for name, message in [("none.toml", "No such file"), (".", "cannot be read"), ("bytes.toml", "no TOML file")]:
        with pytest.raises(ConfigError, match=message):
            app(args=["d", "--out", "o", "--config", str(tmp_path / name)], standalone_mode=False)


def test_the_settings_of_a_run_give_the_same_run_again(run: Any) -> None:
    first = run('compile = true\ntracker = ["wandb"]', 'a "b"\\ü', "--out", "o", "--lr", "3e-7", "--overwrite")
    again = run(first["text"])
    assert "overwrite" not in first["text"]
    assert "config" not in first["text"]
    assert first.pop("overwrite") != again.pop("overwrite")
    assert again == first


plain = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.one_of(plain, st.lists(plain))))
def test_what_is_written_is_read_again_as_it_was(settings: dict[str, Any]) -> None:
    found = tomllib.loads(to_toml(settings))
    assert found == settings
    assert [type(value) for value in found.values()] == [type(value) for value in settings.values()]


def test_paths_enumerations_and_nan_are_written(tmp_path: Path) -> None:
    class Size(Enum):
        SMALL = "S"

    found = tomllib.loads(to_toml({"out": tmp_path, "size": Size.SMALL, "rate": math.nan, "sizes": (1, 2)}))
    assert math.isnan(found.pop("rate"))
    assert found == {"out": str(tmp_path), "size": "S", "sizes": [1, 2]}


@pytest.mark.parametrize("value", [None, {"a": 1}, "\udcff", b"x"])
def test_what_toml_has_no_word_for_is_an_error_that_names_the_key(value: Any) -> None:
    with pytest.raises(ConfigError, match="margin"):
        to_toml({"margin": value})
