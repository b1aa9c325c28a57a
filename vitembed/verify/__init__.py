"""Decide whether two images match, with known error rates: labelled pairs, calibration, and the verifier."""

from vitembed.verify.calibration import Calibration, Verdict, calibrate
from vitembed.verify.curves import Isotonic, LikelihoodRatio, Logistic
from vitembed.verify.enrolment import Enrolment
from vitembed.verify.fitting import choose_curve
from vitembed.verify.labelled import fit_labelled
from vitembed.verify.pairs import Pairs
from vitembed.verify.reference_decisions import EnrolmentReport, Identification, ReferenceDecision
from vitembed.verify.references import ReferenceCalibration, fit_references
from vitembed.verify.thresholds import impostors_needed
from vitembed.verify.transfer import transfer
from vitembed.verify.unseen import predicted_far_interval
from vitembed.verify.verifier import Decision, Encoder, Verifier

__all__ = [
    "Calibration",
    "Decision",
    "Encoder",
    "Enrolment",
    "EnrolmentReport",
    "Identification",
    "Isotonic",
    "LikelihoodRatio",
    "Logistic",
    "Pairs",
    "ReferenceCalibration",
    "ReferenceDecision",
    "Verdict",
    "Verifier",
    "calibrate",
    "choose_curve",
    "fit_labelled",
    "fit_references",
    "impostors_needed",
    "predicted_far_interval",
    "transfer",
]
