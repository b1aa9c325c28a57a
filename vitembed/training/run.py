"""A training between two steps: what it has reached, and all that it must be continued from.

`Run` does the steps, one epoch after the other, and knows nothing of files, bars or signals, which are the affair of
`vitembed.training.loop`. Its state after step n, put into a run that was made alike, continues to the same weights as
if it had never stopped: on a processor to the bit.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import TrainingError
from vitembed.training.averaging import MovingAverage
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.distributed import any_process, from_main, gather_objects, rank
from vitembed.training.hard_negatives import HardNegatives, Mined, embed_all, find_hard_negatives
from vitembed.training.health.collapse import CollapseDoctor, Diagnosis
from vitembed.training.learner import Learner, Loss, Miner, Step
from vitembed.training.outputs import snapshot
from vitembed.training.random_states import random_states, restore_random_states
from vitembed.training.stepper import check_finite
from vitembed.training.training_data import TrainingData
from vitembed.training.validation import Record, better_figure, validate

_OF_DISTANCES = ("loss", "positive_distance", "negative_distance")
LOOK_EVERY = 10  # steps; looking at a figure waits for the device


class Run:
    """A training in progress.

    Args:
        model: trained in place.
        loss: of embeddings or logits.
        miner: for a loss of embeddings; None for none.
        data: what is trained and validated on.
        config: the settings.
        provenance: what the model records of this training.

    Attributes:
        history: the records of the epochs that are over.
        best_epoch: whose weights `restore_best` gives to the model; 0 before the end of the first.
        diagnoses: what the doctor said, in the order of time.
        step: steps taken in all.
    """

    def __init__(
        self,
        model: Embedder,
        loss: Loss,
        miner: Miner | None,
        data: TrainingData,
        config: TrainConfig,
        provenance: Mapping[str, Any],
    ) -> None:
        self._model, self._data, self._config, self._provenance = model, data, config, dict(provenance)
        self.learner = Learner(model, loss, miner, config, steps=config.epochs * len(data.batches))
        self._average = MovingAverage(model.network, config.ema) if config.ema is not None else None
        self._doctor = CollapseDoctor.of_loss(loss)
        self.history: list[Record] = []
        self.diagnoses: list[str] = []
        self.best_epoch = 0
        self.step = 0
        self._best = snapshot(model)
        self._in_epoch = 0  # steps of this epoch that are done
        self._figures: dict[str, list[Tensor]] = {}
        self._seconds = 0.0  # of this epoch, before the process that runs now

    @property
    def epoch(self) -> int:
        """The epoch that is under way or comes next, from 1."""
        return len(self.history) + 1

    @property
    def dataset(self) -> ImageDataset:
        """The images that are trained on."""
        return self._data.pixels.dataset

    @property
    def unreadable(self) -> dict[str, str]:
        """The images that could not be read so far, and why."""
        return self._data.unreadable

    @property
    def best(self) -> Record:
        """The record of the best epoch."""
        return self.history[self.best_epoch - 1]

    @property
    def stopped_early(self) -> bool:
        """Whether the figures on what is held out have not become better for too long."""
        patience = self._config.patience
        if patience is None or self._data.validation is None or not self.history:
            return False
        return len(self.history) - self.best_epoch >= patience

    @property
    def is_over(self) -> bool:
        """Whether there is no epoch to come."""
        return len(self.history) >= self._config.epochs or self.stopped_early

    @property
    def mines_now(self) -> bool:
        """Whether hard negatives are to be searched for before the next step."""
        settings = self._config.hard_negatives
        return settings is not None and self._in_epoch == 0 and settings.due(self.epoch)

    def mine(self) -> Mined:
        """Search the training images for hard negatives, which the batches of the next epochs are made of."""
        pixels = self._data.pixels
        with self.averaged():
            vectors, readable = embed_all(self._model, pixels.in_order(256, workers=self._data.workers), len(pixels))
        mined = find_hard_negatives(
            vectors,
            pixels.dataset.labels,
            self._config.hard_negatives or HardNegatives(),
            forgery_of=pixels.dataset.forgery_of,
            known=readable,
        )
        mined = from_main(mined)  # on a GPU the processes may differ in the last digits
        self._data.use_neighbours(mined.neighbours)
        return mined

    def steps(self) -> Iterator[Step]:
        """Take the steps of an epoch that are not taken yet, and yield what each leaves to look at."""
        started = time.perf_counter() - self._seconds
        self.learner.freeze(self.epoch <= self._config.fine_tune.frozen_epochs)
        batches = self._data.batches
        batches.epoch = self.epoch
        batches.start = self._in_epoch
        for batch in self._data.pixels.batches(batches, workers=self._data.workers):
            if any_process(not len(batch.labels)):  # nothing of it could be read, by some process at least
                self._in_epoch += 1
                continue
            step = self.learner.step(batch, look=self.step % LOOK_EVERY == 0)
            if self._average:
                self._average.update()
            for name, figure in step.figures.items():
                self._figures.setdefault(name, []).append(figure.to(self._model.device, non_blocking=True))
            self._in_epoch += 1
            self.step += 1
            self._seconds = time.perf_counter() - started
            yield step
        self._model.network.eval()

    def diagnose(self, step: Step) -> Diagnosis | None:
        """Return what the doctor finds wrong with the training; None where nothing is, or nothing was measured.

        Raises:
            TrainingError: if the loss is NaN or infinite.
        """
        if step.signals is None:
            return None
        loss, signals = from_main((step.figures["loss"].item(), step.signals))
        check_finite(loss)
        diagnosis = self._doctor.observe(self.step, signals)
        return self._note(diagnosis)

    def _note(self, diagnosis: Diagnosis | None) -> Diagnosis | None:
        """Write down what the doctor says."""
        if diagnosis is not None:
            self.diagnoses.append(str(diagnosis))
        return diagnosis

    def check_sound(self) -> None:
        """Check what would be saved: a broken checkpoint must not take the place of a sound one.

        Raises:
            TrainingError: if a loss of this epoch, or a number of the network, is NaN or infinite.
        """
        if self._figures:
            check_finite(torch.stack(self._figures["loss"]).sum().item())
        floats = [tensor for tensor in self._model.network.state_dict().values() if tensor.is_floating_point()]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all()):
            raise TrainingError(
                f"the weights became NaN or infinite before step {self.step}: lower the learning rate, or use "
                "precision fp32; the checkpoints before this one are sound"
            )

    def end_epoch(self) -> Record:
        """Validate, keep the weights if they are the best so far, and return the record of the epoch.

        Raises:
            TrainingError: if the loss was NaN or infinite at some step.
        """
        started = time.perf_counter()
        if not self._figures:
            raise TrainingError("no step could be taken: no batch had images that could be read")
        self.check_sound()
        means = {name: _mean(name, torch.stack(figures)) for name, figures in self._figures.items()}
        with self.averaged():
            validated = validate(self._model, self._data.validation, self._data.classes, self._data.workers)
            seconds = round(self._seconds + time.perf_counter() - started, 3)
            record: Record = {
                "epoch": self.epoch,
                **means,
                **validated,
                "learning_rate": self.learner.learning_rate,
                "seconds": seconds,
            }
            record = from_main(record)  # what is best and when to stop follow from it, in all processes alike
            self.history.append(record)
            figure = better_figure(self._data.classes)
            if self.best_epoch == 0 or self._data.validation is None or record[figure] >= self.best[figure]:
                self.best_epoch, self._best = len(self.history), snapshot(self._model)
                self._model.provenance = {**self._provenance, **_figures(record)}
        if self.is_over and "drift" not in record:  # with a memory the loss is not to be held to its margin
            self._note(self._doctor.conclude(*(record[name] for name in _OF_DISTANCES)))
        self._data.note_unreadable(self._data.unreadable_parts())
        self._in_epoch, self._seconds, self._figures = 0, 0.0, {}
        return record

    def restore_best(self) -> None:
        """Give the model the weights of the best epoch; those of the start if none has ended."""
        self.learner.freeze(False)
        self._model.network.load_state_dict(self._best)
        self._model.network.eval()

    def averaged(self) -> AbstractContextManager[None]:
        """Let the network have the averaged weights, if an average is kept: they are what is validated and saved."""
        return self._average.applied() if self._average else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the training is continued from."""
        neighbours = self._data.neighbours
        return {
            "step": self.step,
            "in epoch": self._in_epoch,
            "seconds": self._seconds,
            "figures": {name: torch.stack(figures).cpu() for name, figures in self._figures.items()},
            "history": self.history,
            "best epoch": self.best_epoch,
            "best": self._best,
            "provenance": self._provenance,
            "model provenance": self._model.provenance,
            "network": self._model.network.state_dict(),
            "learner": self.learner.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "doctor": self._doctor.state_dict(),
            "diagnoses": self.diagnoses,
            "neighbours": None if neighbours is None else torch.from_numpy(neighbours),
            "unreadable": self._data.unreadable_parts(),
            "random": gather_objects(random_states()),
        }

    def summary(self) -> dict[str, Any]:
        """Return what is left of a training that is over: its figures and its best weights."""
        return {
            "step": self.step,
            "history": self.history,
            "best epoch": self.best_epoch,
            "best": self._best,
            "model provenance": self._model.provenance,
            "diagnoses": self.diagnoses,
            "unreadable": self._data.unreadable_parts(),
        }

    def load_summary(self, summary: Mapping[str, Any]) -> None:
        """Take over the end of a training."""
        self.step, self.history = summary["step"], list(summary["history"])
        self.best_epoch, self._best = summary["best epoch"], summary["best"]
        self._model.provenance, self.diagnoses = summary["model provenance"], list(summary["diagnoses"])
        self._data.note_unreadable(summary["unreadable"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; the settings and the data must be the same."""
        self.step, self._in_epoch, self._seconds = state["step"], state["in epoch"], state["seconds"]
        device = self._model.device  # a checkpoint is read to the processor, and the figures to come are not there
        self._figures = {name: list(figures.to(device).unbind()) for name, figures in state["figures"].items()}
        self.history, self.best_epoch, self._best = list(state["history"]), state["best epoch"], state["best"]
        self._provenance, self._model.provenance = state["provenance"], state["model provenance"]
        self._model.network.load_state_dict(state["network"])
        self.learner.load_state_dict(state["learner"])
        if self._average:
            self._average.load_state_dict(state["average"])
        self._doctor.load_state_dict(state["doctor"])
        self.diagnoses = list(state["diagnoses"])
        neighbours = state["neighbours"]
        self._data.use_neighbours(None if neighbours is None else neighbours.numpy())
        self._data.note_unreadable(state["unreadable"])
        restore_random_states(state["random"][rank()])


def _mean(name: str, figures: Tensor) -> float | None:
    """Return the mean over an epoch; of a drift over the steps that could measure it, None if no step could."""
    if name in ("drift", "age"):
        figures = figures[~figures.isnan()]
        return figures.mean().item() if len(figures) else None
    return figures.mean().item()


def _figures(record: Record) -> dict[str, Any]:
    """Return what a model records of the epoch that its weights are of."""
    figures = {"epoch": record["epoch"], "validation recall@1": record["recall@1"]}
    return figures | {name: record[name] for name in ("validation accuracy",) if name in record}
