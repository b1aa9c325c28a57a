"""The training loop: batches of classes, a loss, validation on what was held out, the best model kept.

`train` is the whole of it and reads from top to bottom; devices and mixed precision are the work of `accelerate`.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

import vitembed
from vitembed.embedder import Embedder, default_workers
from vitembed.errors import ConfigError, TrainingError, unknown_name
from vitembed.files import atomic_write
from vitembed.metrics import recall_at_k
from vitembed.plots import plot_history
from vitembed.training.augment import Augment
from vitembed.training.datasets import VALIDATIONS, ImageDataset, PixelDataset, Validation
from vitembed.training.losses import TripletLoss
from vitembed.training.sampling import ClassBalancedSampler

Record = dict[str, Any]  # the figures of one epoch, as they stand in history.json
Loss = Callable[..., Tensor]  # loss(embeddings, labels, tuples) -> scalar, the contract of pytorch-metric-learning
Miner = Callable[[Tensor, Tensor], Any]  # miner(embeddings, labels) -> tuples

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Attributes:
        epochs: passes over the training images; in each, every image comes at least once.
        classes_per_batch: P, classes that meet in a batch.
        images_per_class: K, images of each. P x K = 128 fits a small ViT on a processor; more negatives help.
        learning_rate: the highest; 1e-3 suits a small ViT from scratch, 1e-5 to 1e-4 one that knows something already.
        weight_decay: of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), on matrices only.
        warmup: share of the steps in which the rate rises from 0; then it falls to 0 along a cosine.
        clip: largest norm of the gradient.
        augment: random changes to the training images.
        validation: what is held out: whole "classes" (never seen in training), "images" of every class, or "none".
        validation_share: of the classes or images.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where a CUDA device has it, else fp32.
        workers: processes that decode images; None takes one a processor core, 8 at most.
        seed: of batches, augmentation and the split; on a processor equal seeds give equal weights.

    Raises:
        ConfigError: if a value is out of range.
    """

    epochs: int = 20
    classes_per_batch: int = 32
    images_per_class: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    augment: Augment = Augment()  # noqa: RUF009 - frozen
    validation: Validation = "classes"
    validation_share: float = 0.2
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # What each number must be: a condition that NaN does not meet either, and its words.
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "classes_per_batch": (self.classes_per_batch >= 2, "at least 2, else a batch has no negatives"),
            "images_per_class": (self.images_per_class >= 2, "at least 2, else a batch has no positives"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or above"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "clip": (0 < self.clip < math.inf, "above 0"),
            "validation_share": (0 < self.validation_share < 1, "in (0, 1)"),
            "workers": (self.workers is None or self.workers >= 0, "0 or above, or None"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2^63)"),
        }
        for name, (holds, words) in rules.items():
            if not holds:
                raise ConfigError(f"{name} must be {words}; got {getattr(self, name)}")
        if self.validation not in VALIDATIONS:
            raise unknown_name("validation", self.validation, VALIDATIONS)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        history: one record an epoch: "epoch", "loss", "active" (share of triplets or pairs with a non-zero term, where
            the loss knows it), "positive_distance" and "negative_distance" (Euclidean, in [0, 2]), "recall@1" on what
            was held out, "learning_rate", "seconds".
        best_epoch: whose weights the model has now: the highest recall@1, the later of equals; the last epoch where
            nothing was held out.
        recall_at_1: of that epoch; None where nothing was held out.
    """

    history: list[Record]
    best_epoch: int
    recall_at_1: float | None


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
            `loss(embeddings, labels, tuples)`; None for `TripletLoss()`.
        miner: `miner(embeddings, labels) -> tuples` for the loss; None for none.
        config: the settings.
        out: folder for the best model so far, history.json and curve.png, written after every epoch; None for nowhere.
        overwrite: whether `out` may already hold a model.
        progress: show a progress bar on standard error.

    Raises:
        DataError: if the data set has too few classes or images.
        ImageError: for an image that cannot be read.
        TrainingError: if `out` holds a model already, or the loss becomes NaN or infinite.
    """
    config = config or TrainConfig()
    loss = loss or TripletLoss()
    folder = _check_out(out, overwrite)
    train_set, held_out = dataset.split(
        config.validation,
        share=config.validation_share,
        seed=config.seed,
        again=model.provenance.get("held-out classes", ()),
    )
    workers = default_workers() if config.workers is None else config.workers
    pixels = PixelDataset(train_set, model.preprocess, workers=workers)
    validation = PixelDataset(held_out, model.preprocess, workers=workers) if held_out else None
    sampler = ClassBalancedSampler(
        train_set.labels,
        classes_per_batch=config.classes_per_batch,
        images_per_class=config.images_per_class,
        seed=config.seed,
    )
    torch.manual_seed(config.seed)
    learner = _Learner(model, loss, miner, config, steps=config.epochs * len(sampler))
    provenance = _provenance(model, config, loss, miner, train_set, held_out)
    if folder:
        _make_folder(folder)

    history: list[Record] = []
    best_epoch, best_state = 0, _snapshot(model)
    try:
        with tqdm(total=learner.steps, unit="batch", disable=not progress) as bar:
            for epoch in range(1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                started = time.perf_counter()
                sampler.epoch = epoch
                record = {"epoch": epoch, **learner.run_epoch(pixels.batches(sampler, workers=workers), bar)}
                record["recall@1"] = _recall_at_1(model, validation, workers) if validation else None
                record["learning_rate"] = learner.learning_rate
                record["seconds"] = round(time.perf_counter() - started, 3)
                history.append(record)
                if best_epoch == 0 or validation is None or record["recall@1"] >= history[best_epoch - 1]["recall@1"]:
                    best_epoch, best_state = epoch, _snapshot(model)
                    model.provenance = {**provenance, "epoch": epoch, "validation recall@1": record["recall@1"]}
                    if folder:
                        model.save_pretrained(folder)
                if folder:
                    atomic_write(folder / "history.json", json.dumps(history, indent=1) + "\n")
                    atomic_write(folder / "curve.png", plot_history(history, best_epoch))
    finally:  # after an error or Ctrl-C, too, the model has the weights of its best epoch so far
        model.network.load_state_dict(best_state)
        model.network.eval()
    return TrainResult(history, best_epoch, history[best_epoch - 1]["recall@1"])


class _Learner:
    """Network, loss and optimizer: what turns a batch into a step."""

    def __init__(self, model: Embedder, loss: Loss, miner: Miner | None, config: TrainConfig, *, steps: int) -> None:
        self.steps = steps
        # accelerate keeps its settings for the whole process; an earlier training may have had others.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(
            mixed_precision=_mixed_precision(config.precision, model.device), cpu=model.device.type == "cpu"
        )
        if self._accelerator.num_processes > 1:
            raise ConfigError("training runs in one process; start it without `accelerate launch`")
        self._network, self._loss, self._miner = model.network, loss, miner
        self._augment, self._clip = config.augment, config.clip
        self._random = torch.Generator().manual_seed(config.seed)
        groups = _parameter_groups(model.network, loss, model.device, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        warmup = int(config.warmup * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warmup, steps))
        # The network itself is not prepared: accelerate would wrap its `forward` in mixed precision for good, and the
        # embedder would then give other vectors than the model that is saved.
        self._optimizer, self._schedule = self._accelerator.prepare(optimizer, schedule)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def run_epoch(self, batches: Iterable[tuple[Tensor, Tensor]], bar: Any) -> Record:
        """Take a step a batch and return the means of the steps' figures.

        Raises:
            TrainingError: if the loss becomes NaN or infinite.
        """
        self._network.train()
        steps: list[dict[str, Tensor]] = []
        for number, (pixels, labels) in enumerate(batches):
            steps.append(self._step(pixels, labels))
            if number % 10 == 0:  # reading a figure waits for the device
                shown = {name: f"{value.item():.3f}" for name, value in steps[-1].items()}
                bar.set_postfix(shown, refresh=False)
                self._check_finite(steps[-1]["loss"])
            bar.update()
        self._network.eval()
        means = {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
        self._check_finite(means["loss"])
        return {name: value.item() for name, value in means.items()}

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        device = self._accelerator.device
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with self._accelerator.autocast():
            embeddings = self._network(self._augment(pixels, self._random))
        tuples = self._miner(embeddings, labels) if self._miner else None
        loss = self._loss(embeddings, labels, tuples)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._network.parameters(), self._clip)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        figures = {"loss": loss.detach(), **_distances(embeddings.detach(), labels)}
        active = getattr(self._loss, "active_share", None)
        return figures if active is None else {**figures, "active": active}

    @staticmethod
    def _check_finite(loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()}: lower the learning rate, or use precision fp32; "
                "the model has the weights of its best epoch before this, if it ended one"
            )


def _recall_at_1(model: Embedder, dataset: PixelDataset, workers: int) -> float:
    vectors = [model.embed_pixels(pixels) for pixels, _ in dataset.in_order(256, workers=workers)]
    return float(recall_at_k(np.concatenate(vectors), dataset.dataset.labels, ks=(1,))[1])


@torch.no_grad()
def _distances(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the mean Euclidean distance of a batch's positives and of its negatives, from (B, D) unit rows."""
    distances = (2 - 2 * embeddings @ embeddings.T).clamp(min=0).sqrt()  # (B, B)
    same = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives, negatives = same & others, ~same
    return {
        "positive_distance": (distances * positives).sum() / positives.sum().clamp(min=1),
        "negative_distance": (distances * negatives).sum() / negatives.sum().clamp(min=1),
    }


def _parameter_groups(
    network: nn.Module, loss: Loss, device: torch.device, weight_decay: float
) -> list[dict[str, Any]]:
    """Decay matrices; leave norms, biases, positions and the CLS token alone. A loss may have parameters as well."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token"))
        (others if plain else matrices).append(parameter)
    if isinstance(loss, nn.Module):
        others += list(loss.to(device).parameters())
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, warmup: int, steps: int) -> float:
    """Return the share of the highest rate: linear up, cosine down."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _mixed_precision(precision: str, device: torch.device) -> str:
    """Return accelerate's word for a precision."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    return "no" if precision == "fp32" else precision


def _snapshot(model: Embedder) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}


def _check_out(out: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    if (folder / "model.safetensors").exists() and not overwrite:
        raise TrainingError(f"{folder} already holds a model; choose another folder, or overwrite it on purpose")
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot create the folder {folder}: {error.strerror}") from error


def _provenance(
    model: Embedder,
    config: TrainConfig,
    loss: Loss,
    miner: Miner | None,
    train_set: ImageDataset,
    held_out: ImageDataset | None,
) -> dict[str, Any]:
    """Say where the weights come from; what an earlier training of theirs has seen counts as seen."""
    before = model.provenance
    seen = set(before.get("trained classes", ())) | set(train_set.classes)
    unseen = set(held_out.classes) - seen if held_out else set()
    return {
        "made by": f"vitembed {vitembed.__version__}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "initialised from": model.fingerprint if before else None,
        "training images": len(train_set),
        "trained classes": sorted(seen),
        "held-out classes": sorted(unseen),  # what an honest figure or threshold may be measured on
        "loss": str(loss),
        "miner": None if miner is None else str(miner),
        "settings": dataclasses.asdict(config),
    }
