"""The training loop: batches, a loss, validation on what was held out, the best model kept.

`train` is the whole of it and reads from top to bottom; a step is the work of `vitembed.training.learner`.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from vitembed.decoding import default_workers
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError
from vitembed.files import atomic_write
from vitembed.metrics import recall_at_k
from vitembed.plots import plot_history
from vitembed.training.classification import ShuffledBatches, check_classifiable, fit_head
from vitembed.training.config import TrainConfig
from vitembed.training.datasets import ImageDataset, PixelDataset
from vitembed.training.learner import Learner, Loss, Miner, Record, cheaper_training, needs_logits
from vitembed.training.losses import TripletLoss
from vitembed.training.outputs import check_out, make_folder, snapshot
from vitembed.training.provenance import origin
from vitembed.training.sampling import ClassBalancedSampler


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        history: one record an epoch: "epoch", "loss", "active" (share of triplets or pairs with a non-zero term, where
            the loss knows it), "positive_distance" and "negative_distance" (Euclidean, in [0, 2]), "recall@1" on what
            was held out, "learning_rate", "seconds"; from a classification loss also "accuracy" (of the changed
            training images, while they are learned) and "validation accuracy".
        best_epoch: whose weights the model has now: the highest recall@1, from a classification loss the highest
            validation accuracy, the later of equals; the last epoch where nothing was held out.
        recall_at_1: of that epoch; None where nothing was held out.
        accuracy: of that epoch on what was held out; None where nothing was, or the loss is none of classification.
    """

    history: list[Record]
    best_epoch: int
    recall_at_1: float | None
    accuracy: float | None = None


def train(
    model: Embedder,
    dataset: ImageDataset,
    *,
    loss: Loss | None = None,
    miner: Miner | None = None,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
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
        out: folder for the best model so far, history.json and curve.png, written after every epoch; None for nowhere.
        overwrite: whether `out` may already hold a model.
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: if loss, miner, settings and model do not go together.
        DataError: if the data set has too few classes or images.
        ImageError: for an image that cannot be read.
        TrainingError: if `out` holds a model already, or the loss becomes NaN or infinite.
    """
    loss = loss or TripletLoss()
    config = _settle(config or TrainConfig(), loss, miner)
    folder = check_out(out, overwrite)
    train_set, held_out = dataset.split(
        config.validation or "classes",
        share=config.validation_share,
        seed=config.seed,
        again=model.provenance.get("held-out classes", ()),
    )
    classes = train_set.classes if needs_logits(loss) else ()  # what the network learns to name
    if classes:
        check_classifiable(model, train_set, held_out)
    workers = default_workers() if config.workers is None else config.workers
    pixels = PixelDataset(train_set, model.preprocess, workers=workers)
    validation = PixelDataset(held_out, model.preprocess, workers=workers) if held_out else None
    sampler = _sampler(train_set, config, classes)
    provenance = _provenance(model, config, loss, miner, train_set, held_out)
    torch.manual_seed(config.seed)
    fit_head(model, classes, config.head)
    learner = Learner(model, loss, miner, config, steps=config.epochs * len(sampler))
    if folder:
        make_folder(folder)

    score = "validation accuracy" if classes else "recall@1"
    history: list[Record] = []
    best_epoch, best_state = 0, snapshot(model)
    try:
        with (
            cheaper_training(model.network, config),
            tqdm(total=learner.steps, unit="batch", disable=not progress) as bar,
        ):
            for epoch in range(1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                started = time.perf_counter()
                sampler.epoch = epoch
                record = {"epoch": epoch, **learner.run_epoch(pixels.batches(sampler, workers=workers), bar)}
                record |= _validate(model, validation, classes, workers)
                record["learning_rate"] = learner.learning_rate
                record["seconds"] = round(time.perf_counter() - started, 3)
                history.append(record)
                if best_epoch == 0 or validation is None or record[score] >= history[best_epoch - 1][score]:
                    best_epoch, best_state = epoch, snapshot(model)
                    model.provenance = {**provenance, **_figures(record)}
                    if folder:
                        model.save_pretrained(folder)
                if folder:
                    atomic_write(folder / "history.json", json.dumps(history, indent=1) + "\n")
                    atomic_write(folder / "curve.png", plot_history(history, best_epoch))
    finally:  # after an error or Ctrl-C, too, the model has the weights of its best epoch so far
        model.network.load_state_dict(best_state)
        model.network.eval()
    best = history[best_epoch - 1]
    return TrainResult(history, best_epoch, best["recall@1"], best.get("validation accuracy"))


def _settle(config: TrainConfig, loss: Loss, miner: Miner | None) -> TrainConfig:
    """Fill in what depends on the loss, and refuse what does not go with it."""
    if not needs_logits(loss):
        if config.head is not None:
            raise ConfigError(f"head {config.head!r} is for a classification loss such as cross-entropy; got {loss}")
        return dataclasses.replace(config, validation=config.validation or "classes")
    if miner is not None:
        raise ConfigError(f"a miner chooses pairs of embeddings, but {loss} is of logits; leave the miner out")
    if config.validation == "classes":
        raise ConfigError(
            "a classifier cannot name classes that it never saw, so validation 'classes' does not go with "
            f"{loss}; hold out 'images' or 'none'"
        )
    return dataclasses.replace(config, validation=config.validation or "images")


def _sampler(
    train_set: ImageDataset, config: TrainConfig, classes: Sequence[str]
) -> ClassBalancedSampler | ShuffledBatches:
    """Return batches with pairs in them, or, where the network learns to name classes, of images as they come."""
    if classes:
        return ShuffledBatches(len(train_set), config.classes_per_batch * config.images_per_class, seed=config.seed)
    return ClassBalancedSampler(
        train_set.labels,
        classes_per_batch=config.classes_per_batch,
        images_per_class=config.images_per_class,
        seed=config.seed,
    )


def _validate(model: Embedder, held_out: PixelDataset | None, classes: Sequence[str], workers: int) -> Record:
    """Measure what was held out: recall@1 and, with classes, how often the right one is named; None without images."""
    if held_out is None:
        return {"recall@1": None, "validation accuracy": None} if classes else {"recall@1": None}
    batches = held_out.in_order(256, workers=workers)
    if not classes:
        vectors = np.concatenate([model.embed_pixels(pixels) for pixels, _ in batches])
        return {"recall@1": _recall_at_1(vectors, held_out)}
    parts = [model.embed_and_classify(pixels) for pixels, _ in batches]
    vectors, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    # The held-out part numbers its classes by itself: one without an image there has no number.
    number = {name: position for position, name in enumerate(classes)}
    right = (
        logits.argmax(axis=1) == np.array([number[name] for name in held_out.dataset.classes])[held_out.dataset.labels]
    )
    return {"recall@1": _recall_at_1(vectors, held_out), "validation accuracy": float(right.mean())}


def _recall_at_1(vectors: NDArray[np.float32], held_out: PixelDataset) -> float:
    return float(recall_at_k(vectors, held_out.dataset.labels, ks=(1,))[1])


def _figures(record: Record) -> dict[str, Any]:
    """Return what a model records of the epoch that its weights are of."""
    figures = {"epoch": record["epoch"], "validation recall@1": record["recall@1"]}
    return figures | {name: record[name] for name in ("validation accuracy",) if name in record}


def _provenance(
    model: Embedder,
    config: TrainConfig,
    loss: Loss,
    miner: Miner | None,
    train_set: ImageDataset,
    held_out: ImageDataset | None,
) -> dict[str, Any]:
    """Say where the weights come from.

    The classes that earlier trainings recorded stay trained. What the makers of a foreign checkpoint trained on is not
    known, and a pre-training saw images without their classes: neither makes a class a trained one.
    """
    before = model.provenance
    seen = set(before.get("trained classes", ())) | set(train_set.classes)
    unseen = set(held_out.classes) - seen if held_out else set()
    return {
        **origin(model),
        "training images": len(train_set),
        "trained classes": sorted(seen),
        "held-out classes": sorted(unseen),  # what an honest figure or threshold may be measured on
        **({"classes": list(train_set.classes)} if needs_logits(loss) else {}),  # in the order of the logits
        "loss": str(loss),
        "miner": None if miner is None else str(miner),
        "settings": dataclasses.asdict(config),
    }
