"""Help texts: every command has an example, and the example is a command that exists."""

import re
import shlex

import pytest
import typer

from vitembed.cli.app import app


def commands() -> dict[str, object]:
    """Return every command by what is typed for it."""
    root = typer.main.get_command(app)
    found: dict[str, object] = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        nested = getattr(command, "commands", None)
        if nested is None:
            found[name] = command
        else:
            found.update({f"{name} {inner}": nested[inner] for inner in nested})
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_help_of_a_command_has_an_example_that_can_be_typed(name: str) -> None:
    command = commands()[name]
    text = command.help or ""  # type: ignore[attr-defined]
    examples = re.findall(r"^Example: (.*)$", text, flags=re.MULTILINE)
    assert examples, f"{name} has no example"
    for example in examples:
        words = shlex.split(example)
        typed = words[: 1 + len(name.split())]
        assert typed == ["vitembed", *name.split()]
        command.make_context(name, words[len(typed) :], resilient_parsing=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_is_explained(name: str) -> None:
    silent = [p.name for p in commands()[name].params if not getattr(p, "help", None)]  # type: ignore[attr-defined]
    assert silent == []


def test_the_commands_are_those_of_the_design() -> None:
    assert set(commands()) == {
        "calibrate",
        "demo",
        "doctor",
        "embed",
        "enroll",
        "evaluate",
        "explain",
        "export",
        "identify",
        "index add",
        "cluster",
        "duplicates",
        "index annotate",
        "index check",
        "index compact",
        "index create",
        "index export",
        "index import",
        "index info",
        "index list",
        "index migrate",
        "index optimize",
        "index remove",
        "index sync",
        "map",
        "pretrain",
        "search",
        "train",
        "verify",
    }
