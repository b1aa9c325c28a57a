"""Alphabets that nobody writes, to learn from where there are few that somebody does.

An alphabet has a few strokes of its own, and its characters are put together from them. Every other character or so
comes from an earlier one by a stroke more, a stroke less, a stroke turned or all of it changed a little, so that there
are some that only a careful eye tells apart, and a few (4 % of 55,220) that none does. Characters as parts put together
anew are of Lake, Salakhutdinov and Tenenbaum 2015 (Bayesian program learning, Science 350), who learn the parts from
what people drew; here they are made up, and nothing is learned from any data set.
"""

import numpy as np
from pen_strokes import Disturbance, Stroke, disturbed, drawing, turned  # beside this recipe
from PIL import Image

from vitembed.errors import DataError
from vitembed.training import ImageDataset

SIDE = 105  # pixels of an image's longer side, as Omniglot's
KINDS = ("line", "line", "arc", "arc", "hook", "loop", "wave", "corner", "free")
ANGLES = (0, np.pi / 2, np.pi / 4, -np.pi / 4)  # of strokes, in radians
ANGLE_SHARES = (0.25, 0.3, 0.1, 0.1, 0.25)  # the last of any other angle
DRAWER = Disturbance(point=0.07, reach=0.04, warp=0.06, turn=0.06, stretch=0.12, slant=0.1, place=0.05)
NEAR = Disturbance(point=0.35, reach=0.0, warp=0.1, turn=0.1, stretch=0.15, slant=0.1, place=0.25)  # another character


def generated_characters(alphabets: int, *, characters: int = 20, images: int = 12, seed: int) -> ImageDataset:
    """Generate drawings of characters, each image as by another drawer.

    Args:
        alphabets: how many; the classes are "generated 0/character 0" and so on.
        characters: of each alphabet.
        images: of each character.
        seed: the same gives the same images.

    Raises:
        DataError: if there are not two alphabets of two characters of two images, as training takes.
    """
    if min(alphabets, characters, images) < 2:
        what = f"{alphabets} of {characters} of {images}"
        raise DataError(f"two alphabets of two characters of two images at least are generated; got {what}")
    rng = np.random.default_rng(seed)
    drawn, names = [], []
    for alphabet in range(alphabets):
        for character, plan in enumerate(new_alphabet(characters, rng)):
            drawn += [drawn_once(plan, rng) for _ in range(images)]
            names += [f"generated {alphabet}/character {character}"] * images
    return ImageDataset.from_arrays(drawn, names)


def drawn_once(plan: list[Stroke], rng: np.random.Generator) -> Image.Image:
    """Draw a character by a new hand, which also turns and stretches each stroke by itself."""
    strokes = []
    for stroke in disturbed(plan, DRAWER * rng.uniform(0.5, 1.6), rng):
        middle, turn = stroke.mean(axis=0), turned(rng.normal(0, 0.08))
        strokes.append(middle + (stroke - middle) @ (turn @ np.diag(np.exp(rng.normal(0, 0.12, 2)))).T)
    pen, tremor = rng.uniform(2, 3.2), rng.choice([0, 0, 0.02])
    return drawing(strokes, pen, rng, side=SIDE, tremor=tremor, samples=6)


def new_alphabet(characters: int, rng: np.random.Generator) -> list[list[Stroke]]:
    """Return the plans of a new alphabet's characters."""
    parts = [new_stroke(rng) for _ in range(rng.integers(4, 14))]
    counts = rng.dirichlet(np.array([2, 3, 2, 0.7]) * rng.uniform(0.5, 3))  # shares of one to four strokes
    spread = rng.uniform(0.5, 1)
    plans: list[list[Stroke]] = []
    while len(plans) < characters:
        if rng.random() < 0.4 and plans:
            plans.append(derived(plans[rng.integers(len(plans))], parts, rng))
        else:
            plans.append(composed(parts, 1 + rng.choice(4, p=counts), spread, rng))
    return plans


def new_stroke(rng: np.random.Generator) -> Stroke:
    """Return a stroke of one of the KINDS, sometimes with sharp corners where it would be round."""
    kind, long = rng.choice(KINDS), rng.uniform(0.5, 2.2)
    angle = rng.choice([*ANGLES, rng.uniform(0, 6.3)], p=ANGLE_SHARES)
    if kind == "line":
        points = np.array([[0, 0], [long, 0]])
    elif kind == "arc":
        t = np.linspace(0, np.pi * rng.uniform(0.6, 1.9), 6)
        points = long / 2 * np.stack([np.cos(t), rng.uniform(0.6, 1.3) * np.sin(t)], axis=1)
    elif kind == "hook":
        bend = rng.uniform(0.3, 0.7) * rng.choice([-1, 1])
        points = long * np.array([[0, 0], [0.6, 0], [1, 0.1], [1, bend]])
    elif kind == "loop":
        t, radius = np.linspace(0, 2 * np.pi, 7), rng.uniform(0.2, 0.7)
        tail = [[radius + rng.uniform(0, 1.2), rng.normal(0, 0.4)]]
        points = np.concatenate([radius * np.stack([np.cos(t), np.sin(t)], axis=1), tail])
    elif kind == "wave":
        count = rng.integers(3, 6)
        points = np.stack([np.linspace(0, long, count), np.arange(count) % 2 * rng.uniform(0.2, 0.8)], axis=1)
    elif kind == "corner":
        end = (1, rng.uniform(-0.7, 0.7)), (rng.uniform(0.6, 1.2), rng.uniform(-1, 1))
        points = long * np.array([[0, 0], [0.5, 0], [1, 0], *end])
    else:
        points = rng.uniform(0, long, (rng.integers(3, 6), 2))
    if rng.random() < 0.4 and len(points) > 2:
        points = np.repeat(points, 2, axis=0)[1:-1]
    return points @ turned(angle).T


def composed(parts: list[Stroke], count: int, spread: float, rng: np.random.Generator) -> list[Stroke]:
    """Return a character of some parts, each at a place of a grid or touching the one before."""
    plan: list[Stroke] = []
    for _ in range(count):
        part = parts[rng.integers(len(parts))] * rng.uniform(0.7, 1.3) * np.array([rng.choice([1, 1, -1]), 1])
        if plan and rng.random() < 0.5:
            plan.append(part - part[rng.integers(len(part))] + plan[-1][rng.integers(len(plan[-1]))])
        else:
            plan.append(part - part.mean(axis=0) + spread * rng.integers(-1, 2, 2))
    return plan


def derived(plan: list[Stroke], parts: list[Stroke], rng: np.random.Generator) -> list[Stroke]:
    """Return a character that is like another: a stroke more, one less, one turned, or all of it changed a little."""
    how, changed = rng.choice(["more", "less", "turned", "changed"]), list(plan)
    if how == "more":
        part = parts[rng.integers(len(parts))]
        changed.append(part * rng.uniform(0.3, 1) + rng.uniform(-1, 1, 2))
    elif how == "less" and len(plan) > 1:
        changed.pop(rng.integers(len(plan)))
    elif how == "turned":
        at = rng.integers(len(plan))
        changed[at] = changed[at] @ turned(rng.choice([np.pi / 2, np.pi])).T
    else:
        changed = disturbed(plan, NEAR, rng)
    return changed
