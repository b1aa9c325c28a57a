"""Figures of a run sent to TensorBoard, Weights & Biases, MLflow, or another tracker that accelerate knows.

A tracker shows a run; it is no part of it. One that cannot be opened is an error before the training starts; one that
fails later, as when its server is away, is reported once and left out, and the training goes on.
"""

import contextlib
import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from vitembed.errors import ConfigError, MissingExtraError, unknown_name

PROJECT = "vitembed"  # under which W&B, MLflow and their like list the runs
TRACKERS = tuple(str(name) for name in LOGGER_TYPE_TO_CLASS)

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}

Plain = str | bool | int | float


def check_trackers(names: Sequence[str]) -> None:
    """Check, before anything is written, that trackers are known and installed.

    Raises:
        ConfigError: for an unknown name.
        MissingExtraError: for TensorBoard without its package.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        packages = _PACKAGES.get(name, ())
        by_accelerate = LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking"
        if packages and by_accelerate and not any(importlib.util.find_spec(package) for package in packages):
            raise _missing(name)


def open_tracker(
    names: Sequence[str], folder: Path | None, settings: Mapping[str, Any], *, step: int = 0
) -> "Trackers":
    """Open the named trackers, on the main process alone; call it after the `Accelerator` was made.

    Args:
        names: of `TRACKERS`; none for a tracker that does nothing.
        folder: of the run. TensorBoard writes into `folder/tensorboard`, and goes on there when a run is resumed; the
            run is called like the folder elsewhere. W&B and MLflow go on with an earlier run where their variables
            WANDB_RUN_ID and WANDB_RESUME, or MLFLOW_RUN_ID, say so.
        settings: of the run, nested as they may be; recorded under names such as "safeguards.on_collapse".
        step: of the first figures to come; TensorBoard then hides what an interrupted run wrote from there on.

    Raises:
        ConfigError: for an unknown name, a tracker that needs a folder without one, one that cannot be opened, or one
            other than TensorBoard whose package is not installed.
        MissingExtraError: for TensorBoard without its package.
    """
    check_trackers(names)
    trackers = Trackers()
    if not names or not PartialState().is_main_process:
        return trackers
    plain = flatten(settings)
    try:
        for name in dict.fromkeys(names):
            trackers.add(name, _start(name, folder, plain, step))
    except BaseException:
        trackers.close()
        raise
    return trackers


class Trackers:
    """The open trackers of a run; a context manager that closes them."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, tracker: Any) -> None:
        """Send figures to this tracker of accelerate, too."""
        self._open[name] = tracker

    def log(self, figures: Mapping[str, float | None], step: int) -> None:
        """Record figures by name at a step; those that are None are left out."""
        known = {name: value for name, value in figures.items() if value is not None}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log({_name_for(name, figure): value for figure, value in known.items()}, step=step)
            except Exception as error:  # whatever a client of a server raises
                self._leave_out(name, error)

    def close(self) -> None:
        """Write what is still to be written and close every tracker; harmless when they are closed already."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.finish()
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        tracker = self._open.pop(name, None)
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"the tracker {name} failed and is left out from here on: {reason}", RuntimeWarning, stacklevel=3)
        if tracker is not None:
            with contextlib.suppress(Exception):  # it has failed once
                tracker.finish()


def flatten(settings: Mapping[str, Any]) -> dict[str, Plain]:
    """Return settings under dotted names as text, numbers and booleans, which is what trackers take.

    >>> flatten({"epochs": 3, "augment": {"turn": 0.1, "crop": None}, "sizes": (1, 2)})
    {'epochs': 3, 'augment.turn': 0.1, 'augment.crop': 'None', 'sizes': '(1, 2)'}
    """
    plain: dict[str, Plain] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            plain |= {f"{name}.{inner}": item for inner, item in flatten(value).items()}
        else:
            plain[str(name)] = value if isinstance(value, str | bool | int | float) else str(value)
    return plain


def _start(name: str, folder: Path | None, settings: Mapping[str, Plain], step: int) -> Any:
    """Open one of accelerate's trackers and record the settings in it."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if folder is None and kind.requires_logging_directory:
        raise ConfigError(f"the tracker {name} writes files; give the run a folder, or leave the tracker out")
    is_new = name != "tensorboard" or not any((Path(folder or "") / name).glob("events*"))
    try:
        tracker = kind(*_place(name, kind, folder), **_options(name, folder, step))
        if hasattr(tracker, "start"):  # older trackers of accelerate start when they are made
            tracker.start()
        if is_new:
            tracker.store_init_configuration({_name_for(name, key): value for key, value in settings.items()})
    except ImportError as error:
        raise _missing(name) from error
    except Exception as error:  # no login, no server, no disk
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the tracker {name} cannot be opened: {reason}") from error
    return tracker


def _missing(name: str) -> ConfigError | MissingExtraError:
    if name == "tensorboard":
        return MissingExtraError("the tracker tensorboard", "tensorboard")
    return ConfigError(f"the tracker {name} needs a package: pip install {name.replace('_', '-')}")


def _place(name: str, kind: Any, folder: Path | None) -> list[str]:
    """Return accelerate's name of the run, and the folder where the tracker has one: it writes to folder/name."""
    if not kind.requires_logging_directory:
        return [PROJECT]
    return [name if name == "tensorboard" else PROJECT, str(folder)]


def _options(name: str, folder: Path | None, step: int) -> dict[str, Any]:
    """Return what a tracker is told besides: where to go on, or what to call the run."""
    if name == "tensorboard":
        return {"purge_step": step} if step else {}
    if folder is None:
        return {}
    return {"wandb": {"name": folder.name, "dir": str(folder)}, "mlflow": {"run_name": folder.name}}.get(name, {})


def _name_for(tracker: str, name: str) -> str:
    """Spell a name as a tracker accepts it: MLflow takes letters, digits and _ - . / and blanks, and no "@"."""
    return re.sub(r"[^\w\-./ ]", "_", name.replace("@", "_at_")) if tracker == "mlflow" else name
