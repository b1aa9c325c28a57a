"""Labelled images: where they come from, how they are split, fetched, changed, and which of them meet in a batch."""

from vitembed.training.data.augment import Augment
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.sampling import ClassBalancedSampler
from vitembed.training.data.sources import load_source

__all__ = ["Augment", "ClassBalancedSampler", "ImageDataset", "load_source"]
