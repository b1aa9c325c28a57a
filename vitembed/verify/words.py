"""A decision in words that a clerk understands: the verdict, where the score lies, and how often such answers err.

Rates become counts of 1,000 pairs, which people read more safely than percentages (Gigerenzer and Hoffrage 1995, "How
to improve Bayesian reasoning without instruction: frequency formats"). No number says more than the data can show:
where nothing erred, the largest rate that would have gone unnoticed is said.
"""

import math
from dataclasses import dataclass
from datetime import datetime

from vitembed.verify.calibration import Calibration

SIGNS = {"match": "✓", "no match": "✗", "unsure": "?"}
"""Of each verdict: what tells them apart without colour."""

HEADLINES = {"match": "Match", "no match": "No match", "unsure": "Unsure: have a person look"}

_BASES = (1_000, 10_000, 100_000, 1_000_000)  # a rate is said of the first of these that makes a whole number of it
_DIGITS = range(3, 9)

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Terms:
    """What is compared, in words.

    Attributes:
        people: what identities are, in the plural: people, products.
        different: comparisons that ought not to match, in the plural.
        genuine: comparisons that ought to match, in the plural.
        trials: comparisons of all kinds, in the plural.
    """

    people: str
    different: str
    genuine: str
    trials: str

    @classmethod
    def of_pairs(cls, people: str) -> "Terms":
        """Return the terms for two images that are compared with each other."""
        return cls(people, f"pairs of different {people}", "genuine pairs", "pairs")

    @classmethod
    def of_references(cls, people: str) -> "Terms":
        """Return the terms for an image that is compared with the references of an identity."""
        return cls(people, f"images of other {people}", "genuine images", "comparisons with references")


def digits_needed(*values: float) -> int:
    """Return how many decimals, 3 to 8, tell all these numbers apart that are not equal.

    >>> digits_needed(0.8, 0.7), digits_needed(0.71189, 0.71211)
    (3, 4)
    """
    distinct = set(values)
    for digits in _DIGITS:
        if len({f"{value:.{digits}f}" for value in distinct}) == len(distinct):
            return digits
    return _DIGITS[-1]


def where_it_lies(verdict: str, score: float, threshold: float, reject_below: float | None) -> str:
    """Return one sentence that says on which side of which line the score lies."""
    lines = [threshold] if reject_below is None else [threshold, reject_below]
    digits = digits_needed(score, *lines)
    at, line = f"{score:.{digits}f}", f"{threshold:.{digits}f}"
    if verdict == "unsure" and reject_below is not None:
        return (
            f"The score, {at}, lies between {reject_below:.{digits}f} and {line}: too high to refuse and too low to "
            "accept, so a person should compare the images."
        )
    if verdict == "match":
        place = "exactly on" if score == threshold else "above"
        return f"The score, {at}, lies {place} the line for a match, {line}."
    if reject_below is None:
        return f"The score, {at}, lies below the line for a match, {line}."
    return f"The score, {at}, lies below {reject_below:.{digits}f}, where pairs are refused without a second look."


def how_often_it_errs(calibration: Calibration, terms: Terms, created: str) -> list[str]:
    """Return sentences that say how many of each kind would be judged wrongly, and what that was measured on.

    Args:
        calibration: with the rates and their intervals.
        terms: what is compared.
        created: when it was measured, ISO 8601, or empty.
    """
    known = calibration
    parts = []
    if known.far_random is not None:
        rate, interval, trials = known.far_random, known.far_random_interval, known.random
    else:
        rate, interval, trials = known.far, known.far_interval, known.non_matches
    if known.far_random is not None or known.far_skilled is None:
        parts.append(share_in_words(rate, interval, trials or 0, terms.different, "would be accepted"))
    unsure = round(1_000 * known.unsure_matches)
    left = f", {unsure:,} of them left to a person" if unsure and 1_000 * known.frr >= 1 else ""
    fate = "would be refused" if known.reject_below is None else "would not be accepted"
    parts.append(share_in_words(known.frr, known.frr_interval, known.matches, terms.genuine, fate) + left)
    sentences = [f"Decided so, {', and '.join(parts)}."]
    if known.far_skilled is not None:
        rate, interval = known.far_skilled, known.far_skilled_interval
        forged = share_in_words(rate, interval, known.skilled or 0, "skilled forgeries", "would be accepted")
        sentences.append(f"{_capital(forged)}.")
    day = f" on {date_in_words(created)}" if created else ""
    whom = "" if known.identities is None else f" of {known.identities:,} {terms.people}"
    sentences.append(f"This was measured on {known.matches + known.non_matches:,} {terms.trials}{whom}{day}.")
    return sentences


def share_in_words(rate: float, interval: Interval, trials: int, of_what: str, fate: str) -> str:
    """Return a rate as a count of 1,000 (or more, where that would be less than one), with its interval.

    Args:
        rate: the measured share of errors, in [0, 1].
        interval: its 95 % interval; None where nobody knows it, as too few were measured.
        trials: how many were measured.
        of_what: what they are, in the plural.
        fate: what would happen to those that are counted: would be accepted.

    >>> share_in_words(0.009, (0.003, 0.021), 5_000, "genuine pairs", "would be refused")
    'of 1,000 genuine pairs about 9 (between 3 and 21) would be refused'
    >>> share_in_words(0.0, (0.0, 0.0), 600, "genuine pairs", "would be refused")
    'of 1,000 genuine pairs fewer than 5 would be refused'
    """
    base = next((base for base in _BASES if base * rate >= 1), _BASES[-1])
    if interval is None:
        counted = f"of {base:,} {of_what} about {round(base * rate):,}" if rate else f"of {trials:,} {of_what} none"
        return f"{counted} (too few were measured to know how exact this is) {fate}"
    low, high = interval
    if rate > 0:
        count = f"about {round(base * rate):,}" if base * rate >= 1 else "fewer than 1"
        return f"of {base:,} {of_what} {count} (between {_down(base * low):,} and {_up(base * high):,}) {fate}"
    # The rule of three: what none of n trials showed is rarer than 3 / n, with 95 % confidence.
    bound = max(high, 3 / max(trials, 1))
    if bound >= 1:
        return f"nobody can say how many {of_what} {fate} (only {trials:,} were measured)"
    base = next((base for base in _BASES if base * bound >= 1), _BASES[-1])
    return f"of {base:,} {of_what} fewer than {_up(base * bound):,} {fate}"


def date_in_words(created: str) -> str:
    """Return the day of an ISO 8601 date or time; another text as it is.

    >>> date_in_words("2026-11-21T20:05:00+00:00")
    '21 November 2026'
    """
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y}"


def how_probable(probability: float, prior: float, verdict: str) -> str:
    """Return the probability of a match in words, with what was supposed before the images were seen.

    The line is chosen for a rate of false accepts, not for even odds: where the two seem to disagree, that is said.
    """
    if probability > 0.999:
        likely = "more than 99.9 %"
    elif probability < 0.001:
        likely = "less than 0.1 %"
    else:
        likely = f"{probability:.1%}".replace("%", " %")
    if prior == 0.5:
        before = "match and no match were equally likely beforehand"
    else:
        base = next((base for base in (100, *_BASES) if base * prior >= 1), _BASES[-1])
        before = f"{base * prior:.3g} of {base:,} that are asked about match"
    said = f"If {before}, the probability of a match is {likely}."
    if verdict != "match" and probability > 0.5:
        return f"{said} The line asks for more than that, so that false accepts stay rare."
    if verdict == "match" and probability < 0.5:
        return f"{said} The line does not know what was likely beforehand."
    return said


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _down(value: float) -> int:
    return math.floor(round(value, 6))


def _up(value: float) -> int:
    return math.ceil(round(value, 6))  # 21.000000000000004 is 21
