"""Trackers: the figures come out as they went in, a resumed run goes on, and a failing tracker stops no training."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitembed.errors import ConfigError, MissingExtraError
from vitembed.training.trackers import flatten, open_tracker


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what TensorBoard shows of a run."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_the_figures_that_were_logged(tmp_path: Path) -> None:
    with open_tracker(["tensorboard"], tmp_path, {"epochs": 3}) as tracker:
        for step in range(4):
            tracker.log({"loss": 2.0**-step, "recall@1": 0.5 if step % 2 else None}, step)
        tracker.log({"seconds": 3}, 7)
    assert read(tmp_path) == {
        "loss": [(0, 1.0), (1, 0.5), (2, 0.25), (3, 0.125)],
        "recall@1": [(1, 0.5), (3, 0.5)],
        "seconds": [(7, 3.0)],
    }


def test_a_resumed_run_goes_on_in_the_same_folder_and_hides_what_was_lost(tmp_path: Path) -> None:
    with open_tracker(["tensorboard"], tmp_path, {"epochs": 3}) as tracker:
        for step in range(6):
            tracker.log({"loss": float(step)}, step)
    with open_tracker(["tensorboard"], tmp_path, {"epochs": 3}, step=4) as tracker:  # the checkpoint was of step 3
        for step in (4, 5, 6):
            tracker.log({"loss": 100.0 + step}, step)
    assert read(tmp_path)["loss"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106)]
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1  # the settings are recorded once


def test_settings_are_recorded_as_plain_values(tmp_path: Path) -> None:
    import yaml

    @dataclass(frozen=True)
    class Guards:
        stop: bool = True
        steps: int | None = None

    settings = {"rate": 1e-3, "out": tmp_path, "guards": Guards(), "sizes": (8, 16), "deep": {"a": {"b": "c"}}}
    plain = {
        "rate": 1e-3,
        "out": str(tmp_path),
        "guards.stop": True,
        "guards.steps": "None",
        "sizes": "(8, 16)",
        "deep.a.b": "c",
    }
    assert flatten(settings) == plain
    open_tracker(["tensorboard"], tmp_path, settings).close()
    (file,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(file.read_text()) == plain


def test_no_tracker_does_nothing(tmp_path: Path) -> None:
    with open_tracker([], tmp_path, {"a": object()}) as tracker:
        tracker.log({"loss": math.nan}, 0)
    tracker.close()
    open_tracker([], None, {}).log({"loss": 1.0}, 0)
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState, "is_main_process", False)
    with open_tracker(["tensorboard"], tmp_path, {}) as tracker:
        tracker.log({"loss": 1.0}, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        open_tracker(["tensorbord"], tmp_path, {})
    with pytest.raises(ConfigError, match=r"Known: aim, .*mlflow.*tensorboard.*wandb"):
        open_tracker(["x"], tmp_path, {})


def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)  # which an earlier import left there
    with pytest.raises(MissingExtraError, match=r"pip install 'vitembed\[tensorboard\]'"):
        open_tracker(["tensorboard"], tmp_path, {})
    for name, package in [("wandb", "wandb"), ("mlflow", "mlflow"), ("comet_ml", "comet-ml")]:
        with pytest.raises(ConfigError, match=f"the tracker {name} needs a package: pip install {package}"):
            open_tracker([name], tmp_path, {})


def test_tensorboard_without_a_folder_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tensorboard writes files; give the run a folder"):
        open_tracker(["tensorboard"], None, {})


class StandIn(tracking.GeneralTracker):  # type: ignore[misc]
    """Takes the calls that accelerate's trackers take, and remembers them; no service answers to it."""

    requires_logging_directory = False
    made: "list[StandIn]" = []  # noqa: RUF012 - of the test alone
    fails_in = ""

    def __init__(self, project: str, **options: Any) -> None:
        self.calls: list[tuple[Any, ...]] = [("made", project, options)]
        self.made.append(self)

    def start(self) -> None:
        self._take("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._take("settings", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._take("log", values, step)

    def finish(self) -> None:
        self._take("finish")

    def _take(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails_in:
            raise RuntimeError("the server\nis away")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", StandIn)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn


def test_other_trackers_are_told_the_same_in_names_that_they_accept(tmp_path: Path, stand_in: type[StandIn]) -> None:
    folder = tmp_path / "birds"
    with open_tracker(["wandb", "mlflow", "wandb"], folder, {"loss": "triplet", "a": {"b:c": 1}}) as tracker:
        tracker.log({"recall@1": 0.5, "loss": 1.0}, 3)
    wandb, mlflow = stand_in.made
    assert wandb.calls == [
        ("made", "vitembed", {"name": "birds", "dir": str(folder)}),
        ("start",),
        ("settings", {"loss": "triplet", "a.b:c": 1}),
        ("log", {"recall@1": 0.5, "loss": 1.0}, 3),
        ("finish",),
    ]
    assert mlflow.calls == [
        ("made", "vitembed", {"run_name": "birds"}),
        ("start",),
        ("settings", {"loss": "triplet", "a.b_c": 1}),
        ("log", {"recall_at_1": 0.5, "loss": 1.0}, 3),
        ("finish",),
    ]


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "fails_in", "log")
    tracker = open_tracker(["wandb", "tensorboard"], tmp_path, {})
    with pytest.warns(
        RuntimeWarning, match="the tracker wandb failed and is left out from here on: the server is away"
    ):
        tracker.log({"loss": 1.0}, 0)
    tracker.log({"loss": 2.0}, 1)
    tracker.close()
    assert [call[0] for call in stand_in.made[0].calls] == ["made", "start", "settings", "log", "finish"]
    assert read(tmp_path) == {"loss": [(0, 1.0), (1, 2.0)]}


def test_a_tracker_that_fails_at_the_end_is_reported(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "fails_in", "finish")
    tracker = open_tracker(["wandb", "mlflow"], tmp_path, {})
    with pytest.warns(RuntimeWarning) as warned:
        tracker.close()
    assert ["wandb" in str(one.message) for one in warned] == [False, True]
    tracker.close()


@pytest.mark.parametrize("when", ["start", "settings"])
def test_a_tracker_that_cannot_be_opened_is_an_error_before_the_training(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(stand_in, "fails_in", when)
    with pytest.raises(ConfigError, match="the tracker wandb cannot be opened: the server is away"):
        open_tracker(["tensorboard", "wandb"], tmp_path, {})
