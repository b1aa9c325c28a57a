"""Pictures that a tiny network learns to tell apart in seconds."""

import numpy as np

from vitembed.training import ImageDataset


def stripes(classes: int = 8, per_class: int = 8, *, noise: float = 25, seed: int = 0) -> ImageDataset:
    """Return noisy stripes, a direction a class "way 0", "way 1", ...: easy, but not for untrained weights."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    y, x = np.mgrid[:8, :8]
    images = []
    for label in labels:
        angle = np.pi * label / classes
        wave = np.sin(1.6 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
        images.append(np.clip(127 + 80 * wave + rng.normal(0, noise, (8, 8)), 0, 255).astype(np.uint8))
    return ImageDataset.from_arrays(images, [f"way {label}" for label in labels])
