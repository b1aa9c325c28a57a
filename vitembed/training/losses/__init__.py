"""Losses of metric learning, exact and by name; the miners that choose for them; memory; distillation."""

from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.losses.memory import CrossBatchMemory
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss, build_loss, build_miner

__all__ = ["ContrastiveLoss", "CrossBatchMemory", "DistillationLoss", "TripletLoss", "build_loss", "build_miner"]
