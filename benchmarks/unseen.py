"""Does a threshold keep its promise on identities never seen?

    python benchmarks/unseen.py MODEL CALIBRATION TEST               # folders of identities, or of signatures
    python benchmarks/unseen.py MODEL DATA --share 0.5 --seed 0      # identities of one folder, drawn by the seed

The threshold is chosen on the identities of CALIBRATION for each wanted false-accept rate, against skilled forgeries
and against random pairs where there are both; the rates are then measured on those of TEST. Printed are what was
predicted for so many other identities (95 %), what was measured, and how well the probability is calibrated there: the
expected calibration error and the Brier score, beside (1 + cosine) / 2. Last come decisions by six references of an
identity: the rule is chosen on CALIBRATION, and its equal error rates on TEST have intervals over identities.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitembed import Embedder, ImageDataset, Pairs, metrics
from vitembed.errors import DataError, VerifierError
from vitembed.verify import Calibration, calibrate, fit_references
from vitembed.verify.reference_rules import Rule
from vitembed.verify.reference_trials import checked_identities, draw_trials

REFERENCES = 6


def scored(vectors: NDArray[np.float64], data: ImageDataset) -> tuple[NDArray[np.float64], Pairs]:
    """Return pairs of a data set, as positions, and their cosines."""
    pairs = Pairs.from_labels(range(len(vectors)), data.labels, data.forgery_of)  # type: ignore[arg-type]
    left, right = np.array(pairs.left, np.int64), np.array(pairs.right, np.int64)
    return np.einsum("nd,nd->n", vectors[left], vectors[right]).clip(-1, 1), pairs


def in_words(rate: float | None, interval: tuple[float, float] | None, seen: float | None) -> str:
    """Return a predicted interval, what was seen, and whether it lies inside."""
    if rate is None or interval is None or seen is None:
        return "-"
    verdict = "inside" if interval[0] <= seen <= interval[1] else "OUTSIDE"
    return f"{100 * seen:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}) {verdict}"


def print_references(vectors: NDArray[np.float64], data: ImageDataset, rule: Rule) -> None:
    """Print the equal error rates of a rule for six references, by kind of forgery."""
    random = np.random.default_rng(0)
    trials = draw_trials(*checked_identities(vectors, data.labels, data.forgery_of), REFERENCES, 300, random)
    scores = rule(trials.evidence)
    for name, kind in (("skilled", trials.skilled), ("random", ~trials.skilled & ~trials.is_match)):
        if kind.any():
            chosen = kind | trials.is_match
            kept, flags, whom = scores[chosen], trials.is_match[chosen], trials.identities[chosen]
            eer = metrics.equal_error_rate(kept, flags)[0]
            table = metrics.WeightedScores(kept, flags)
            low, high = metrics.bootstrap_interval(
                lambda weights, table=table: table.table(weights).equal_error_rate()[0], whom, weighted=True
            )
            print(f"EER by {REFERENCES} references, rule {rule.name}, {name}: {eer:.1%} ({low:.1%} to {high:.1%})")


def print_row(found: Calibration, scores: NDArray[np.float64], pairs: Pairs) -> None:
    seen = metrics.error_rates(scores, pairs.is_match, found.threshold, pairs.skilled)
    cells = [
        in_words(found.far_skilled, found.far_skilled_interval, seen.far_skilled),
        in_words(found.far_random, found.far_random_interval, seen.far_random),
        in_words(found.frr, found.frr_interval, seen.frr),
    ]
    told, raw = found.curve(scores), (1 + scores) / 2
    errors = [metrics.expected_calibration_error(p, pairs.is_match, prior=0.5) for p in (raw, told)]
    brier = [metrics.brier_score(p, pairs.is_match, prior=0.5) for p in (raw, told)]
    cells += [f"{errors[0]:.3f} -> {errors[1]:.3f}", f"{brier[0]:.3f} -> {brier[1]:.3f}"]
    print(f"| {found.far_wanted:.0%} against {found.against} | {' | '.join(cells)} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, nargs="+", help="CALIBRATION and TEST, or one folder to divide")
    parser.add_argument("--share", type=float, default=0.5, help="of one folder's identities, for the threshold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--far", type=float, nargs="+", default=[0.01, 0.05])
    args = parser.parse_args(arguments)
    model = Embedder.from_pretrained(args.model)
    sides = [ImageDataset.load(folder) for folder in args.data]
    if len(sides) == 1:
        order = np.random.default_rng(args.seed).permutation(len(sides[0].classes))
        first = np.isin(sides[0].labels, order[: round(args.share * len(order))])
        sides = [sides[0].subset(first), sides[0].subset(~first)]
    rows, test_rows = (model.encode(side.images, progress=True).astype(np.float64) for side in sides[:2])
    (scores, pairs), (test_scores, test_pairs) = scored(rows, sides[0]), scored(test_rows, sides[1])
    assert pairs.skilled is not None
    chosen_on, others = (len(np.unique(np.asarray(side.identities))) for side in (pairs, test_pairs))
    print(f"{chosen_on} identities for the threshold, {others} others to test it; rates in %")
    print("| wanted FAR | skilled, measured (predicted) | random | FRR | calibration error | Brier |")
    print("|---|---|---|---|---|---|")
    for far in args.far:
        for against in ("skilled", "random") if pairs.skilled.any() else ("all",):
            found = calibrate(
                scores,
                pairs.is_match,
                far,
                identities=pairs.identities,
                skilled=pairs.skilled,
                against=against,
                test_identities=others,
            )
            print_row(found, test_scores, test_pairs)
    try:
        fitted = fit_references(rows, sides[0].labels, sides[0].forgery_of, REFERENCES, max(args.far), against="random")
        print_references(test_rows, sides[1], fitted.rule)
    except (DataError, VerifierError) as error:
        print(f"no decisions by references: {error}")


if __name__ == "__main__":
    main()
