"""A class and its arguments from one line of text: `MultiSimilarityLoss(alpha=2, base=0.5)`.

The text is read as a Python call whose arguments are literals; nothing is evaluated. Arguments are checked before the
class sees them, because pytorch-metric-learning hands unknown keywords from constructor to constructor and takes most
values as they come.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from vitembed.errors import ConfigError, unknown_name

_Made = TypeVar("_Made")

# Parameters whose values are objects, which a line of text cannot name.
_OBJECTS = {"loss", "losses", "miner", "miners", "distance", "reducer", "weight_init_func"}


def parse_call(spec: str, kind: str) -> tuple[str, dict[str, object]]:
    """Split `Name` or `Name(key=literal, ...)` into the name and the arguments.

    >>> parse_call("MultiSimilarityLoss(alpha=2, base=0.5)", "loss")
    ('MultiSimilarityLoss', {'alpha': 2, 'base': 0.5})
    >>> parse_call("cross-entropy", "loss")
    ('cross-entropy', {})

    Args:
        spec: the text.
        kind: what it names, for the error: "loss", "miner".

    Raises:
        ConfigError: it is anything else than such a call.
    """
    wanted = f"a {kind} is written Name or Name(key=value, ...) with plain values; got {spec!r}"
    match = re.fullmatch(r"\s*([A-Za-z_][\w-]*)\s*(\(.*\))?\s*", spec, flags=re.DOTALL)
    if match is None:
        raise ConfigError(wanted)
    try:
        # The name itself may have hyphens, as in cross-entropy, which Python would subtract.
        node = ast.parse(f"call{match[2] or '()'}", mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
            raise ConfigError(wanted)
        return match[1], {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(wanted) from error


def describe(value: object) -> str:
    """Return a loss or a miner in one line, with its settings, as a model records it.

    Objects of pytorch-metric-learning do not print most of their arguments, and functions print where they lie in
    memory, which is another place in the next process.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(value).split()))
    if not type(value).__module__.startswith("pytorch_metric_learning."):
        return text
    settings = {name: getattr(value, name, None) for name in _parameters(type(value))}
    shown = {name: setting for name, setting in settings.items() if isinstance(setting, bool | int | float | str)}
    parts = [f"{name}={setting!r}" for name, setting in shown.items()]
    parts += [f"{name}={describe(getattr(value, name))}" for name in ("distance", "reducer") if hasattr(value, name)]
    return f"{type(value).__name__}({', '.join(parts)})"


def construct(
    cls: type[_Made],
    arguments: Mapping[str, object],
    offered: Mapping[str, object] | None = None,
    check: Callable[[type, inspect.Parameter, object], bool] | None = None,
) -> _Made:
    """Call a class with keyword arguments that are checked against its constructors.

    Args:
        cls: the class; where its constructor passes keywords on, its bases' constructors count, too.
        arguments: name to value.
        offered: values for parameters that the class requires and `arguments` lacks; the rest is left unused.
        check: refuses a value of a class's parameter, or tells whether it knows the parameter; what it does not know is
            checked by the type of the default.

    Raises:
        ConfigError: an argument is unknown, missing, of another type, or refused by the class.
    """
    parameters = _parameters(cls)
    for name, value in arguments.items():
        if name not in parameters:
            raise unknown_name(f"argument of {cls.__name__}", name, parameters)
        if check is None or not check(cls, parameters[name], value):
            _check_value(cls.__name__, parameters[name], value)
    required = [name for name, p in parameters.items() if p.default is p.empty]
    given = {name: value for name, value in (offered or {}).items() if name in required} | dict(arguments)
    try:
        # What a base requires its subclass may fill in itself, so that only the call can tell what is missing.
        return cls(**given)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        if missing := [name for name in required if name not in given and f"'{name}'" in str(error)]:
            raise ConfigError(f"{cls.__name__} needs a value for {', '.join(missing)}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{cls.__name__} does not take these arguments: {reason}") from error


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the constructor and of those that it passes its keywords on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _check_value(owner: str, parameter: inspect.Parameter, value: object) -> None:
    """Refuse a value that is not of the default's type, or that a line of text cannot give."""
    name, default = parameter.name, parameter.default
    if name in _OBJECTS or name.endswith("_regularizer"):
        if value is not None:
            raise ConfigError(f"{owner}: {name} must be an object; build the {owner} in Python and pass it instead")
    elif name.endswith("_reg_weight"):
        raise ConfigError(f"{owner}: {name} weighs a regularizer, an object; build the {owner} in Python instead")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{owner}: {name} must be True or False; got {value!r}")
    elif isinstance(default, str):
        if not isinstance(value, str):
            raise ConfigError(f"{owner}: {name} must be a word such as {default!r}; got {value!r}")
    elif not (isinstance(value, int | float) and math.isfinite(value)) and (value is not None or default is not None):
        raise ConfigError(f"{owner}: {name} must be a finite number; got {value!r}")
