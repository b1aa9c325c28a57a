"""What a model records of where its weights come from, whatever is trained next."""

import time
from typing import Any

import torch

import vitembed
from vitembed.embedder import Embedder

BASE = "base"  # under which a trained model says whose checkpoint it started from
_OF_A_CHECKPOINT = ("source", "family", "revision", "licence", "notes")
_OF_PRETRAINING = ("task", "pre-trained on", "pre-training images")


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
        "initialised from": model.fingerprint if before else None,
        **({BASE: base} if base else {}),
        **{key: before[key] for key in _OF_PRETRAINING if key in before},
    }
