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

    from vitembed.metrics import ReliabilityCurve

MATCH, NON_MATCH, ACCENT, FAINT = "#1b7f5c", "#b3532d", "#2f5d9b", "#9aa0a6"  # told apart by the colour-blind too
LINES = ((ACCENT, "-"), (NON_MATCH, "--"), (MATCH, "-."), (FAINT, ":"))  # by shape, too
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


def plot_scores(
    kinds: Mapping[str, ArrayLike],
    threshold: float,
    *,
    label: str = "cosine similarity",
    reject_below: float | None = None,
) -> bytes:
    """Draw how the scores of several kinds of pair are distributed, each with an area of one.

    Args:
        kinds: (P,) finite scores by name, such as "matching", "random" and "skilled"; a kind that has no pair is left
            out. The first three are drawn.
        threshold: pairs of at least this score are accepted.
        label: what the scores are.
        reject_below: scores from here up to the threshold are unsure; None: there is no such band.

    Returns:
        A PNG.
    """
    values = {name: np.asarray(scores, dtype=np.float64) for name, scores in kinds.items() if np.size(scores)}
    everything = np.concatenate([*values.values(), [threshold]])
    edges = np.linspace(everything.min(), everything.max() + 1e-9, 61)
    figure, (axes,) = _figure(1, size=(7, 3.2))
    for (name, scores), colour, hatch in zip(
        values.items(), (MATCH, ACCENT, NON_MATCH), ("", "///", "..."), strict=False
    ):
        axes.hist(
            scores,
            edges.tolist(),
            density=True,
            histtype="stepfilled",
            facecolor=(*_rgb(colour), 0.35),
            edgecolor=colour,
            hatch=hatch,
            label=f"{name} ({scores.size:,})",
        )
    axes.axvline(threshold, color="black", linewidth=1.2, label=f"threshold {threshold:.4f}")
    if reject_below is not None:
        axes.axvspan(reject_below, threshold, color=FAINT, alpha=0.3, linewidth=0, label="unsure")
    axes.set(xlabel=label, ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def plot_roc(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, lowest: float = 1e-4) -> bytes:
    """Draw receiver operating characteristics: the true-accept rate over the false-accept rate, logarithmic.

    Args:
        curves: (T,) FAR and (T,) FRR by name, both in [0, 1], of thresholds in order; at most four are drawn.
        lowest: where the axis of FAR begins, above 0: below 1 / non-matching pairs there is nothing to see.

    Returns:
        A PNG.
    """
    figure, (axes,) = _figure(1, size=(4.8, 4.0))
    for (name, (far, frr)), (colour, line) in zip(curves.items(), LINES, strict=False):
        x, y = np.asarray(far, dtype=np.float64), 1 - np.asarray(frr, dtype=np.float64)
        axes.step(np.maximum(x, lowest / 10), y, where="post", color=colour, linestyle=line, label=name)
    axes.plot(chance := np.geomspace(lowest, 1, 200), chance, color=FAINT, linewidth=0.8, label="by chance")
    axes.set_xscale("log")
    axes.set(xlim=(lowest, 1), ylim=(0, 1.02), xlabel="false-accept rate", ylabel="true-accept rate")
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure)


def plot_det(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, lowest: float = 1e-3) -> bytes:
    """Draw detection error trade-offs: FRR over FAR, both on the scale of normal deviates.

    Normal scores of equal spread give straight lines on it (Martin et al. 1997, "The DET curve in assessment of
    detection task performance").

    Args:
        curves: (T,) FAR and (T,) FRR by name, both in [0, 1], of thresholds in order; at most four are drawn.
        lowest: where both axes begin, in (0, 0.5).

    Returns:
        A PNG; the diagonal is where both rates are equal.
    """
    ticks = [rate for rate in (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.4) if rate >= lowest]
    figure, (axes,) = _figure(1, size=(4.8, 4.0))
    for (name, (far, frr)), (colour, line) in zip(curves.items(), LINES, strict=False):
        axes.plot(_deviates(far), _deviates(frr), color=colour, linestyle=line, label=name)
    ends = _deviates([lowest, 0.6])
    axes.plot(ends, ends, color=FAINT, linewidth=0.8, label="equal error rates")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(_deviates(ticks).tolist(), [f"{100 * rate:g} %" for rate in ticks])
    axes.set(xlim=ends, ylim=ends, xlabel="false-accept rate", ylabel="false-reject rate")
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return _png(figure)


def plot_reliability(curves: "Mapping[str, ReliabilityCurve]") -> bytes:
    """Draw reliability diagrams: the observed share of matches over the stated probability, bin by bin.

    Args:
        curves: by name; at most four are drawn.

    Returns:
        A PNG; on the diagonal, probabilities are what they say.
    """
    figure, (axes, beside) = _figure(2, size=(8, 3.8))
    for (name, curve), (colour, line) in zip(curves.items(), LINES, strict=False):
        style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "label": name}
        axes.plot(curve.predicted, curve.observed, **style)
        beside.plot(curve.predicted, curve.shares, **style)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, label="as stated")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="stated probability of a match", ylabel="observed share of matches")
    beside.set(xlim=(0, 1), xlabel="stated probability of a match", ylabel="share of the pairs")
    beside.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def plot_identity_errors(names: Sequence[str], rates: Mapping[str, Sequence[float | None]]) -> bytes:
    """Draw the error rates of each identity as dots on a line, the first one on top.

    Args:
        names: N identities, at least one.
        rates: by name, N rates in [0, 1]; None where there is nothing to measure. At most three kinds are drawn.

    Returns:
        A PNG.
    """
    figure, (axes,) = _figure(1, size=(7, 1.1 + 0.22 * len(names)))
    places = np.arange(len(names))
    marks = (("o", MATCH), ("s", ACCENT), ("D", NON_MATCH))
    for (kind, values), (mark, colour) in zip(rates.items(), marks, strict=False):
        shown = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        if np.isfinite(shown).any():
            axes.plot(shown, places, linestyle="none", marker=mark, color=colour, markersize=5, alpha=0.8, label=kind)
    axes.hlines(places, 0, 1, color=FAINT, linewidth=0.4, zorder=0)
    axes.set_yticks(places.tolist(), [name if len(name) <= 32 else "…" + name[-31:] for name in names])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="error rate at the threshold")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncol=3)
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


def _deviates(rates: ArrayLike) -> NDArray[np.float64]:
    """Return the normal deviates of rates; 0 and 1 become ends far outside of what is drawn."""
    from statistics import NormalDist

    inverse = NormalDist().inv_cdf
    return np.array([inverse(rate) for rate in np.clip(np.asarray(rates, dtype=np.float64), 1e-9, 1 - 1e-9).ravel()])


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


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
