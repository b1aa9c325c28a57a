"""Images whose labels look wrong, found among their neighbours, for a person to look at: nothing is relabelled.

Two conditions, both local. Of the ten nearest images more carry one other label (two at least) than the image's own:
the vote of SimiFeat (Zhu et al. 2022, arXiv:2110.06283), on the features of the model in training as in deep k-NN
(Bahri et al. 2020, arXiv:2004.12289). And the own class is at least twice as far away as the other, each as far as its
nearest images on the mean. The vote alone names what the model confuses as well, on Omniglot twelve times as many
images as were mislabelled; the ratio of distances, which needs no threshold of scores, sets the foreign ones apart.

Omniglot with 3 % of the labels flipped at random, three epochs from scratch on these labels, another seed than the one
that the rule was chosen on: 95 % of the flipped images were listed; 76 % of the list was flipped, 98 % of its first
hundred. What a model finds that was trained for so long that it knows the wrong labels by heart was not measured.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Nearest neighbours that vote on a label, as many as in SimiFeat.
VOTES = 10

# Nearest images of a class whose mean score says how near the class is: one may be mislabelled itself.
NEAREST = 5

# An image is suspected when its own class is this many times as far away as the class that its neighbours name.
FAR = 2.0


@dataclass(frozen=True)
class Suspect:
    """An image whose label looks wrong.

    Attributes:
        position: of the image.
        label: that it has.
        suggested: the label of the nearest images.
        score: 1 - (distance to the suggested class / distance to its own), in [0.5, 1], higher is more suspect.
        agreeing: share of its nearest neighbours with the suggested label, in (0, 1].
    """

    position: int
    label: int
    suggested: int
    score: float
    agreeing: float


def find_suspects(labels: Ints, positives: Floats, rows: Ints, scores: Floats, forgery_of: Ints) -> tuple[Suspect, ...]:
    """Return the images whose labels look wrong, most suspect first.

    An image alone in its class cannot be judged; a forgery is no suspect, and no vote for its class.

    Args:
        labels: (N,) int64, of each image.
        positives: (N, VOTES) float32, its scores with the nearest images of its class, best first, -inf for none.
        rows: (N, M) int64, M >= VOTES, positions of the nearest images of other classes, best first, -1 for none.
        scores: (N, M) float32, with those; -inf for none.
        forgery_of: (N,) int64, the class that a forgery imitates, -1 for genuine images.
    """
    suggested, agreeing, own, voters = _votes(labels, positives, rows, scores, forgery_of)
    of_suggested = (labels[rows] == suggested[:, None]) & (rows >= 0)  # (N, M)
    count = np.minimum(np.minimum(np.isfinite(positives).sum(axis=1), of_suggested.sum(axis=1)), NEAREST)
    judged = np.flatnonzero((forgery_of < 0) & (agreeing >= 2) & (agreeing > own) & (count > 0))
    of_suggested, count = of_suggested[judged], count[judged]
    chosen = of_suggested & (np.cumsum(of_suggested, axis=1) <= count[:, None])
    theirs = np.where(chosen, scores[judged], 0).sum(axis=1) / count
    mine = np.where(np.arange(VOTES) < count[:, None], positives[judged], 0).sum(axis=1) / count
    near, far = (np.sqrt(np.clip(2 - 2 * mean, 0, None)) for mean in (theirs, mine))  # Euclidean, of unit rows
    suspect = far > FAR * near
    found = [
        Suspect(int(i), int(labels[i]), int(suggested[i]), float(1 - n / f), float(agreeing[i] / voters[i]))
        for i, n, f in zip(judged[suspect], near[suspect], far[suspect], strict=True)
    ]
    return tuple(sorted(found, key=lambda each: (-each.score, each.position)))


def _votes(
    labels: Ints, positives: Floats, rows: Ints, scores: Floats, forgery_of: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """Let the VOTES nearest images of each vote on its label.

    Returns:
        (N,) each: the other label with most votes, of equals the nearest, -1 for none; its votes; the votes for the
        own label; and how many could vote. Forgeries count as neighbours, but not for a label.
    """
    there = rows[:, :VOTES] >= 0
    others = np.where(there & (forgery_of[rows[:, :VOTES]] < 0), labels[rows[:, :VOTES]], -1)
    ballots = np.concatenate([np.full_like(others, -2), others], axis=1)  # -2: the own label
    alike = np.concatenate([positives, scores[:, :VOTES]], axis=1)
    order = np.argsort(-alike, axis=1, kind="stable")[:, :VOTES]
    ballots, voting = np.take_along_axis(ballots, order, 1), np.isfinite(np.take_along_axis(alike, order, 1))
    equal = (ballots[:, :, None] == ballots[:, None, :]).sum(axis=2) * (ballots >= 0)  # votes for the label of each
    winner = equal.argmax(axis=1)[:, None]
    agreeing = np.take_along_axis(equal, winner, 1)[:, 0]
    suggested = np.where(agreeing > 0, np.take_along_axis(ballots, winner, 1)[:, 0], -1)
    return suggested, agreeing, ((ballots == -2) & voting).sum(axis=1), voting.sum(axis=1)
