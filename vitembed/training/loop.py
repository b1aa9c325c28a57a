"""The training loop: steps, a look at how they go, validation on what was held out, the best model kept.

`train` is the whole of it and reads from top to bottom. `vitembed.training.run` has the steps, and here is what
surrounds them: the folder, checkpoints, signals, the bar, the doctor's word, trackers.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from vitembed.embedder import Embedder
from vitembed.errors import TrainingError
from vitembed.training.allocation import kept_memory
from vitembed.training.arrangement import arrange
from vitembed.training.classification import fit_head
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.distributed import (
    any_process,
    check_alike,
    check_same_weights,
    from_main,
    join_processes,
    lost_process,
    on_main,
    rank,
)
from vitembed.training.identity import identity
from vitembed.training.interruption import Termination, deferred_termination
from vitembed.training.learner import Loss, Miner, Step, cheaper_training
from vitembed.training.losses.metric import TripletLoss
from vitembed.training.outputs import check_out
from vitembed.training.provenance import trained_from
from vitembed.training.random_states import seed_everything
from vitembed.training.run import Run
from vitembed.training.run_files import RunFiles
from vitembed.training.shared_norms import shared_norms
from vitembed.training.trackers import Trackers, check_trackers, open_tracker
from vitembed.training.training_data import TrainingData
from vitembed.training.validation import Record


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        history: one record an epoch: "epoch", "loss", "active" (share of triplets or pairs with a non-zero term, where
            the loss knows it), "positive_distance" and "negative_distance" (Euclidean, in [0, 2]), "recall@1" on what
            was held out, "learning_rate", "seconds"; with a cross-batch memory "drift" and "age" of its entries, the
            means over the steps, None where none could tell; from a classification loss also "accuracy" (of the changed
            training images, while they are learned) and "validation accuracy".
        best_epoch: whose weights the model has now: the highest recall@1, from a classification loss the highest
            validation accuracy, the later of equals; the last epoch where nothing was held out.
        recall_at_1: of that epoch; None where nothing was held out.
        accuracy: of that epoch on what was held out; None where nothing was, or the loss is none of classification.
        diagnoses: what the doctor said of the training, with the steps.
        unreadable: the images that were set aside because they could not be read, and why.
    """

    history: list[Record]
    best_epoch: int
    recall_at_1: float | None
    accuracy: float | None = None
    diagnoses: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def train(
    model: Embedder,
    dataset: ImageDataset,
    *,
    loss: Loss | None = None,
    miner: Miner | None = None,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trackers: Sequence[str] = (),
    settings: str | None = None,
    progress: bool = False,
) -> TrainResult:
    """Train an embedder in place; afterwards it has the weights of the best epoch.

    Args:
        model: the embedder to train.
        dataset: labelled images.
        loss: `TripletLoss`, `ContrastiveLoss`, any pytorch-metric-learning loss, or anything with their contract
            `loss(embeddings, labels, tuples)`; None for `TripletLoss()`. `CrossEntropyLoss`, or any other that says
            `needs_logits = True`, is called as `loss(logits, labels)`: the network gets a classification head for the
            classes, unless it has one for just these. Other losses do not train a head, and take one off.
        miner: `miner(embeddings, labels) -> tuples` for the loss; None for none.
        config: the settings.
        out: folder for the best model so far, history.json and curve.png, written after every epoch, and for
            checkpoints; None for nowhere.
        overwrite: whether `out` may already hold a model.
        resume: go on with the training in `out` where its last checkpoint left it, with the same arguments, to the
            same weights as if it had never stopped; begin it where there is none yet.
        trackers: where figures are sent to as well: "tensorboard", "wandb", "mlflow".
        settings: text to be kept in `out` as settings.toml, such as the flags of a command.
        progress: show a progress bar on standard error.

    Raises:
        CheckpointError: if the training in `out` was another one, or its checkpoint is damaged.
        ConfigError: if loss, miner, settings and model do not go together.
        DataError: if the data set has too few classes or images, or too many of its images cannot be read.
        TrainingError: if `out` holds a model already, the loss becomes NaN or infinite, the doctor finds the training
            past hope, or a checkpoint cannot be saved; after SIGTERM, where its handler lets the process live.
    """
    join_processes(model.device)
    loss = loss or TripletLoss()
    folder = check_out(out, overwrite, resume=resume)
    check_trackers(trackers)
    arranged = arrange(model, dataset, loss, miner, config or TrainConfig())
    config = arranged.config
    data = TrainingData.of(model, arranged)
    provenance = trained_from(model, arranged, loss, miner)
    described = identity(model, dataset, loss, miner, config)
    seed_everything(config.seed)
    fit_head(model, data.classes, config.head)
    run = Run(model, loss, miner, data, config, provenance)
    seed_everything(config.seed + rank())  # from here on each process drops patches of its own
    check_alike(described)
    check_same_weights(model.network)
    with closing(RunFiles(folder, model, run, described, config.safeguards)) as files:
        files.begin(resume=resume, settings=settings)
        with open_tracker(trackers, folder, described, step=run.step) as tracker:
            _run_through(run, files, model, config, tracker, progress=progress)
        files.finish()
    best = run.best
    return TrainResult(
        run.history, run.best_epoch, best["recall@1"], best.get("validation accuracy"), run.diagnoses, data.unreadable
    )


def _run_through(
    run: Run, files: RunFiles, model: Embedder, config: TrainConfig, tracker: Trackers, *, progress: bool
) -> None:
    """Train from where a run stands to its end."""
    hidden = not progress or not on_main()
    with (
        kept_memory(model.device),
        cheaper_training(model.network, config),
        shared_norms(model.network),
        deferred_termination() as termination,
        tqdm(total=run.learner.steps, initial=run.step, unit="batch", disable=hidden) as bar,
    ):
        try:
            while not run.is_over:
                bar.set_description(f"epoch {run.epoch}/{config.epochs}")
                if run.mines_now:
                    files.write_suspects(run.mine())
                for step in run.steps():
                    bar.update()
                    _look(run, step, bar, tracker, config)
                    _save_or_leave(files, termination, run)
                said = len(run.diagnoses)
                tracker.log(run.end_epoch(), run.step)
                for diagnosis in run.diagnoses[said:]:
                    _tell(diagnosis, bar)
                files.end_epoch()
                _save_or_leave(files, termination, run)
        except RuntimeError as error:
            lost = lost_process(error)
            if lost is None:
                raise
            raise lost from error
        finally:  # after an error or Ctrl-C, too, the model has the weights of its best epoch so far
            run.restore_best()


def _look(run: Run, step: Step, bar: Any, tracker: Trackers, config: TrainConfig) -> None:
    """Show and send the figures of a step, and hear the doctor.

    Raises:
        TrainingError: if the loss is NaN or infinite, or to go on is useless.
    """
    if step.signals is None:
        return
    figures = {name: value.item() for name, value in step.figures.items()}
    bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
    diagnosis = run.diagnose(step)
    tracker.log({**figures, "learning_rate": run.learner.learning_rate}, run.step)
    if diagnosis is None:
        return
    if diagnosis.fatal and config.safeguards.on_collapse == "stop":
        raise TrainingError(f"training was stopped: {diagnosis}")
    if bar.disable and on_main():
        warnings.warn(str(diagnosis), RuntimeWarning, stacklevel=3)
    _tell(str(diagnosis), bar)


def _tell(diagnosis: str, bar: Any) -> None:
    """Write what the doctor said above the bar, where there is one."""
    if not bar.disable:
        bar.write(f"vitembed: warning: {diagnosis}", file=sys.stderr)


def _save_or_leave(files: RunFiles, termination: Termination, run: Run) -> None:
    """Save a checkpoint if one is due; if the process is to end, save one and leave.

    Raises:
        TrainingError: if the process is to end; the signal follows as soon as the training has put things in order.
    """
    leave = any_process(termination.requested)
    if from_main(files.due) or leave:
        files.save()
    if leave:
        saved = "; resume goes on from there" if files.folder else "; without a folder nothing was saved"
        raise TrainingError(f"training was ended by {termination.name} after step {run.step}{saved}")
