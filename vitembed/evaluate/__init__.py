"""How good is a model? Retrieval, few-shot and verification figures, with intervals and definitions, as plain values.

The definitions are those of `vitembed.metrics`, and every report carries its own in words. Thresholds in these reports
are chosen a posteriori, on the pairs that they are judged by, unless a verifier that was made on other pairs is judged.
Intervals are over identities: what another draw of as many identities could have given (for retrieval: as queries,
among the same images); with fewer than nine there is none.
"""

from vitembed.evaluate.decisions import DecisionErrors, ProbabilityErrors
from vitembed.evaluate.evaluation import (
    EvaluationReport,
    Labelled,
    evaluate,
    evaluate_data,
    evaluate_embeddings,
    evaluate_gallery,
    evaluate_given_pairs,
)
from vitembed.evaluate.few_shot import FewShotReport, Task, evaluate_few_shot
from vitembed.evaluate.figures import Figure, Interval
from vitembed.evaluate.mistakes import IdentityErrors, Mistakes, identity_errors, worst_mistakes
from vitembed.evaluate.references import ReferencesReport, evaluate_references
from vitembed.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from vitembed.evaluate.scored import EvaluatedPairs
from vitembed.evaluate.separation import FARS, Separation
from vitembed.evaluate.signatures import SignatureReport, Signatures, evaluate_signatures, signature_pairs
from vitembed.evaluate.splits import Duplicate, Side, SplitReport, check_split
from vitembed.evaluate.verification import VerificationReport, evaluate_pairs, evaluate_verification

__all__ = [
    "FARS",
    "DecisionErrors",
    "Duplicate",
    "EvaluatedPairs",
    "EvaluationReport",
    "FewShotReport",
    "Figure",
    "IdentityErrors",
    "Interval",
    "Labelled",
    "Mistakes",
    "ProbabilityErrors",
    "ReferencesReport",
    "RetrievalReport",
    "Separation",
    "Side",
    "SignatureReport",
    "Signatures",
    "SplitReport",
    "Task",
    "VerificationReport",
    "check_split",
    "evaluate",
    "evaluate_data",
    "evaluate_embeddings",
    "evaluate_few_shot",
    "evaluate_gallery",
    "evaluate_given_pairs",
    "evaluate_pairs",
    "evaluate_references",
    "evaluate_retrieval",
    "evaluate_signatures",
    "evaluate_verification",
    "identity_errors",
    "signature_pairs",
    "worst_mistakes",
]
