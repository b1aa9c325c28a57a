"""`--config run.toml`: the settings of a command in a file, and the settings of a run as such a file.

The keys are those of the flags and arguments of the command, `learning-rate` or `learning_rate`; what is typed goes
before what the file says, and the file before the defaults. Nothing in a file is passed over: a key that the command
does not have, a value of another type and a file that is no TOML are errors. Relative paths start where the command
runs, as on the command line.

A command takes such a file when one of its parameters is of the type `Config`.
"""

import json
import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitembed.errors import ConfigError, unknown_name

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def read_settings(context: typer.Context, option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Make what a TOML file says the defaults of the command that is about to run; the callback of `Config`.

    Raises:
        ConfigError: naming the file, and the key where there is one.
    """
    if path is None or context.resilient_parsing:
        return path
    settings: dict[str, Any] = {}
    keys = _parameters(context)
    for key, value in _read_toml(path).items():
        parameter = keys.get(key.replace("-", "_"))
        if parameter is None:
            raise unknown_name(f"key in {path}:", key, {_key(known) for known in keys.values()})
        if parameter.name in settings:
            raise ConfigError(f"{path}: {key} is there twice under two names; keep one of them")
        _check(context, parameter, value, f"{path}: {key}")
        settings[str(parameter.name)] = value
    context.default_map = {**(context.default_map or {}), **settings}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,  # before the others, whose defaults it sets
        callback=read_settings,
        help="A TOML file with these flags as keys: learning-rate = 3e-4; flags that are typed win.",
    ),
]


def settings_text(context: typer.Context, *, leave_out: Collection[str] = ()) -> str:
    """Return the settings in effect of the command that runs, as text for a file that `--config` takes.

    Args:
        context: of the command, which gets it as a parameter of that type.
        leave_out: keys, such as "overwrite", that say nothing of what is done.

    Raises:
        ConfigError: if a value cannot be written, as a path that is no Unicode.
    """
    settings = {
        _key(parameter): context.params[parameter.name]
        for parameter in dict.fromkeys(_parameters(context).values())
        if context.params.get(parameter.name) is not None
    }
    return to_toml({key: value for key, value in settings.items() if key not in leave_out})


def to_toml(settings: Mapping[str, Any]) -> str:
    """Write settings as TOML, one a line: texts, paths, enumerations, numbers, booleans, and lists of these.

    >>> print(to_toml({"out": Path("runs/birds"), "lr": 0.001, "ink": True, "sizes": [8, 16]}), end="")
    out = "runs/birds"
    lr = 0.001
    ink = true
    sizes = [8, 16]

    Raises:
        ConfigError: for a value that TOML has no word for, as None.
    """
    return "".join(f"{_toml_key(key)} = {_toml_value(key, value)}\n" for key, value in settings.items())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; expected a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error


def _parameters(context: typer.Context) -> dict[str, Any]:
    """Return the parameters that a file may set by each of their names, with "_" for "-"."""
    found = {}
    for parameter in context.command.params:
        if parameter.expose_value and not parameter.is_eager:
            for name in _names(parameter):
                found[name.replace("-", "_")] = parameter
    return found


def _names(parameter: Any) -> list[str]:
    """Return the long names of an option without the dashes, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return [parameter.name]
    return [name[2:] for name in parameter.opts if name.startswith("--")] or [parameter.name]


def _key(parameter: Any) -> str:
    """Return the key that a parameter is written with: the first of its names."""
    return _names(parameter)[0].replace("_", "-")


def _check(context: typer.Context, parameter: Any, value: Any, where: str) -> None:
    """Check a value by what the command makes of it: TOML has types, so that "10" is no number and 1 is not true."""
    takes_list = parameter.nargs != 1 or getattr(parameter, "multiple", False)
    if takes_list != isinstance(value, list):
        raise ConfigError(f"{where} must be {'a list' if takes_list else 'one value'}; got {value!r}")
    try:
        result = parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise ConfigError(f"{where}: {error.message.removeprefix('Value error, ')}") from error
    for given, made in zip(value, result, strict=True) if takes_list else [(value, result)]:
        if not _is_of_type(given, type(made)):
            raise ConfigError(f"{where} must be {_WORDS.get(type(made), 'text in quotes')}; got {given!r}")


def _is_of_type(value: Any, wanted: type) -> bool:
    """Tell whether a TOML value stands for a type: a whole number for a float, too, and text for all that is no number.

    >>> _is_of_type(3, float), _is_of_type("runs", Path), _is_of_type("3", int), _is_of_type(True, int)
    (True, True, False, False)
    """
    if wanted in (bool, int, str):
        return type(value) is wanted
    return type(value) in (int, float) if wanted is float else isinstance(value, str)


def _toml_key(key: str) -> str:
    is_bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if is_bare else _toml_text(key, key)


def _toml_value(key: str, value: Any) -> str:
    """Return a value in TOML's words."""
    writers: list[tuple[type | tuple[type, ...], Callable[[Any], str]]] = [
        (bool, lambda value: "true" if value else "false"),  # before int, which it is a kind of
        (Enum, lambda value: _toml_value(key, value.value)),
        (int, str),
        (float, lambda value: repr(value) if math.isfinite(value) else str(value)),
        ((str, Path), lambda value: _toml_text(key, str(value))),
        ((list, tuple), lambda value: "[" + ", ".join(_toml_value(key, item) for item in value) + "]"),
    ]
    for kind, write in writers:
        if isinstance(value, kind):
            return write(value)
    raise ConfigError(f"{key} cannot be written as TOML: {type(value).__name__} is no text, number or list of these")


def _toml_text(key: str, text: str) -> str:
    """Quote a text: TOML's rules for it are those of JSON, but that DEL is to be escaped and no surrogate may stand."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{key} cannot be written as TOML: {text!r} is no Unicode text")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
