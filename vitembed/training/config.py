"""The settings of a training, checked when they are made."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitembed.decoding import default_workers
from vitembed.errors import ConfigError, unknown_name
from vitembed.training.data.augment import Augment
from vitembed.training.data.datasets import VALIDATIONS, Validation
from vitembed.training.hard_negatives import HardNegatives
from vitembed.training.optimizers import OPTIMIZERS, OptimizerName

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Head = Literal["linear", "mlp"]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
HEADS = ("linear", "mlp")
OnCollapse = Literal["stop", "warn"]
ON_COLLAPSE = ("stop", "warn")

Rule = tuple[Callable[[Any], bool], str]  # what a number must be: a condition that NaN does not meet, and its words

# What holds for every training here.
_SHARED: dict[str, Rule] = {
    "epochs": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "0 or above"),
    "warmup": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "clip": (lambda value: 0 < value < math.inf, "above 0"),
    "validation_share": (lambda value: 0 < value < 1, "in (0, 1)"),
    "workers": (lambda value: value is None or value >= 0, "0 or above, or None"),
    "seed": (lambda value: 0 <= value < 2**63, "in [0, 2^63)"),
}


def check_settings(config: Any, rules: Mapping[str, Rule]) -> None:
    """Check the settings that every training here has, and those of one of them.

    Args:
        config: has epochs, learning_rate, weight_decay, warmup, clip, validation_share, workers, seed and precision.
        rules: for further settings, by name.

    Raises:
        ConfigError: if a value is out of range.
    """
    check_values(config, {**_SHARED, **rules})
    if config.precision not in PRECISIONS:
        raise unknown_name("precision", config.precision, PRECISIONS)


def check_values(config: Any, rules: Mapping[str, Rule]) -> None:
    """Check the named settings of a configuration.

    Raises:
        ConfigError: if a value is out of range.
    """
    for name, (holds, words) in rules.items():
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{name} must be {words}; got {value}")


@dataclass(frozen=True)
class FineTune:
    """How gently a network that knows something already is changed.

    Attributes:
        layer_decay: share of the learning rate of the block above that each block gets, in (0, 1]: 0.65 to 0.85 for a
            pre-trained ViT (Bao et al. 2022, arXiv:2106.08254); 1 trains all blocks alike.
        frozen_epochs: first epochs in which the backbone stays as it is and only what is new is trained: the
            projection, the classification head, the parameters of the loss. A new head then does not disturb the
            backbone with the gradients of its random start.

    Raises:
        ConfigError: if a value is out of range.
    """

    layer_decay: float = 1.0
    frozen_epochs: int = 0

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "layer_decay": (lambda value: 0 < value <= 1, "in (0, 1]"),
            "frozen_epochs": (lambda value: value >= 0, "0 or above"),
        }
        check_values(self, rules)


@dataclass(frozen=True)
class Safeguards:
    """What a long training is protected by.

    Attributes:
        checkpoint_steps: a checkpoint is written after so many steps; None for no such count. One is written at the
            end of each epoch, and on SIGTERM, in any case.
        checkpoint_minutes: and after so many minutes; what a crash may cost.
        checkpoints_kept: the latest of them that stay. Each is about four times as large as the model.
        on_collapse: "stop" a training that the doctor finds past hope (see `vitembed.training.health`), or only "warn"
            of it.
        max_unreadable: share of the images, in [0, 1], that may turn out unreadable: these are set aside and reported.
            When there are more, the training stops; with 0 the first one stops it.

    Raises:
        ConfigError: if a value is out of range.
    """

    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 10.0
    checkpoints_kept: int = 2
    on_collapse: OnCollapse = "stop"
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "checkpoint_steps": (lambda value: value is None or value >= 1, "at least 1, or None"),
            "checkpoint_minutes": (lambda value: value > 0, "above 0"),
            "checkpoints_kept": (lambda value: value >= 1, "at least 1"),
            "max_unreadable": (lambda value: 0 <= value <= 1, "in [0, 1]"),
        }
        check_values(self, rules)
        if self.on_collapse not in ON_COLLAPSE:
            raise unknown_name("on_collapse", self.on_collapse, ON_COLLAPSE)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Attributes:
        epochs: passes over the training images; in each, every image comes at least once.
        classes_per_batch: P, classes that meet in a batch.
        images_per_class: K, images of each. P x K = 128 fits a small ViT on a processor; more negatives help. A
            classification loss has no need of pairs: its batches are P x K images drawn without regard to class.
        categories_per_batch: how many categories the classes of a batch are drawn from, such as alphabets of
            characters: the fewer, the more alike are the classes that a batch tells apart. Where these have too few
            classes left in an epoch, others fill the batch. A category is what the names of its classes have before the
            last slash; see `ImageDataset.categories`. None to draw classes without regard to them.
        optimizer: "adamw" (Loshchilov and Hutter 2019, arXiv:1711.05101), or "muon", which learns more from as many
            images where a network starts from nothing; see `vitembed.training.optimizers.Muon`.
        learning_rate: the highest; 1e-3 suits a small ViT from scratch, 1e-5 to 1e-4 one that knows something already;
            with Muon and a network from scratch, 5e-3.
        weight_decay: decoupled from the gradient, on matrices only.
        loss_learning_rate: the highest of the parameters of the loss, such as the proxies of ProxyAnchorLoss, which
            want a hundred times more than the network; None for that of the network.
        warmup: share of the steps in which the rate rises from 0; then it falls to 0 along a cosine.
        clip: largest norm of the gradient.
        fine_tune: how gently a network that knows something already is changed.
        ema: decay of a moving average of the weights, such as 0.999, which is then what is validated and saved; None
            for none.
        augment: random changes to the training images.
        head: of a classification loss: "linear", or "mlp" for one hidden layer as wide as the network. None keeps the
            head of a model that knows the same classes already, and is "linear" for others; see `fit_head`.
        validation: what is held out: whole "classes" (never seen in training), "images" of every class, or "none".
            None means "classes", and "images" for a classification loss, which cannot name a class it never saw.
        validation_share: of the classes or images.
        patience: epochs without a better figure on what is held out after which training stops; None for never.
        hard_negatives: search the whole training set for the nearest images of other classes every few epochs, and let
            them meet in batches; None for batches at random.
        gradient_cache: images that are embedded at a time, the loss being of the whole batch all the same: a batch of
            4096 then trains in the memory of so many images, for about a third more time (Gao et al. 2021,
            arXiv:2101.06983). None embeds the batch at once. Batch norm, which a convolutional stem has, is then of so
            many images, too.
        patch_dropout: share of the patches, in [0, 1), that each training image loses at random: at 0.5 a step takes
            about half the time (PatchDropout, Liu et al. 2022, arXiv:2208.07220; FLIP, Li et al. 2022,
            arXiv:2212.00794, section 3). Embedding is left as it is.
        gradient_checkpointing: keep the input of each block alone and compute the block again for its gradient: the
            same weights for less memory and about a third more time (Chen et al. 2016, arXiv:1604.06174).
        compile: let torch.compile translate the network; the first steps take minutes, the others less time. On a
            processor it needs a C++ compiler.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where a CUDA device has it, else fp32.
        safeguards: checkpoints, and when to stop.
        workers: processes that decode images; None takes one a processor core, 8 at most.
        seed: of batches, augmentation and the split; on a processor equal seeds give equal weights.

    Raises:
        ConfigError: if a value is out of range.
    """

    epochs: int = 20
    classes_per_batch: int = 32
    images_per_class: int = 4
    categories_per_batch: int | None = None
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    loss_learning_rate: float | None = None
    warmup: float = 0.1
    clip: float = 1.0
    fine_tune: FineTune = FineTune()
    ema: float | None = None
    augment: Augment = Augment()  # noqa: RUF009 - frozen
    head: Head | None = None
    validation: Validation | None = None
    validation_share: float = 0.2
    patience: int | None = None
    hard_negatives: HardNegatives | None = None
    gradient_cache: int | None = None
    patch_dropout: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: Precision = "auto"
    safeguards: Safeguards = Safeguards()
    workers: int | None = None
    seed: int = 0

    @property
    def decoders(self) -> int:
        """Processes that decode images, where `workers` leaves it open, too."""
        return default_workers() if self.workers is None else self.workers

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "classes_per_batch": (lambda value: value >= 2, "at least 2, else a batch has no negatives"),
            "images_per_class": (lambda value: value >= 2, "at least 2, else a batch has no positives"),
            "categories_per_batch": (lambda value: value is None or value >= 1, "at least 1, or None"),
            "loss_learning_rate": (lambda value: value is None or 0 < value < math.inf, "above 0, or None"),
            "ema": (lambda value: value is None or 0 < value < 1, "in (0, 1), or None"),
            "patience": (lambda value: value is None or value >= 1, "at least 1, or None"),
            "gradient_cache": (lambda value: value is None or value >= 1, "at least 1, or None"),
            "patch_dropout": (lambda value: 0 <= value < 1, "in [0, 1)"),
        }
        check_settings(self, rules)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.validation is not None and self.validation not in VALIDATIONS:
            raise unknown_name("validation", self.validation, VALIDATIONS)
        if self.head is not None and self.head not in HEADS:
            raise unknown_name("head", self.head, HEADS)
