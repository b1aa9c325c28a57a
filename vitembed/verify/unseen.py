"""What error rates a threshold will show on identities never seen: intervals that count both sources of chance.

A threshold chosen on some identities is a matter of chance: others would have given another one. The identities that
it meets later are a second draw. An interval that lets only one of the two vary is too narrow. Here each round draws
identities with replacement to choose the threshold on, draws as many as will be met for the rates, and the interval
holds the middle share of the rates: the bootstrap (Efron 1979) with identities as its units (Bolle, Ratha and
Pankanti 2004), as a prediction.

A bootstrap of n units varies less than n units do, by the factor sqrt((n - 1) / n), and has the normal's tails instead
of Student's. Both are mended by smaller draws (`drawn_sizes`), which keep the skewness that rates near 0 have.

Measured on simulated identities, FAR 1 % and 5 %, as the share of unseen rates inside a 95 % interval. Skilled
forgeries of 30 writers, 9 others met: 93 to 96 % where the writers' ease follows a normal or log-normal law, 90 to 95 %
where it is exponential. Of 12 writers, 12 others met: 83 to 95 %, as few identities cannot show how bad the worst are.
Random pairs of unit vectors: 98 to 100 %, as drawing both sides of a pair counts the pair's own chance more than once.
On 43 real writers (gradients as embedding, 34 chosen on and 9 met in 100 random splits): 95 and 96 % for skilled
forgeries, 96 and 93 % for random ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.metrics.checks import checked_scores
from vitembed.verify.scored import ScoredPairs, identity_codes

Interval: TypeAlias = tuple[float, float]

ROUNDS = 400


@dataclass(frozen=True, eq=False)
class Side:
    """The scores of one kind of pair, ascending, with the identities that they show.

    Attributes:
        scores: (P,) ascending, P >= 1.
        left: (P,) the number of one image's identity, from 0 on.
        right: (P,) the other's; `identities` where both are the same.
        identities: how many there are, over all kinds of pair.
    """

    scores: NDArray[np.floating[Any]]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    identities: int

    @classmethod
    def of(cls, scores: NDArray[np.floating[Any]], codes: NDArray[np.int64], identities: int) -> "Side":
        """Sort the scores (P,) of pairs with the identities codes (P, 2), which are numbered below `identities`."""
        order = np.argsort(scores, kind="stable")
        left, right = codes[order].T
        return cls(scores[order], left, np.where(left == right, identities, right), identities)

    @property
    def shown(self) -> int:
        """How many identities these pairs show; where few are compared with many, the few and one more.

        Of all pairs of n identities, each written down once, one identity is never on the left: hence the one more.
        """
        present = np.zeros((2, self.identities), dtype=np.bool_)
        present[0, self.left] = True
        present[1, np.where(self.right < self.identities, self.right, self.left)] = True
        return int(min(present.any(axis=0).sum(), present.sum(axis=1).min() + 1))

    def weights(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how often each pair comes, (P,), when identity i was drawn drawn[i] times.

        A pair of two identities comes as often as the product of both; a pair of one (a matching pair, or a skilled
        forgery with the identity that it imitates) as often as that one: two copies of it are the same person.
        """
        padded = np.append(drawn, 1)
        result: NDArray[np.int64] = padded[self.left] * padded[self.right]
        return result

    def best_refused(self, weights: NDArray[np.int64], far: float) -> float:
        """Return the score that only those above it may be accepted to keep the rate `far` of the weighted pairs."""
        accepted = np.cumsum(weights[::-1])  # from the best score down
        allowed = far * accepted[-1] * (1 + 1e-12)
        kept = int(np.searchsorted(accepted, allowed, side="right"))
        return float(self.scores[-kept - 1])

    def share_above(self, score: float, weights: NDArray[np.int64]) -> float:
        """Return the share of the weighted pairs whose score is higher; NaN where all weights are 0."""
        total = int(weights.sum())
        first = int(np.searchsorted(self.scores, np.asarray(score, self.scores.dtype), side="right"))
        return float(weights[first:].sum() / total) if total else float("nan")


def sides_of(pairs: ScoredPairs) -> dict[str, Side]:
    """Return the pairs of each kind that there is; where identities are not known each pair counts as its own."""
    identities = int(pairs.codes.max()) + 1
    return {kind: Side.of(pairs.scores[mask], pairs.codes[mask], identities) for kind, mask in pairs.kinds.items()}


def drawn_sizes(identities: int, others: int, freedom: float, level: float = 0.95) -> tuple[int, int]:
    """Return of how many identities each round chooses the threshold, and on how many it measures.

    Args:
        identities: how many there are.
        others: how many will be met.
        freedom: degrees of freedom, at least 2, of the variance between identities.
        level: of the interval.

    >>> drawn_sizes(30, 9, freedom=29), drawn_sizes(30, 9, freedom=5), drawn_sizes(1000, 50, freedom=999)
    ((27, 8), (17, 5), (997, 50))
    """
    factor = metrics.draw_share(identities, freedom, level)
    return max(2, round(factor * identities)), max(1, round(factor * others))


def degrees_of_freedom(side: Side, refused: float) -> float:
    """Return how well the identities tell the variance of the accepted share between them: 2 to identities - 1.

    A variance from n draws has 2 n / (k - 1) degrees of freedom, where k is their kurtosis: n for a normal (k = 3), and
    hardly more than 2 where one identity alone has all the false accepts (k = n). A few identities that are easily
    imitated are the rule: without this, intervals held 86 to 93 % of the rates of simulated skilled forgeries.
    """
    accepted = side.scores > refused
    excess = accepted - accepted.mean()
    both = side.right < side.identities
    of_each = np.bincount(side.left, excess, side.identities)
    of_each += np.bincount(side.right[both], excess[both], side.identities)
    squares = of_each**2
    if not squares.any():
        return side.identities - 1
    kurtosis = side.identities * float(squares @ squares) / float(squares.sum()) ** 2
    return float(np.clip(2 * side.identities / max(kurtosis - 1, 1e-9), 2, side.identities - 1))


def predict_acceptance(
    sides: Mapping[str, Side],
    chosen_on: str,
    far: float,
    others: int | None = None,
    *,
    level: float = 0.95,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return for each kind of pair the interval of its accepted share on other identities.

    Args:
        sides: the pairs of each kind; all number the same identities.
        chosen_on: the kind of pair on which the threshold is chosen.
        far: the accepted share of that kind, in (0, 1), that the threshold keeps to.
        others: how many identities will be met; as many as here by default.
        level: the share of rounds inside an interval.
        rounds: how many times to draw.
        seed: of the random numbers.

    Returns:
        The intervals, also at least as wide as Wilson's for the pairs that there are: where none was accepted, every
        round would say 0. Without kinds whose pairs show fewer than `vitembed.metrics.IDENTITIES_NEEDED` identities,
        and empty where those of `chosen_on` do.
    """
    choosing = sides[chosen_on]
    identities = choosing.identities
    known = {kind: side for kind, side in sides.items() if side.shown >= metrics.IDENTITIES_NEEDED}
    if chosen_on not in known:
        return {}
    rng = np.random.default_rng(seed)
    everything = np.ones(choosing.scores.size, dtype=np.int64)
    threshold = choosing.best_refused(everything, far)
    freedom = degrees_of_freedom(choosing, threshold)
    sizes = drawn_sizes(identities, others or identities, freedom, level)
    shares: dict[str, list[float]] = {kind: [] for kind in known}
    for _ in range(rounds):
        chosen, met = (np.bincount(rng.integers(identities, size=n), minlength=identities) for n in sizes)
        weights = choosing.weights(chosen)
        if not weights.any():
            continue
        refused = choosing.best_refused(weights, far)
        for kind, side in known.items():
            shares[kind].append(side.share_above(refused, side.weights(met)))
    return {
        kind: found for kind in known if (found := _interval(shares[kind], known[kind], threshold, level)) is not None
    }


def _interval(shares: list[float], side: Side, refused: float, level: float) -> Interval | None:
    """Return the middle `level` of the shares that are numbers, widened to Wilson's interval; None for a few."""
    seen = np.array(shares)
    seen = seen[~np.isnan(seen)]
    if seen.size < len(shares) / 2:
        return None
    low, high = np.quantile(seen, [(1 - level) / 2, (1 + level) / 2])
    accepted = side.scores.size - int(np.searchsorted(side.scores, refused, side="right"))
    least, most = metrics.wilson_interval(accepted, side.scores.size, level)
    return min(float(low), least), max(float(high), most)


def predicted_far_interval(
    impostor_scores: ArrayLike,
    identities: ArrayLike | None,
    far: float,
    test_identities: int | None = None,
    *,
    level: float = 0.95,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Interval | None:
    """Return the interval of the FAR that other identities will show with the threshold that these ones give for `far`.

    It is a prediction: of data sets of so many identities as here, the threshold of each used on `test_identities`
    others of the same population, the share `level` gives a FAR inside. It is not the interval of the long-run FAR
    of this very threshold, which is narrower.

    Args:
        impostor_scores: (P,) finite scores of non-matching pairs, on which the threshold is chosen
            (`vitembed.metrics.threshold_at_far`).
        identities: (P, 2) whom the two images of each pair show; for a skilled forgery twice the identity that it
            imitates. None: each pair on its own.
        far: in (0, 1).
        test_identities: how many identities (or pairs, where identities are None) there will be; as many as here by
            default. The fewer they are, the wider the interval.
        level: the share of such experiments whose FAR the interval should hold.
        rounds: how many times to draw.
        seed: of the random numbers.

    Returns:
        The interval, or None with fewer than `vitembed.metrics.IDENTITIES_NEEDED` identities: nobody knows then.

    Raises:
        ConfigError: a number is out of range.
        VectorError: the scores are no finite (P,) array.
        DataError: the identities do not fit the scores.
    """
    check_test_identities(test_identities)
    if not (0 < far < 1 and 0 < level < 1 and rounds >= 1):
        raise ConfigError(f"expected far and level in (0, 1) and rounds of at least 1; got {far}, {level} and {rounds}")
    scores = checked_scores(impostor_scores)
    if not scores.size:
        raise DataError("expected scores of non-matching pairs; got none")
    codes, _ = identity_codes(identities, scores.size)
    sides = {"all": Side.of(scores, codes, int(codes.max()) + 1)}
    return predict_acceptance(sides, "all", far, test_identities, level=level, rounds=rounds, seed=seed).get("all")


def check_test_identities(count: int | None) -> None:
    """Refuse a number of identities that cannot be drawn.

    Raises:
        ConfigError: it is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"test_identities must be at least 1; got {count}")
