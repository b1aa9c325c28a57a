"""Pre-training without labels: the network learns to solve jigsaw puzzles of its images.

An image is cut into tiles, the tiles are shuffled, and a head on the patch tokens says for each tile which of the N
places it came from. That is the jigsaw branch of Jigsaw-ViT (Chen et al. 2022, arXiv:2207.11971), with both of its
means against cheating: position embeddings are withheld, and a share of the tiles is masked. There it is a second loss
beside classification; here it stands alone, before training, as the puzzles of Noroozi and Favaro (2016,
arXiv:1603.09246) do. What differs from Jigsaw-ViT, and why:

- Tiles are shuffled in the image and not among the tokens. For linear patches that is the same; the receptive fields of
  a convolutional stem overlap, so that its tokens would carry the edges of the tiles that they lay beside.
- A masked tile is filled with the pixel mean instead of being taken out of the sequence: a stem needs whole images.
- A tile without contrast (the ground of a drawing, the sky) fits in many places. It stays in the puzzle, and neither
  the loss nor the accuracy asks for its place.

Afterwards the head is thrown away: what is saved is an embedder to train on from. Its CLS token and position embeddings
have been of little or no use so far.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vitembed.decoding import default_workers
from vitembed.embedder import Embedder
from vitembed.errors import DataError
from vitembed.files import atomic_write
from vitembed.images import list_images
from vitembed.training.allocation import kept_memory
from vitembed.training.classification import ShuffledBatches
from vitembed.training.config import Precision, Rule, check_settings
from vitembed.training.data.augment import Augment
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import LabelledPixels, PixelDataset
from vitembed.training.outputs import check_out, make_folder, snapshot
from vitembed.training.parameter_groups import parameter_groups
from vitembed.training.provenance import origin
from vitembed.training.puzzle import NOT_ASKED, PuzzleNet
from vitembed.training.stepper import Stepper, check_finite
from vitembed.training.validation import Record


@dataclass(frozen=True)
class JigsawConfig:
    """Settings of `pretrain_jigsaw`.

    Attributes:
        epochs: passes over the images.
        batch_size: images in a step.
        learning_rate: the highest.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps in which the rate rises from 0; then it falls to 0 along a cosine.
        clip: largest norm of the gradient.
        tile: side of a tile in patches. 1, as in the paper, makes the most places; larger tiles show more of the
            picture each and make an easier puzzle.
        mask: share of the tiles, in [0, 1), that are hidden in training; one tile stays in sight at least.
        min_contrast: a tile is asked for when its grey levels have at least this standard deviation, of values from 0
            to 255, in some channel; 0 asks for every tile.
        augment: random changes to the images before they are cut.
        validation_share: of the images, held out at random to report the accuracy on; the data's own split goes first.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where a CUDA device has it, else fp32.
        workers: processes that decode images; None takes one a processor core, 8 at most.
        seed: of batches, puzzles and the split; on a processor equal seeds give equal weights.

    Raises:
        ConfigError: if a value is out of range.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    tile: int = 1
    mask: float = 0.1
    min_contrast: float = 8.0
    augment: Augment = Augment()  # noqa: RUF009 - frozen
    validation_share: float = 0.05
    precision: Precision = "auto"
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "batch_size": (lambda value: value >= 1, "at least 1"),
            "tile": (lambda value: value >= 1, "at least 1 patch"),
            "mask": (lambda value: 0 <= value < 1, "in [0, 1)"),
            "min_contrast": (lambda value: 0 <= value < 128, "in [0, 128)"),
        }
        check_settings(self, rules)


@dataclass(frozen=True)
class JigsawResult:
    """What `pretrain_jigsaw` returns.

    Attributes:
        history: one record an epoch: "epoch", "loss" (mean cross-entropy in nats) and "accuracy" in training,
            "validation accuracy" on the images held out, neither changed nor masked, "learning_rate", "seconds".
        accuracy: share of the asked tiles of the images held out whose place the network names after the last epoch.
        chance: the share that the best constant answer would name; above 1 / N where the edges are often blank.
    """

    history: list[Record]
    accuracy: float
    chance: float


def unlabelled_images(source: str | os.PathLike[str]) -> ImageDataset:
    """Read images whose classes nobody knows: a folder of any depth, or a table as `ImageDataset.from_table` reads it.

    An image is filed under the folder that it lies in, "." for the topmost, by which the model records what it has
    seen.

    Raises:
        DataError: if there are no images.
    """
    root = Path(source)
    if not root.is_dir():
        return ImageDataset.load(root)
    paths = list_images(root)
    return ImageDataset.from_arrays(paths, [path.parent.relative_to(root).as_posix() for path in paths])


def pretrain_jigsaw(
    model: Embedder,
    dataset: ImageDataset,
    *,
    config: JigsawConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> JigsawResult:
    """Pre-train an embedder in place on jigsaw puzzles of images; afterwards it has the weights of the last epoch.

    Args:
        model: the embedder, of a ViT.
        dataset: images. Their classes are not learned from; the model records them as `provenance["pre-trained on"]`.
        config: the settings.
        out: folder for the model and history.json, written after every epoch; None for nowhere.
        overwrite: whether `out` may already hold a model.
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: if the patches cannot be put together to tiles, or the backbone is no ViT of ours.
        DataError: if there are fewer than two images, or hardly a tile with contrast.
        ImageError: for an image that cannot be read.
        TrainingError: if `out` holds a model already, or the loss becomes NaN or infinite.
    """
    config = config or JigsawConfig()
    folder = check_out(out, overwrite)
    train_set, held_out = _split(dataset, config)
    torch.manual_seed(config.seed)
    puzzles = PuzzleNet(model.network, config.tile).to(model.device)
    workers = default_workers() if config.workers is None else config.workers
    pixels = PixelDataset(train_set, model.preprocess, workers=workers)
    validation = PixelDataset(held_out, model.preprocess, workers=workers)
    batches = ShuffledBatches(len(train_set), config.batch_size, seed=config.seed)
    solver = _Solver(puzzles, model.device, config, steps=config.epochs * len(batches))
    provenance = _provenance(model, config, train_set)
    if folder:
        make_folder(folder)

    history: list[Record] = []
    chance, state = 0.0, snapshot(model)
    try:
        with (
            kept_memory(model.device),
            tqdm(total=solver.steps, unit="batch", disable=not progress) as bar,
        ):
            for epoch in range(1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                started = time.perf_counter()
                batches.epoch = epoch
                record = {"epoch": epoch, **solver.run_epoch(pixels.batches(batches, workers=workers), bar)}
                record["validation accuracy"], chance = solver.judge(validation.in_order(256, workers=workers))
                record["learning_rate"] = solver.learning_rate
                record["seconds"] = round(time.perf_counter() - started, 3)
                history.append(record)
                state = snapshot(model)
                figures = {"jigsaw accuracy": record["validation accuracy"], "jigsaw chance": chance}
                model.provenance = {**provenance, "epoch": epoch, **figures}
                if folder:
                    model.save_pretrained(folder)
                    atomic_write(folder / "history.json", json.dumps(history, indent=1) + "\n")
    finally:  # after an error or Ctrl-C, too, the model has the weights of its last whole epoch
        model.network.load_state_dict(state)
        model.network.eval()
    return JigsawResult(history, history[-1]["validation accuracy"], chance)


class _Solver:
    """Puzzle network and optimizer: what turns a batch of images into a step."""

    def __init__(self, puzzles: PuzzleNet, device: torch.device, config: JigsawConfig, *, steps: int) -> None:
        self.steps = steps
        self._puzzles, self._device, self._config = puzzles, device, config
        self._random = torch.Generator().manual_seed(config.seed)
        groups = parameter_groups(
            puzzles, None, device, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self._stepper = Stepper(groups, device, config, steps=steps)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return self._stepper.learning_rate

    def run_epoch(self, batches: Iterable[LabelledPixels], bar: Any) -> Record:
        """Take a step a batch and return loss and accuracy, means over all asked tiles.

        Raises:
            DataError: if there was no tile to ask for.
            TrainingError: if the loss becomes NaN or infinite.
        """
        self._puzzles.train()
        sums: list[Tensor] = []  # of loss, right answers and asked tiles, (3,) a step
        for number, batch in enumerate(batches):
            sums.append(self._step(batch.pixels))
            if number % 10 == 0:  # reading a figure waits for the device
                loss, right, asked = sums[-1].tolist()
                bar.set_postfix(
                    loss=f"{loss / max(1, asked):.3f}", accuracy=f"{right / max(1, asked):.3f}", refresh=False
                )
                check_finite(loss)
            bar.update()
        loss, right, asked = torch.stack(sums).cpu().double().sum(dim=0).tolist()
        check_finite(loss)
        _check_asked(asked)
        return {"loss": loss / asked, "accuracy": right / asked}

    def _step(self, pixels: Tensor) -> Tensor:
        config = self._config
        pixels = config.augment(pixels.to(self._device, non_blocking=True), self._random)
        puzzle, places = self._puzzles.puzzle(
            pixels, mask=config.mask, min_contrast=config.min_contrast, generator=self._random
        )
        with self._stepper.autocast():
            logits = self._puzzles(puzzle)
        loss = F.cross_entropy(logits.float().flatten(0, 1), places.flatten(), ignore_index=NOT_ASKED, reduction="sum")
        asked = (places != NOT_ASKED).sum()
        self._stepper.step(loss / asked.clamp(min=1))
        right = (logits.detach().argmax(dim=-1) == places).sum()
        return torch.stack([loss.detach(), right.float(), asked.float()])  # not double, which MPS lacks

    @torch.inference_mode()
    def judge(self, batches: Iterable[LabelledPixels]) -> tuple[float, float]:
        """Return the accuracy on images as they are, and that of the best constant answer; the same puzzles each time.

        Raises:
            DataError: if there was no tile to ask for.
        """
        self._puzzles.eval()
        random = torch.Generator().manual_seed(self._config.seed)
        right, found = 0, torch.zeros(math.prod(self._puzzles.grid), dtype=torch.int64)
        for pixels, _, _ in batches:
            puzzle, places = self._puzzles.puzzle(
                pixels.to(self._device), mask=0.0, min_contrast=self._config.min_contrast, generator=random
            )
            right += int((self._puzzles(puzzle).argmax(dim=-1) == places).sum())
            found += torch.bincount(places[places != NOT_ASKED].cpu(), minlength=len(found))
        asked = int(found.sum())
        _check_asked(asked)
        return right / asked, int(found.max()) / asked


def _check_asked(tiles: float) -> None:
    if not tiles:
        raise DataError("no tile of these images has contrast, so there is nothing to put together; lower min_contrast")


def _split(dataset: ImageDataset, config: JigsawConfig) -> tuple[ImageDataset, ImageDataset]:
    """Return the images to learn from and those to measure on."""
    if len(dataset) < 2:
        raise DataError(f"pre-training needs at least 2 images, one of them to measure on; got {len(dataset)}")
    held_out = dataset.is_validation
    if held_out is None or held_out.all() or not held_out.any():
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed)).numpy()
        number = min(max(1, round(config.validation_share * len(dataset))), len(dataset) - 1)
        return dataset.subset(order[number:]), dataset.subset(order[:number])
    return dataset.subset(~held_out), dataset.subset(held_out)


def _provenance(model: Embedder, config: JigsawConfig, train_set: ImageDataset) -> dict[str, Any]:
    """Say where the weights come from. No class was trained: images were seen, without their labels."""
    before = model.provenance
    return {
        **origin(model),
        "task": "jigsaw",
        "pre-training images": len(train_set),
        # Folders, named as a later training names its classes: a class among them is unseen as a class, not as images.
        "pre-trained on": sorted({*before.get("pre-trained on", ()), *train_set.classes}),
        "trained classes": before.get("trained classes", []),
        "held-out classes": before.get("held-out classes", []),
        "settings": dataclasses.asdict(config),
    }
