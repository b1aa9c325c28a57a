"""How good a model is on what was held out of its training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitembed.embedder import Embedder
from vitembed.metrics import recall_at_k
from vitembed.training.data.pixels import PixelDataset

Record = dict[str, Any]  # the figures of one epoch, as they stand in history.json


def validate(model: Embedder, held_out: PixelDataset | None, classes: Sequence[str], workers: int) -> Record:
    """Measure what was held out.

    Args:
        model: the embedder.
        held_out: its images; None if there are none.
        classes: what the model names, in the order of its logits; empty if it names nothing.
        workers: processes that decode images.

    Returns:
        "recall@1", the share of the images whose nearest other image is of their class, and with classes "validation
        accuracy", the share that is named right; both None without images. Forgeries, and other images that are alone
        in their class, are found by others as wrong neighbours and ask for none themselves.
    """
    if held_out is None:
        return {"recall@1": None, "validation accuracy": None} if classes else {"recall@1": None}
    vectors, logits, labels = [], [], []
    for batch in held_out.in_order(256, workers=workers):
        labels.append(batch.labels.numpy())
        if classes:
            embedded, named = model.embed_and_classify(batch.pixels)
            logits.append(named)
        else:
            embedded = model.embed_pixels(batch.pixels)
        vectors.append(embedded)
    truth = np.concatenate(labels)
    record: Record = {"recall@1": float(recall_at_k(np.concatenate(vectors), truth, ks=(1,))[1])}
    if classes:
        # The held-out part numbers its classes by itself: one without an image there has no number.
        number = {name: position for position, name in enumerate(classes)}
        wanted = np.array([number[name] for name in held_out.dataset.classes])[truth]
        record["validation accuracy"] = float((np.concatenate(logits).argmax(axis=1) == wanted).mean())
    return record


def better_figure(classes: Sequence[str]) -> str:
    """Return the name of the figure by which the best epoch is told."""
    return "validation accuracy" if classes else "recall@1"
