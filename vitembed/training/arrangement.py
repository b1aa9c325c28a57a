"""What a training works on: settings that fit the loss, the two sides of the split, what makes the batches.

`train` begins with it, and so does the plan of a training, which thereby speaks of the same classes and steps.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError
from vitembed.training.classification import ShuffledBatches, check_classifiable
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.sampling import ClassBalancedSampler, Ints
from vitembed.training.hard_negatives import require_search
from vitembed.training.learner import Loss, Miner, needs_logits
from vitembed.training.losses.distillation import DistillationLoss


@dataclass(frozen=True)
class Arrangement:
    """What a training works on.

    Attributes:
        config: the settings, with what depends on the loss filled in.
        train_set: what is trained on.
        held_out: what validation is on; None for nothing.
        classes: what the network learns to name, in the order of the logits; empty for a loss of embeddings.
        sampler: the batches of an epoch, as positions in `train_set`.
    """

    config: TrainConfig
    train_set: ImageDataset
    held_out: ImageDataset | None
    classes: Sequence[str]
    sampler: ClassBalancedSampler | ShuffledBatches


def arrange(
    model: Embedder, dataset: ImageDataset, loss: Loss, miner: Miner | None, config: TrainConfig
) -> Arrangement:
    """Check that loss, miner, settings and model go together, split the data, and choose what makes the batches.

    Raises:
        ConfigError: if they do not go together.
        DataError: if the data set has too few classes or images.
    """
    config = _settle(config, loss, miner)
    again = model.provenance.get("held-out classes", ())
    if isinstance(loss, DistillationLoss):
        loss.check_student(model)
        again = set(again or loss.held_out_classes) - set(loss.trained_classes)
    train_set, held_out = dataset.split(
        config.validation or "classes", share=config.validation_share, seed=config.seed, again=again
    )
    if isinstance(loss, DistillationLoss) and held_out is not None:
        _check_unseen(held_out, loss)
    if config.hard_negatives is not None:
        require_search()
    classes = train_set.classes if needs_logits(loss) else ()
    if classes:
        check_classifiable(model, train_set, held_out)
        if dataset.forgery_of is not None:
            raise DataError("forgeries are of no class that could be named; use a loss of embeddings such as triplet")
    return Arrangement(config, train_set, held_out, classes, _sampler(train_set, config, classes))


def _check_unseen(held_out: ImageDataset, loss: DistillationLoss) -> None:
    """Refuse to validate a student on what its teachers were trained on: the best epoch would be chosen by it."""
    if seen := sorted(set(held_out.identities) & set(loss.trained_classes)):
        raise ConfigError(
            f"{seen[0]!r} would be held out for validation, but a teacher was trained on it: hold out 'none', or let "
            "all teachers hold out the same classes (a split of the data's own, or one seed)"
        )


def _settle(config: TrainConfig, loss: Loss, miner: Miner | None) -> TrainConfig:
    """Fill in what depends on the loss, and refuse what does not go with it."""
    if not needs_logits(loss):
        if config.head is not None:
            raise ConfigError(f"head {config.head!r} is for a classification loss such as cross-entropy; got {loss}")
        if isinstance(loss, DistillationLoss) and miner is not None:
            raise ConfigError("distillation compares all images of a batch: leave the miner out")
        return dataclasses.replace(config, validation=config.validation or "classes")
    if config.categories_per_batch is not None:
        raise ConfigError(f"categories_per_batch is for a loss of embeddings, but {loss} is of logits; leave it out")
    if config.hard_negatives is not None:
        raise ConfigError(f"hard negatives are for a loss of embeddings, but {loss} is of logits; leave them out")
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
        forgery_of=train_set.forgery_of,
        categories=None if config.categories_per_batch is None else _categories(train_set),
        categories_per_batch=config.categories_per_batch,
    )


def _categories(train_set: ImageDataset) -> Ints:
    """Return the categories of the images, of which there must be some."""
    names = train_set.identities
    if not any("/" in name for name in names):
        raise DataError(
            f"categories_per_batch needs classes named CATEGORY/CLASS; got such as {names[0]!r}: leave it out"
        )
    genuine = np.ones(len(train_set), np.bool_) if train_set.forgery_of is None else train_set.forgery_of < 0
    if len(np.unique(train_set.categories[genuine])) < 2:
        raise DataError(
            f"all {len(names)} classes that are trained on are of one category, such as {names[0]!r}, so that "
            "categories_per_batch tells nothing: leave it out, or hold out other classes"
        )
    return train_set.categories
