"""Where a score lies among the lines that decide: a small scale as inline SVG.

Positions are shares of the width and texts have a size of their own, so that the scale is as readable on a phone as in
print.
"""

import html
from collections.abc import Sequence

from vitembed.verify.words import digits_needed

STYLE = """
.scale { width: 100%; height: 104px; display: block; overflow: visible; font-size: 13px; fill: var(--ink); }
.scale .no { fill: var(--wrong); } .scale .between { fill: var(--unsure); } .scale .yes { fill: var(--right); }
.scale rect { fill-opacity: .3; } .scale line { stroke: var(--ink); stroke-width: 2; }
.scale .lower { stroke-dasharray: 4 3; } .scale circle { fill: var(--page); stroke: var(--ink); stroke-width: 1.5; }
.scale .here { font-weight: 600; } .scale .end { fill: var(--faint); font-size: 12px; }
"""

_MARGIN = 0.4  # of the span, on either side: names and labels at the outermost line still fit on a phone


def draw_scale(score: float, threshold: float, reject_below: float | None = None, others: Sequence[float] = ()) -> str:
    """Return a scale with the score, the zones of the three answers, and a circle for each of the other scores.

    Args:
        score: what was decided on; finite.
        threshold: scores from here on match.
        reject_below: scores below this do not match, those between are unsure; None where there is no such band.
        others: scores on the same scale, of the single references.

    Returns:
        An SVG element, described for those who cannot see it.
    """
    lines = [threshold] if reject_below is None else [reject_below, threshold]
    points = [score, *lines, *others]
    span = max(points) - min(points) or 0.1
    start, end = min(points) - _MARGIN * span, max(points) + _MARGIN * span

    def at(value: float) -> float:
        return 100 * (value - start) / (end - start)

    digits = digits_needed(score, *lines)
    names = ["no match", "match"] if reject_below is None else ["no match", "unsure", "match"]
    edges = [0.0, *map(at, lines), 100.0]
    parts = [_zone(name, left, right) for name, left, right in zip(names, edges, edges[1:], strict=False)]
    parts += [f'<circle cx="{at(value):.2f}%" cy=46 r=4.5 />' for value in others]
    parts += _lines([(at(line), f"{line:.{digits}f}") for line in lines])
    parts.append(_text(at(score), 17, f"this score {score:.{digits}f}", "here", "middle"))
    parts.append(_text(at(score), 33, "▼", "", "middle"))
    parts.append(_text(0, 98, "← less alike", "end", "start") + _text(100, 98, "more alike →", "end", "end"))
    if others:
        parts.append(_text(50, 98, "○ each reference", "end", "middle"))
    described = f"Scale of scores: this one is {score:.{digits}f}, a match begins at {threshold:.{digits}f}"
    if reject_below is not None:
        described += f", below {reject_below:.{digits}f} there is none"
    return f'<svg class=scale role=img aria-label="{html.escape(described)}">{"".join(parts)}</svg>'


def _zone(name: str, left: float, right: float) -> str:
    kind = {"no match": "no", "unsure": "between", "match": "yes"}[name]
    drawn = f'<rect class={kind} x="{left:.2f}%" y=36 width="{right - left:.2f}%" height=20 />'
    # Names stand at the outer ends: the middle belongs to the scores, and the band may be narrow.
    if name == "unsure":
        return drawn
    return drawn + (_text(1, 51, name, kind, "start") if name == "no match" else _text(99, 51, name, kind, "end"))


def _lines(lines: Sequence[tuple[float, str]]) -> list[str]:
    """Draw the one line, or the two between which nothing is sure, with labels that cannot meet."""
    *lower, (x, label) = lines
    parts = [f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1=32 y2=62 />']
    parts.append(_text(x, 77, f"match from {label}", "", "start" if lower else "middle"))
    for low, below in lower:
        parts.insert(0, f'<line class=lower x1="{low:.2f}%" x2="{low:.2f}%" y1=32 y2=62 />')
        parts.append(_text(low, 77, f"below {below}", "", "end"))
    return parts


def _text(x: float, y: int, text: str, kind: str, anchor: str) -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.2f}%" y={y}{named} text-anchor={anchor}>{html.escape(text)}</text>'
