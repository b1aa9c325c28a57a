"""Pictures of numbers: curves of a training, histograms of scores, attention over an image; as PNG bytes.

matplotlib is used through its object-oriented interface alone, so that nothing here depends on or changes a global
state, and needs no display.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATCH, NON_MATCH, ACCENT, FAINT = "#1b7f5c", "#b3532d", "#2f5d9b", "#9aa0a6"  # told apart by the colour-blind too
DPI = 120


def plot_history(history: Sequence[Mapping[str, Any]], best_epoch: int) -> bytes:
    """Draw the figures of each epoch: the loss, the share of active triplets and recall@1, and the distances.

    Args:
        history: one record an epoch with "epoch" and any of "loss", "active", "recall@1", "positive_distance" and
            "negative_distance"; what is missing or None is left out.
        best_epoch: marked by a line.

    Returns:
        A PNG.
    """
    figure, panels = _figure(3, size=(10, 3))
    curves = [
        ("loss", [("loss", "loss", ACCENT)]),
        ("share", [("active", "active triplets", NON_MATCH), ("recall@1", "validation recall@1", MATCH)]),
        ("distance", [("positive_distance", "positives", MATCH), ("negative_distance", "negatives", NON_MATCH)]),
    ]
    for axes, (ylabel, lines) in zip(panels, curves, strict=True):
        for key, label, colour in lines:
            points = [(r["epoch"], r[key]) for r in history if r.get(key) is not None]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colour, label=label, marker="o" if len(points) == 1 else None)
        axes.axvline(best_epoch, color=FAINT, linestyle=":", linewidth=1)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.set_ylim(bottom=0)
        if len(lines) > 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def plot_score_histogram(scores: ArrayLike, is_match: ArrayLike, threshold: float) -> bytes:
    """Draw how the scores of matching and of non-matching pairs are distributed, with the threshold between them.

    Args:
        scores: (P,) cosines in [-1, 1]; those of float32 that rounding has put just above 1 count as 1.
        is_match: (P,) bool; a kind that has no pair is left out.
        threshold: pairs of at least this score are accepted.

    Returns:
        A PNG; both histograms have an area of one, as there are far more non-matching pairs.
    """
    values, match = np.clip(np.asarray(scores, dtype=np.float64), -1, 1), np.asarray(is_match, dtype=np.bool_)
    figure, (axes,) = _figure(1, size=(7, 3.2))
    edges = np.linspace(values.min(initial=-0.05), 1, 81)
    for chosen, label, colour in ((~match, "non-matching pairs", NON_MATCH), (match, "matching pairs", MATCH)):
        if chosen.any():  # nothing has no density
            text = f"{label} ({chosen.sum():,})"
            axes.hist(values[chosen], edges.tolist(), density=True, color=colour, alpha=0.55, label=text)
    axes.axvline(threshold, color="black", linewidth=1.2, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine similarity", ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def overlay(image: Image.Image, heat: ArrayLike, *, side: int = 160) -> Image.Image:
    """Lay a map of non-negative weights over an image.

    Args:
        image: any PIL image.
        heat: (rows, columns) weights; the largest is drawn strongest, 0 leaves the image as it is.
        side: the longer side of the result in pixels.

    Returns:
        An RGB image of the image's aspect ratio.
    """
    from matplotlib import colormaps

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    base = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 255
    weights = np.asarray(heat, dtype=np.float64)
    weights = weights / max(float(weights.max()), 1e-12)
    smooth = Image.fromarray(weights.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    strength: NDArray[np.float64] = np.clip(np.asarray(smooth, dtype=np.float64), 0, 1)  # (H, W)
    colours = colormaps["inferno"](strength)[..., :3]  # (H, W, 3)
    alpha = 0.65 * strength[..., None]
    return Image.fromarray(np.round(255 * (base * (1 - alpha) + colours * alpha)).astype(np.uint8))


def _figure(columns: int, *, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
