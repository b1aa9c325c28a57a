"""The table of causes for which a training fails: the sign of each, the words, the advice, how long it must last.

The thresholds were set on recorded trainings of ViTs of 2 to 6 layers from random weights on stripes, digits and
Omniglot, with triplet ("all", "semihard"), contrastive, multi-similarity, NT-Xent, ProxyAnchor and ArcFace losses at
their usual rates, beside trainings that were broken on purpose; `benchmarks/collapse.py` provokes every cause. What
healthy runs do, and must not be stopped for: they begin with a spread of 0.04 (a ViT-S/16 and scanned signatures) to
0.8 (photographs) and all distances nearly equal; under proxies the spread halves before it grows, and with 964 classes
of Omniglot it fell to 0.007 for some 100 steps; hard mining from scratch draws all images of digits into a ball of
0.002, where recall@1 rose nevertheless, so that this is told and not stopped; the effective rank falls from 30 to 3.0
with 8 to 16 classes of characters, and to 2.4 with stripes, which have one dimension; gradients grow 50-fold within 30
steps; in the end no triplet is active. The measured ranges stand beside the thresholds.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from vitembed.training.health.signals import Signals

POINT = 0.01  # spread: cosines of all images are 1 to within 1e-4; collapsed runs had 0.007 and less
BLIND = 0.001  # spread: cosines of all images are 1 to within 1e-6, what float32 rounds away; hard mining had 0.0014
SHRUNK = 0.25  # of the largest spread; healthy runs went down to 0.53, hard mining that collapses to 0.14 and less
GROWN = 1.5  # times the first spread: a run that began in a point leaves it
NEAR = 0.1  # of the margin, between the mean distances; healthy runs have more than 0.4 after 10 steps
ALIKE = 0.05  # of the negatives' mean distance; labels at random have less, healthy runs more than 0.1 from the start
FLAT = 2.0  # effective rank; healthy runs have 2.4 and more, those of a far too high rate 1.3 to 1.9
FLATTER = 0.5  # of the largest effective rank
STILL = 1e-9  # learning rate; a step of AdamW is then below half a unit in the last place of a float32 weight of 0.02
VANISHED = 1e-6  # gradient, as a share of the loss; healthy runs have 0.5 and more
EXPLODED = 1e3  # times the gradients so far; healthy runs have 50


@dataclass
class Past:
    """What a doctor remembers of earlier looks, as JSON types.

    Attributes:
        first_spread: of the first look.
        spread: the largest.
        rank: the largest.
        rate: the largest learning rate.
        last_rate: the last one.
        is_rising: whether it rose since the look before: a warm-up is no time to judge by.
        was_active: whether any look had an active triplet.
        gradient: geometric mean of the norms, later ones weighing more.
    """

    first_spread: float | None = None
    spread: float = 0.0
    rank: float = 0.0
    rate: float = 0.0
    last_rate: float | None = None
    is_rising: bool = False
    was_active: bool = False
    gradient: float | None = None

    def begin(self, now: Signals) -> None:
        """Take in what a look says of itself."""
        rate = now.learning_rate
        self.is_rising = rate is not None and self.last_rate is not None and rate > self.last_rate
        self.last_rate = rate
        self.rate = max(self.rate, rate or 0.0)
        self.was_active = self.was_active or bool(now.active)
        if self.first_spread is None:
            self.first_spread = now.spread

    def end(self, now: Signals) -> None:
        """Keep what later looks are compared with."""
        self.spread, self.rank = max(self.spread, now.spread), max(self.rank, now.rank)
        if now.gradient:
            before = now.gradient if self.gradient is None else self.gradient
            self.gradient = before**0.9 * now.gradient**0.1


@dataclass(frozen=True)
class LossTraits:
    """What a doctor knows of the loss.

    Attributes:
        margin: in units of distance; None without.
        needs_pairs: whether it compares the images of a batch with each other.
    """

    margin: float | None
    needs_pairs: bool


@dataclass(frozen=True)
class Cause:
    """One row of the table.

    Attributes:
        name: a fixed word.
        shows: whether a look has the sign.
        evidence: words with the measured figures.
        advice: what to do.
        fatal: whether continuing is useless.
        patience: how many times the doctor's patience the sign must last.
    """

    name: str
    shows: Callable[[Signals, Past, LossTraits], bool]
    evidence: Callable[[Signals, Past, LossTraits], str]
    advice: str
    fatal: bool
    patience: float = 1.0

    @property
    def key(self) -> str:
        """The name of the row: some causes have one for the warning and one for the end."""
        return f"{self.name} (fatal)" if self.fatal else self.name


def _is_point(now: Signals, past: Past, _: LossTraits) -> bool:
    """Tell whether embeddings came together, or lie together from the start on and do not part."""
    stays = now.spread < GROWN * (past.first_spread or 0.0) and not past.is_rising
    return _in_a_point(now) and (now.spread < SHRUNK * past.spread or stays)


def _is_blind(now: Signals, past: Past, loss: LossTraits) -> bool:
    """Tell whether embeddings are in a point so small that float32 cannot tell them apart."""
    return now.spread < BLIND and _is_point(now, past, loss)


def _in_a_point(now: Signals) -> bool:
    return now.images > 1 and now.spread < POINT


def _is_alike(now: Signals, past: Past, loss: LossTraits) -> bool:
    """Tell whether all is in a point, or, for a loss without a margin to be stuck at, all pairs are equally far."""
    if _in_a_point(now) or loss.margin is not None or past.is_rising:
        return _is_point(now, past, loss)
    if now.positive_distance is None or now.negative_distance is None:
        return False
    return now.positive_distance > (1 - ALIKE) * now.negative_distance


def _is_at_margin(now: Signals, past: Past, loss: LossTraits) -> bool:
    if not loss.margin or now.positive_distance is None or now.negative_distance is None or past.is_rising:
        return False
    gap = now.negative_distance - now.positive_distance
    return gap < NEAR * loss.margin and now.loss > (1 - NEAR) * loss.margin and not _in_a_point(now)


def _is_frozen(now: Signals, *_: object) -> bool:
    """Tell whether nothing arrives in the backbone although the loss has a gradient, or could have one."""
    arrives_elsewhere = (now.loss if now.gradient is None else now.gradient) != 0
    return now.reached == 0 and (not now.trainable or arrives_elsewhere)


def _has_vanished(now: Signals, *_: object) -> bool:
    return now.gradient is not None and now.gradient < VANISHED * abs(now.loss) and not _in_a_point(now)


def _has_exploded(now: Signals, past: Past, _: LossTraits) -> bool:
    return now.gradient is not None and past.gradient is not None and now.gradient > EXPLODED * past.gradient


def _is_flat(now: Signals, past: Past, _: LossTraits) -> bool:
    """Tell whether four classes or more have come to lie on less than a plane."""
    return now.most_rank >= 3 and now.rank < min(FLAT, FLATTER * past.rank) and not _in_a_point(now)


def _distances(now: Signals) -> str:
    def words(distance: float | None) -> str:
        return "none" if distance is None else f"{distance:.3g}"

    return f"distance of positives {words(now.positive_distance)}, of negatives {words(now.negative_distance)}"


def _later(cause: Cause, times: float) -> Cause:
    """Return the row for a cause that has lasted so long that it is time to stop."""
    return dataclasses.replace(cause, fatal=True, patience=times * cause.patience)


_EQUAL = Cause(
    "equal-distances",
    _is_alike,
    lambda now, past, _: (
        f"all embeddings are alike: spread {now.spread:.2g}, largest so far {past.spread:.2g}; {_distances(now)}, "
        f"loss {now.loss:.4g}"
    ),
    "lower the learning rate, enlarge a margin near 0, check the labels; mining 'hard' from scratch ends like this, "
    "so begin with 'semihard' or 'all'",
    fatal=False,
)
AT_MARGIN = Cause(
    "loss-at-margin",
    _is_at_margin,
    lambda now, _, loss: f"the loss {now.loss:.4g} stays at the margin {loss.margin:g}: {_distances(now)}",
    "check the labels; then lower the learning rate, or mine 'semihard' or 'all' in place of 'hard'",
    fatal=False,
)

# In the order in which they are told where several are due at one look.
TABLE = (
    Cause(
        "one-class",
        lambda now, _, loss: loss.needs_pairs and now.classes == 1,
        lambda now, *_: f"the {now.images} images of a batch are of one class, so there are no negatives",
        "let ClassBalancedSampler draw the batches, or check the labels",
        fatal=True,
        patience=0.2,
    ),
    Cause(
        "no-positives",
        lambda now, _, loss: loss.needs_pairs and now.classes == now.images,
        lambda now, *_: f"the {now.images} images of a batch are of {now.classes} classes, so there are no positives",
        "draw 2 images of a class or more, or check the labels",
        fatal=True,
        patience=0.2,
    ),
    Cause(
        "frozen-backbone",
        _is_frozen,
        lambda now, *_: f"{now.trainable} tensors of the backbone require a gradient, {now.reached} have one",
        "set requires_grad, and look for detach() or no_grad() between backbone and loss",
        fatal=True,
        patience=0.3,
    ),
    Cause(
        "no-learning-rate",
        lambda now, past, _: now.learning_rate is not None and past.rate < STILL and not past.is_rising,
        lambda now, past, _: f"the learning rate is {now.learning_rate:.2g} and was never above {past.rate:.2g}",
        "below 1e-9 no weight moves; 1e-5 to 1e-3 is usual, and find_learning_rate suggests one",
        fatal=True,
        patience=0.6,
    ),
    Cause(
        "no-active-triplets",
        lambda now, past, _: now.active == 0 and not past.was_active,
        lambda now, *_: f"no triplet has had a non-zero term yet: loss {now.loss:.4g}, {_distances(now)}",
        "nothing can be learned from this: enlarge the margin, or check miner and labels",
        fatal=True,
    ),
    dataclasses.replace(_later(_EQUAL, 3), shows=_is_blind),
    _EQUAL,
    Cause(
        "gradient-vanishing",
        _has_vanished,
        lambda now, *_: f"the norm of the gradient is {now.gradient:.2g} while the loss is {now.loss:.4g}",
        "the loss is saturated or the network dead: check scale and margin of the loss, or begin with other weights",
        fatal=True,
    ),
    _later(AT_MARGIN, 5),
    AT_MARGIN,
    Cause(
        "gradient-exploding",
        _has_exploded,
        lambda now, past, _: f"the norm of the gradient is {now.gradient:.2g}, {past.gradient:.2g} in the mean so far",
        "lower the learning rate or clip the gradient; check that the loss cannot fall without end",
        fatal=False,
        patience=0.2,
    ),
    Cause(
        "rank-falling",
        _is_flat,
        lambda now, past, _: (
            f"the embeddings come to lie on a line: effective rank {now.rank:.2g}, was {past.rank:.2g}, "
            f"and {now.classes} classes allow {now.most_rank}"
        ),
        "lower the learning rate or the weight decay, or begin with other weights",
        fatal=False,
    ),
    Cause(
        "spread-falling",
        lambda now, past, _: now.spread < SHRUNK * past.spread and not _in_a_point(now),
        lambda now, past, _: (
            f"the embeddings draw together: spread {now.spread:.2g}, was {past.spread:.2g}; {_distances(now)}"
        ),
        "lower the learning rate, or mine 'semihard' or 'all' in place of 'hard'",
        fatal=False,
    ),
    Cause(
        "no-active-triplets",
        lambda now, past, _: now.active == 0 and past.was_active,
        lambda now, *_: f"no triplet is active any more: {_distances(now)}",
        "nothing is left to learn from these batches: stop, enlarge the margin, or mine over the whole data set",
        fatal=False,
    ),
)
