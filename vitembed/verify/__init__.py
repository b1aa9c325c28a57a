"""Decide whether two images match, with known error rates: labelled pairs, calibration, and the verifier."""

from vitembed.verify.calibration import Calibration, Logistic, calibrate, impostors_needed
from vitembed.verify.pairs import Pairs
from vitembed.verify.verifier import Decision, Encoder, Verifier

__all__ = [
    "Calibration",
    "Decision",
    "Encoder",
    "Logistic",
    "Pairs",
    "Verifier",
    "calibrate",
    "impostors_needed",
]
