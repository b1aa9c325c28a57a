"""Training an embedder: labelled images, batches, losses, augmentation, the loop."""

from vitembed.training.augment import Augment
from vitembed.training.datasets import ImageDataset
from vitembed.training.loop import TrainConfig, TrainResult, train
from vitembed.training.losses import ContrastiveLoss, TripletLoss, build_loss, build_miner
from vitembed.training.sampling import ClassBalancedSampler

__all__ = [
    "Augment",
    "ClassBalancedSampler",
    "ContrastiveLoss",
    "ImageDataset",
    "TrainConfig",
    "TrainResult",
    "TripletLoss",
    "build_loss",
    "build_miner",
    "train",
]
