"""Where the errors are: which identities they concern, and which pairs are judged the most wrongly."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.errors import ConfigError
from vitembed.evaluate.scored import EvaluatedPairs, Ints

SHOWN = 12
"""False accepts, and false rejects, that a report names."""


@dataclass(frozen=True)
class IdentityErrors:
    """How the pairs of one identity are judged at a threshold.

    Attributes:
        identity: its name.
        matches: pairs of two of its images.
        random: pairs of one of its images and one of another identity.
        skilled: pairs of one of its images and a forgery of it.
        frr: the share of its matching pairs that is rejected; None without such pairs.
        far_random: the share of its random pairs that is accepted; None without such pairs.
        far_skilled: the share of its skilled forgeries that is accepted; None without such pairs.
        eer: equal error rate over its own pairs, at its own threshold a posteriori, against the skilled forgeries where
            there are some and else against the random ones; None where one kind is missing.
    """

    identity: str
    matches: int
    random: int
    skilled: int
    frr: float | None
    far_random: float | None
    far_skilled: float | None
    eer: float | None

    @property
    def error(self) -> float:
        """The mean of the rates of wrong rejection and wrong acceptance, skilled where known; a missing one is 0."""
        accepted = self.far_random if self.far_skilled is None else self.far_skilled
        return ((self.frr or 0.0) + (accepted or 0.0)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Mistakes:
    """The pairs that are judged the most wrongly at a threshold, the worst first.

    Attributes:
        threshold: pairs of at least this score are accepted.
        false_accepts: positions of the pairs that do not match and score highest.
        false_rejects: positions of the matching pairs that score lowest.
        accepted: how many pairs are accepted wrongly in all.
        rejected: how many pairs are rejected wrongly in all.
    """

    threshold: float
    false_accepts: tuple[int, ...]
    false_rejects: tuple[int, ...]
    accepted: int
    rejected: int


def worst_mistakes(pairs: EvaluatedPairs, threshold: float, count: int = SHOWN) -> Mistakes:
    """Return the worst mistakes at a threshold, at most `count` of either kind; of equal scores the earlier pair.

    Raises:
        ConfigError: `count` is negative.
    """
    if count < 0:
        raise ConfigError(f"count must not be negative; got {count}")
    accepted = pairs.at_least(threshold)
    false_accepts = np.flatnonzero(accepted & ~pairs.is_match)
    false_rejects = np.flatnonzero(~accepted & pairs.is_match)
    highest = np.argsort(-pairs.scores[false_accepts], kind="stable")[:count]
    lowest = np.argsort(pairs.scores[false_rejects], kind="stable")[:count]
    return Mistakes(
        threshold=threshold,
        false_accepts=tuple(false_accepts[highest].tolist()),
        false_rejects=tuple(false_rejects[lowest].tolist()),
        accepted=false_accepts.size,
        rejected=false_rejects.size,
    )


def identity_errors(pairs: EvaluatedPairs, threshold: float) -> tuple[IdentityErrors, ...]:
    """Return the errors of each identity at a threshold, the worst first; nothing where identities are not known.

    A pair of two identities counts for both. The worst is the one with the highest mean of its rates of wrong
    rejection and wrong acceptance; of equal ones the first by name.
    """
    if pairs.identities is None:
        return ()
    skilled = np.zeros(len(pairs), dtype=np.bool_) if pairs.skilled is None else pairs.skilled
    random = ~pairs.is_match & ~skilled
    accepted = pairs.at_least(threshold)
    left, right = pairs.identities[:, 0], pairs.identities[:, 1]
    own = [_counts(left[chosen], accepted[chosen], len(pairs.names)) for chosen in (pairs.is_match, skilled)]
    both = np.concatenate([left[random], right[random]])
    others = _counts(both, np.tile(accepted[random], 2), len(pairs.names))
    eers = _own_error_rates(pairs, skilled, random)
    found = []
    for code, name in enumerate(pairs.names):
        (matches, hits), (forged, passed), (foreign, taken) = (table[:, code].tolist() for table in (*own, others))
        if matches + forged + foreign == 0:
            continue
        found.append(
            IdentityErrors(
                identity=name,
                matches=matches,
                random=foreign,
                skilled=forged,
                frr=(matches - hits) / matches if matches else None,
                far_random=taken / foreign if foreign else None,
                far_skilled=passed / forged if forged else None,
                eer=eers.get(code),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.error, one.identity)))


def _counts(codes: Ints, accepted: NDArray[np.bool_], size: int) -> Ints:
    """Return how many pairs each identity has, and how many of these are accepted: (2, size)."""
    return np.stack([np.bincount(codes, minlength=size), np.bincount(codes[accepted], minlength=size)])


def _own_error_rates(pairs: EvaluatedPairs, skilled: NDArray[np.bool_], random: NDArray[np.bool_]) -> dict[int, float]:
    """Return the equal error rate of each identity that has pairs of both kinds."""
    assert pairs.identities is not None
    against = skilled if skilled.any() else random
    rows = np.flatnonzero(pairs.is_match | against)
    second = np.flatnonzero(against & (pairs.identities[:, 0] != pairs.identities[:, 1]))  # count for both sides
    codes = np.concatenate([pairs.identities[rows, 0], pairs.identities[second, 1]])
    at = np.concatenate([rows, second])
    order = np.argsort(codes, kind="stable")
    codes, at = codes[order], at[order]
    found = {}
    for group in np.split(np.arange(codes.size), np.flatnonzero(np.diff(codes)) + 1):
        chosen = at[group]
        matching = pairs.is_match[chosen]
        if matching.any() and not matching.all():
            found[int(codes[group[0]])] = metrics.equal_error_rate(pairs.scores[chosen], matching)[0]
    return found
