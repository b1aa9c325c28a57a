"""Training an embedder: labelled images, batches, losses, augmentation, the loop."""

from vitembed.training.augment import Augment
from vitembed.training.classification import CrossEntropyLoss
from vitembed.training.collapse import CollapseDoctor
from vitembed.training.config import FineTune, Safeguards, TrainConfig
from vitembed.training.datasets import ImageDataset
from vitembed.training.hard_negatives import HardNegatives
from vitembed.training.loop import TrainResult, train
from vitembed.training.losses import ContrastiveLoss, TripletLoss, build_loss, build_miner
from vitembed.training.memory import CrossBatchMemory
from vitembed.training.rate_finder import find_learning_rate
from vitembed.training.sampling import ClassBalancedSampler
from vitembed.training.sources import load_source

__all__ = [
    "Augment",
    "ClassBalancedSampler",
    "CollapseDoctor",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "CrossEntropyLoss",
    "FineTune",
    "HardNegatives",
    "ImageDataset",
    "Safeguards",
    "TrainConfig",
    "TrainResult",
    "TripletLoss",
    "build_loss",
    "build_miner",
    "find_learning_rate",
    "load_source",
    "train",
]
