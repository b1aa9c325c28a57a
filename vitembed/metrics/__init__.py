"""The numbers by which embeddings and scores are judged, in plain numpy.

Two families. Metrics of embeddings take these (N, D) with labels (N,): whether the nearest images are of the same class
(`retrieval.py`), whether a few examples are enough to name others (`few_shot.py`), whether clusters are the classes
(`clustering.py`). Their score is the cosine, and rows are brought to unit length here, so raw pixels can be judged
beside a model. Verification metrics (`pairs.py`) take the scores of pairs (P,) with
`is_match` (P,) and ask how well a threshold tells the two kinds apart: a pair is accepted when score >= threshold,
FAR is the share of non-matching pairs that are accepted, FRR the share of matching pairs that are not, TAR is
1 - FRR; `ScoreTable` answers several such questions of the same pairs, of any number, at one counting. Metrics of
probabilities (`probabilities.py`) ask whether they come true. `intervals.py` says how far a rate can be trusted.

Invariants: equal scores count against the model, never for it; a similarity matrix is never held whole; input
that would give a meaningless number (NaN, one class, one kind of pair) is an error.
"""

from vitembed.metrics.checks import checked_pairs, unit_rows
from vitembed.metrics.clustering import cluster_rows, normalized_mutual_information
from vitembed.metrics.few_shot import few_shot_accuracy
from vitembed.metrics.intervals import (
    IDENTITIES_NEEDED,
    bootstrap_interval,
    bootstrap_intervals,
    draw_share,
    wilson_interval,
)
from vitembed.metrics.operating_points import RocCurve
from vitembed.metrics.pairs import (
    ErrorRates,
    det_curve,
    equal_error_rate,
    error_rates,
    impostor_kinds,
    pair_scores,
    roc_auc,
    roc_curve,
    tar_at_far,
    threshold_at_far,
)
from vitembed.metrics.probabilities import (
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    log_loss,
    reliability_curve,
)
from vitembed.metrics.retrieval import (
    QueryRanks,
    cmc,
    knn_accuracy,
    map_at_r,
    mean_average_precision,
    mean_reciprocal_rank,
    precision_at_k,
    query_ranks,
    r_precision,
    recall_at_k,
)
from vitembed.metrics.score_table import ScoreTable, WeightedScores

__all__ = [
    "IDENTITIES_NEEDED",
    "ErrorRates",
    "QueryRanks",
    "ReliabilityCurve",
    "RocCurve",
    "ScoreTable",
    "WeightedScores",
    "bootstrap_interval",
    "bootstrap_intervals",
    "brier_score",
    "checked_pairs",
    "cluster_rows",
    "cmc",
    "det_curve",
    "draw_share",
    "equal_error_rate",
    "error_rates",
    "expected_calibration_error",
    "few_shot_accuracy",
    "impostor_kinds",
    "knn_accuracy",
    "log_loss",
    "map_at_r",
    "mean_average_precision",
    "mean_reciprocal_rank",
    "normalized_mutual_information",
    "pair_scores",
    "precision_at_k",
    "query_ranks",
    "r_precision",
    "recall_at_k",
    "reliability_curve",
    "roc_auc",
    "roc_curve",
    "tar_at_far",
    "threshold_at_far",
    "unit_rows",
    "wilson_interval",
]
