"""What a model records of where its weights come from, whatever is trained next."""

import dataclasses
import time
from typing import Any

import torch

import vitembed
from vitembed.embedder import Embedder
from vitembed.training.arrangement import Arrangement
from vitembed.training.learner import Loss, Miner
from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.losses.specs import describe

BASE = "base"  # under which a trained model says whose checkpoint it started from
_OF_A_CHECKPOINT = ("source", "family", "revision", "licence", "notes")
_OF_PRETRAINING = ("task", "pre-trained on", "pre-training images")


def initialised_from(model: Embedder) -> str | None:
    """Return the fingerprint of the weights that a training starts from; None for weights that nobody trained."""
    before = model.provenance
    return before.get("derived from", model.fingerprint) if before else None


def origin(model: Embedder) -> dict[str, Any]:
    """Return who trains a model, when, and what it starts from; to be asked before the first step.

    What a checkpoint of others says of itself (source, licence and the like) is handed on under "base", from training
    to training, and so is what a pre-training has recorded.

    Args:
        model: as it is at the start.

    Returns:
        JSON types by name; "initialised from" is None for weights that nobody trained.
    """
    before = model.provenance
    base = {key: before[key] for key in _OF_A_CHECKPOINT if key in before} or before.get(BASE)
    return {
        "made by": f"vitembed {vitembed.__version__}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "initialised from": initialised_from(model),
        **({BASE: base} if base else {}),
        **{key: before[key] for key in _OF_PRETRAINING if key in before},
    }


def trained_from(model: Embedder, arranged: Arrangement, loss: Loss, miner: Miner | None) -> dict[str, Any]:
    """Return what a model records of its training on labelled images, JSON types by name.

    The classes that earlier trainings recorded stay trained. What the makers of a foreign checkpoint trained on is not
    known, and a pre-training saw images without their classes: neither makes a class a trained one.
    """
    before, train_set, held_out = model.provenance, arranged.train_set, arranged.held_out
    seen = set(before.get("trained classes", ())) | set(train_set.identities)
    if isinstance(loss, DistillationLoss):  # what teachers have seen is no longer unseen to their student
        seen |= set(loss.trained_classes)
    unseen = set(held_out.identities) - seen if held_out else set()
    return {
        **origin(model),
        "training images": len(train_set),
        "trained classes": sorted(seen),
        "held-out classes": sorted(unseen),  # what an honest figure or threshold may be measured on
        **({"classes": list(arranged.classes)} if arranged.classes else {}),  # in the order of the logits
        "loss": describe(loss),
        "miner": None if miner is None else describe(miner),
        "settings": dataclasses.asdict(arranged.config),
    }
