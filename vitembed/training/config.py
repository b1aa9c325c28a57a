"""The settings of a training, checked when they are made."""

import math
from dataclasses import dataclass
from typing import Literal

from vitembed.errors import ConfigError, unknown_name
from vitembed.training.augment import Augment
from vitembed.training.datasets import VALIDATIONS, Validation

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Head = Literal["linear", "mlp"]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
HEADS = ("linear", "mlp")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Attributes:
        epochs: passes over the training images; in each, every image comes at least once.
        classes_per_batch: P, classes that meet in a batch.
        images_per_class: K, images of each. P x K = 128 fits a small ViT on a processor; more negatives help. A
            classification loss has no need of pairs: its batches are P x K images drawn without regard to class.
        learning_rate: the highest; 1e-3 suits a small ViT from scratch, 1e-5 to 1e-4 one that knows something already.
        weight_decay: of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), on matrices only.
        warmup: share of the steps in which the rate rises from 0; then it falls to 0 along a cosine.
        clip: largest norm of the gradient.
        augment: random changes to the training images.
        head: of a classification loss: "linear", or "mlp" for one hidden layer as wide as the network. None keeps the
            head of a model that knows the same classes already, and is "linear" for others; see `fit_head`.
        validation: what is held out: whole "classes" (never seen in training), "images" of every class, or "none".
            None means "classes", and "images" for a classification loss, which cannot name a class it never saw.
        validation_share: of the classes or images.
        patch_dropout: share of the patches, in [0, 1), that each training image loses at random: at 0.5 a step takes
            about half the time (PatchDropout, Liu et al. 2022, arXiv:2208.07220; FLIP, Li et al. 2022,
            arXiv:2212.00794, section 3). Embedding is left as it is.
        gradient_checkpointing: keep the input of each block alone and compute the block again for its gradient: the
            same weights for less memory and about a third more time (Chen et al. 2016, arXiv:1604.06174).
        compile: let torch.compile translate the network; the first steps take minutes, the others less time. On a
            processor it needs a C++ compiler.
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
    head: Head | None = None
    validation: Validation | None = None
    validation_share: float = 0.2
    patch_dropout: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: Precision = "auto"
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
            "patch_dropout": (0 <= self.patch_dropout < 1, "in [0, 1)"),
            "workers": (self.workers is None or self.workers >= 0, "0 or above, or None"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2^63)"),
        }
        for name, (holds, words) in rules.items():
            if not holds:
                raise ConfigError(f"{name} must be {words}; got {getattr(self, name)}")
        if self.validation is not None and self.validation not in VALIDATIONS:
            raise unknown_name("validation", self.validation, VALIDATIONS)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.head is not None and self.head not in HEADS:
            raise unknown_name("head", self.head, HEADS)
