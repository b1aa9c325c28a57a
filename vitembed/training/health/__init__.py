"""What can be measured of a training at a step, and what may be wrong with it."""

from vitembed.training.health.collapse import CollapseDoctor, Diagnosis
from vitembed.training.health.signals import Signals, measure

__all__ = ["CollapseDoctor", "Diagnosis", "Signals", "measure"]
