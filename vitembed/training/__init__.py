"""Training an embedder: labelled images, batches, losses, augmentation, the loop."""

from vitembed.training.classification import CrossEntropyLoss
from vitembed.training.config import FineTune, Safeguards, TrainConfig
from vitembed.training.data.augment import Augment
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.sampling import ClassBalancedSampler
from vitembed.training.data.sources import load_source
from vitembed.training.hard_negatives import HardNegatives
from vitembed.training.health.collapse import CollapseDoctor
from vitembed.training.loop import TrainResult, train
from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.losses.memory import CrossBatchMemory
from vitembed.training.losses.metric import ContrastiveLoss, TripletLoss, build_loss, build_miner
from vitembed.training.rate_finder import find_learning_rate

__all__ = [
    "Augment",
    "ClassBalancedSampler",
    "CollapseDoctor",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "CrossEntropyLoss",
    "DistillationLoss",
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
