"""Signatures of writers who do not exist, with forgeries, to learn from before there are enough of writers who do.

A writer is a plan of strokes. Each genuine signature is the plan disturbed a little, each forgery is the plan disturbed
much, once for the forger, and then a little. So what a network has to learn is what sets a forgery apart: that it
differs by more than a writer does from himself. Small and large distortions of one template as genuine and forged are
of Lai et al. 2020 (SynSig2Vec, arXiv:1911.05358), who distort signatures of people, with the dynamics of the pen.
"""

import numpy as np
from pen_strokes import Disturbance, Stroke, disturbed, drawing, turned  # beside this recipe
from PIL import Image

from vitembed.errors import DataError
from vitembed.training import ImageDataset

FORGERS = 3  # of each writer
SIDE = 352  # pixels of an image's longer side, to one

OWN = Disturbance(point=0.07, reach=0.12, warp=0.06, turn=0.035, stretch=0.05, slant=0.05, place=0.08)  # a writer's
FORGER = Disturbance(point=0.2, reach=0.2, warp=0.2, turn=0.08, stretch=0.13, slant=0.18, place=0.15)  # plan from plan
FORGED = Disturbance(point=0.09, reach=0.12, warp=0.08, turn=0.04, stretch=0.06, slant=0.06, place=0.08)  # one by one


def generated_signatures(writers: int, *, images: int = 6, seed: int) -> ImageDataset:
    """Generate signatures.

    Args:
        writers: how many; their names are "generated 1" and so on. 1,500 take a minute and a half and 1.3 GB.
        images: genuine ones of each writer, and as many forgeries.
        seed: the same gives the same images.

    Raises:
        DataError: if there are not two writers of two images, as training takes.
    """
    if min(writers, images) < 2:
        raise DataError(f"two writers of two images at least are generated; got {writers} of {images}")
    rng = np.random.default_rng(seed)
    drawn: list[Image.Image] = []
    names: list[str] = []
    imitated: list[str | None] = []
    for number in range(1, writers + 1):
        genuine, forged = of_a_writer(images, rng)
        name = f"generated {number}"
        drawn += genuine + forged
        names += [name] * (2 * images)
        imitated += [None] * images + [name] * images
    return ImageDataset.from_arrays(drawn, names, forgery_of=imitated)


def of_a_writer(images: int, rng: np.random.Generator) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return genuine images of a new writer and as many forgeries, by several forgers in turn."""
    plan, pen = new_plan(rng), rng.uniform(2, 5)
    own = OWN * rng.uniform(0.6, 1.5)  # some writers are steadier
    genuine = [
        drawing(disturbed(plan, own, rng), pen * np.exp(rng.normal(0, 0.15)), rng, side=SIDE) for _ in range(images)
    ]
    forgers = [(disturbed(plan, FORGER * rng.uniform(0.6, 1.7), rng), rng.uniform(2, 5)) for _ in range(FORGERS)]
    tremors = rng.choice([0, 0, 0.015, 0.03], FORGERS)  # of who draws slowly
    forged = []
    for which in range(images):
        theirs, pen = forgers[which % FORGERS]
        pen *= np.exp(rng.normal(0, 0.12))
        forged.append(drawing(disturbed(theirs, FORGED, rng), pen, rng, side=SIDE, tremor=tremors[which % FORGERS]))
    return genuine, forged


def new_plan(rng: np.random.Generator) -> list[Stroke]:
    """Return the strokes of a new writer: mostly an initial, letters, often a flourish, sometimes dots."""
    strokes = [initial(rng)] if rng.random() < 0.75 else []
    begin = strokes[0][:, 0].max() * rng.uniform(0.4, 1.1) if strokes else 0.0
    word = letters(begin, rng)
    width = max(1.0, word[-1][:, 0].max())
    strokes += word
    if rng.random() < 0.45:
        strokes.append(flourish(width, rng))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        dot = np.array([rng.uniform(0, width), rng.uniform(1.3, 2.5)])
        strokes.append(np.stack([dot, dot + np.array([rng.uniform(0.02, 0.8), rng.normal(0, 0.2)])]))
    slant, slope, wide = rng.normal(0.2, 0.3), rng.normal(0.1, 0.12), rng.uniform(0.7, 1.4)
    shape = np.array([[wide, 0], [0, 1]]) @ turned(slope) @ np.array([[1, slant], [0, 1]])
    return [stroke @ shape.T for stroke in strokes]


def initial(rng: np.random.Generator) -> Stroke:
    """Return a large letter: points anywhere in its box, or up and down in turn."""
    count, height, width = rng.integers(4, 9), rng.uniform(1.5, 3.2), rng.uniform(0.8, 2.2)
    x, y = rng.uniform(0, width, count), rng.uniform(-0.3, 1, count) * height
    if rng.random() < 0.5:
        y = np.where(np.arange(count) % 2 == rng.integers(2), height, 0) + rng.normal(0, 0.4, count)
    return np.stack([x, y], axis=1)


def letters(x: float, rng: np.random.Generator) -> list[Stroke]:
    """Return a word from x on: arches, loops and bowls as this writer makes them, with as many lifts of the pen."""
    step, looping, lifting = rng.uniform(0.25, 0.6), rng.uniform(0, 0.7), rng.choice([0.0, 0.08, 0.25])
    rising, falling, fading = rng.uniform(0.05, 0.3), rng.uniform(0.02, 0.2), rng.choice([0.0, 0.0, 0.04, 0.08])
    strokes, points = [], [(x, rng.uniform(0, 0.6))]
    for number in range(rng.integers(4, 22)):
        x, size = x + step * rng.uniform(0.5, 1.5), max(0.25, 1 - fading * number)
        top = size * (rng.uniform(1.6, 3) if rng.random() < rising else rng.uniform(0.7, 1.2))
        bottom = size * (-rng.uniform(0.8, 2) if rng.random() < falling else rng.normal(0, 0.12))
        kind = rng.random()
        if kind < looping:
            back = x - step * rng.uniform(0.3, 0.9)
            points += [(x + 0.15, top * 0.6), (x, top), (back, top * 0.6), (x, bottom)]
        elif kind < looping + 0.15:
            r = size * rng.uniform(0.25, 0.5)
            bowl = [(x + r, 0.9), (x, 0.5), (x + 0.6 * r, 0.0), (x + 2 * r, 0.5), (x + r, 1.0)]
            points += [(at, size * y) for at, y in bowl]
            x += r
        else:
            points += [(x, top), (x + step * rng.uniform(0, 0.7), bottom)]
        if rng.random() < lifting:
            strokes.append(np.array(points))
            x += rng.uniform(0, 0.4)
            points = [(x, size * rng.uniform())]
    if rng.random() < 0.3:  # a long end
        points.append((x + rng.uniform(1, 5), rng.uniform(-0.5, 2.5)))
    if rng.random() < 0.25:  # back under the word
        shares = (0.6, rng.uniform(-0.2, 0.3), rng.uniform(0.5, 1.2))
        points += [(share * x, y) for share, y in zip(shares, rng.uniform(-1.8, -0.2, 3), strict=True)]
    return [*strokes, np.array(points)] if len(points) > 1 else strokes


def flourish(width: float, rng: np.random.Generator) -> Stroke:
    """Return a stroke of its own: below the word, to and fro or not; around it; or across it."""
    kind = rng.choice(["below", "around", "across"])
    if kind == "below":
        count = rng.integers(2, 5)
        x = width * np.linspace(rng.uniform(-0.2, 0.4), rng.uniform(0.6, 1.2), count)
        if rng.random() < 0.6:
            x = np.concatenate([x[::2], x[1::2]])
        y = rng.uniform(-1.2, -0.2) + rng.normal(0, 0.3, count) + rng.normal(0, 0.1) * x
        return np.stack([x, y], axis=1)
    if kind == "around":
        angle = rng.uniform(0, 2 * np.pi) + np.linspace(0, 2 * np.pi * rng.uniform(0.8, 1.4), 9)
        high = rng.uniform(0.8, 1.7) * rng.choice([-1, 1])
        x = width * (0.5 + rng.uniform(0.4, 0.7) * np.cos(angle))
        return np.stack([x, 0.6 + high * np.sin(angle)], axis=1)
    return np.stack([width * np.sort(rng.uniform(-0.1, 1.2, 2)), rng.uniform(-1.5, 2.5, 2)], axis=1)
