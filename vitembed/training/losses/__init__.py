"""Losses of metric learning, exact and by name; the miners that choose for them; a memory of earlier batches."""

from vitembed.training.losses.memory import CrossBatchMemory
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss, build_loss, build_miner

__all__ = ["ContrastiveLoss", "CrossBatchMemory", "TripletLoss", "build_loss", "build_miner"]
