"""The numbers by which embeddings and scores are judged, in plain numpy.

Two families. Retrieval metrics (`retrieval.py`) take embeddings (N, D) with labels (N,) and ask whether the
nearest images are of the same class; their score is the cosine, and rows are brought to unit length here, so raw
pixels can be judged beside a model. Verification metrics (`pairs.py`) take the scores of pairs (P,) with
`is_match` (P,) and ask how well a threshold tells the two kinds apart: a pair is accepted when score >= threshold,
FAR is the share of non-matching pairs that are accepted, FRR the share of matching pairs that are not, TAR is
1 - FRR. `intervals.py` says how far a rate can be trusted.

Invariants: equal scores count against the model, never for it; a similarity matrix is never held whole; input
that would give a meaningless number (NaN, one class, one kind of pair) is an error.
"""

from vitembed.metrics.checks import checked_pairs, unit_rows
from vitembed.metrics.intervals import IDENTITIES_NEEDED, bootstrap_interval, wilson_interval
from vitembed.metrics.pairs import (
    RocCurve,
    equal_error_rate,
    pair_scores,
    roc_auc,
    roc_curve,
    tar_at_far,
    threshold_at_far,
)
from vitembed.metrics.retrieval import QueryRanks, map_at_r, query_ranks, recall_at_k

__all__ = [
    "IDENTITIES_NEEDED",
    "QueryRanks",
    "RocCurve",
    "bootstrap_interval",
    "checked_pairs",
    "equal_error_rate",
    "map_at_r",
    "pair_scores",
    "query_ranks",
    "recall_at_k",
    "roc_auc",
    "roc_curve",
    "tar_at_far",
    "threshold_at_far",
    "unit_rows",
    "wilson_interval",
]
