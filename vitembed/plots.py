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
    """Draw the figures of each epoch: the loss, the shares (active triplets, recall@1, accuracy), and the distances.

    Args:
        history: one record an epoch with "epoch" and any of "loss", "active", "accuracy", "validation accuracy",
            "recall@1", "positive_distance" and "negative_distance"; what is missing or None is left out.
        best_epoch: marked by a line.

    Returns:
        A PNG.
    """
    figure, panels = _figure(3, size=(10, 3))
    shares = [
        ("active", "active triplets", NON_MATCH),
        ("accuracy", "training accuracy", FAINT),
        ("validation accuracy", "validation accuracy", ACCENT),
        ("recall@1", "validation recall@1", MATCH),
    ]
    curves = [
        ("loss", [("loss", "loss", ACCENT)]),
        ("share", shares),
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


def plot_rates(rates: ArrayLike, losses: ArrayLike, suggestion: float, *, smoothed: ArrayLike | None = None) -> bytes:
    """Draw a learning-rate range test: the loss over the rate, and what is suggested.

    Args:
        rates: (S,) learning rates, above 0; drawn on a logarithmic scale.
        losses: (S,) the loss at each.
        suggestion: marked by a line.
        smoothed: (S,) the smoothed loss; then the plain one is drawn as dots.

    Returns:
        A PNG.
    """
    figure, (axes,) = _figure(1, size=(6, 3.6))
    if smoothed is None:
        axes.plot(rates, losses, color=ACCENT)
    else:
        axes.plot(rates, losses, color=FAINT, linestyle="none", marker=".", markersize=4, label="each step")
        axes.plot(rates, smoothed, color=ACCENT, label="smoothed")
    axes.axvline(suggestion, color=MATCH, linestyle=":", linewidth=1.2, label=f"suggestion {suggestion:.1e}")
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="mean of all terms of the loss")
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


def plot_shared(
    images: Sequence[Image.Image],
    maps: Sequence[ArrayLike],
    *,
    names: Sequence[str],
    score: float,
    residuals: Sequence[float],
) -> bytes:
    """Draw two images side by side, with what each patch contributes to their score.

    Args:
        images: two images, as the network sees them; they are drawn in grey.
        maps: (rows, columns) contributions for each; both are drawn on one scale of colour.
        names: what stands above each.
        score: of the two.
        residuals: what no patch of either image contributes.

    Returns:
        A PNG.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb

    contributions = [np.asarray(values, dtype=np.float64) for values in maps]
    # One patch that stands out would leave all others pale.
    limit = float(np.quantile(np.abs(np.concatenate([values.ravel() for values in contributions])), 0.97)) or 1.0
    figure, panels = _figure(2, size=(8, 4.4))
    for axes, image, values, name, residual in zip(panels, images, contributions, names, residuals, strict=True):
        axes.imshow(image.convert("L"), cmap="gray", vmin=-60, vmax=330)  # paler than it is, so that colours stand out
        colours = np.where(values[..., None] < 0, to_rgb(NON_MATCH), to_rgb(MATCH))  # (rows, columns, 3)
        strength = 0.85 * np.clip(np.abs(values) / limit, 0, 1)
        extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
        axes.imshow(np.dstack([colours, strength]), extent=extent, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"patches {values.sum():+.3f}, the rest {residual:+.3f}", fontsize=9)
        axes.spines[:].set_visible(False)
    figure.suptitle(f"score {score:.3f}", fontsize=11)
    signs = LinearSegmentedColormap.from_list("signs", [NON_MATCH, "white", MATCH])
    scale = ScalarMappable(Normalize(-limit, limit), cmap=signs)
    bar = figure.colorbar(scale, ax=panels, shrink=0.7, extend="both")
    bar.set_label("contribution of a patch to the score", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def plot_attention_distances(distances: ArrayLike, *, everywhere: float | None = None) -> bytes:
    """Draw how far each head looks, by layer: figure 7 (right) of the ViT paper (2021, arXiv:2010.11929).

    Args:
        distances: (depth, heads) mean attention distances in pixels; NaN is left out.
        everywhere: that of a head which looks at all patches alike; drawn as a line.

    Returns:
        A PNG: one dot a head; colours tell the shortest to the longest sight of a layer.
    """
    from matplotlib import colormaps

    values = np.sort(np.asarray(distances, dtype=np.float64), axis=1)  # NaN goes last
    depth, heads = values.shape
    figure, (axes,) = _figure(1, size=(6, 3.6))
    for rank in range(heads):
        colour = colormaps["viridis"](0.9 * rank / max(1, heads - 1))
        axes.scatter(np.arange(1, depth + 1), values[:, rank], s=18, color=[colour])
    if everywhere is not None:
        axes.axhline(everywhere, color=FAINT, linestyle=":", linewidth=1, label="attention to all patches alike")
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="layer", ylabel="mean attention distance (pixels)")
    axes.set_xticks(np.arange(1, depth + 1, max(1, depth // 12)))
    highest = max(float(np.nanmax(values, initial=0.0)), everywhere or 0.0)
    axes.set_ylim(0, 1.08 * highest or 1.0)
    return _png(figure)


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
