"""Training an embedder: labelled images, batches, losses, augmentation, the loop."""

from vitembed.training.augment import Augment
from vitembed.training.classification import CrossEntropyLoss
from vitembed.training.config import TrainConfig
from vitembed.training.datasets import ImageDataset
from vitembed.training.loop import TrainResult, train
from vitembed.training.losses import ContrastiveLoss, TripletLoss, build_loss, build_miner
from vitembed.training.sampling import ClassBalancedSampler

__all__ = [
    "Augment",
    "ClassBalancedSampler",
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "ImageDataset",
    "TrainConfig",
    "TrainResult",
    "TripletLoss",
    "build_loss",
    "build_miner",
    "train",
]
