"""The pixels of a training and the batches that they come in, this process's share of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from vitembed.embedder import Embedder
from vitembed.training.arrangement import Arrangement
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import PixelDataset
from vitembed.training.data.sampling import Batches, ClassBalancedSampler, EpochBatches, Ints
from vitembed.training.distributed import gather_objects, rank, world_size


@dataclass(frozen=True)
class TrainingData:
    """The images of a training.

    Attributes:
        pixels: of the images to train on.
        validation: of those that are held out; None if none are.
        sampler: which positions of `pixels` meet in each step.
        batches: this process's share of them, from any place of an epoch on.
        classes: what the network learns to name, in the order of the logits; empty for a loss of embeddings.
        workers: processes that decode images.
    """

    pixels: PixelDataset
    validation: PixelDataset | None
    sampler: Batches
    batches: EpochBatches
    classes: tuple[str, ...]
    workers: int

    @classmethod
    def of(cls, model: Embedder, arranged: Arrangement) -> "TrainingData":
        """Read the pixels that fit into memory, and set aside what cannot be read.

        Args:
            model: whose pre-processing is applied.
            arranged: what is trained on.

        Raises:
            ImageError: if too many images cannot be read.
        """
        config = arranged.config

        def read(dataset: ImageDataset) -> PixelDataset:
            """Return the pixels of one side of the split."""
            allowed = config.safeguards.max_unreadable
            return PixelDataset(dataset, model.preprocess, workers=config.decoders, max_unreadable=allowed)

        return cls(
            read(arranged.train_set),
            read(arranged.held_out) if arranged.held_out else None,
            arranged.sampler,
            EpochBatches(arranged.sampler, rank=rank(), world_size=world_size()),
            tuple(arranged.classes),
            config.decoders,
        )

    @property
    def unreadable(self) -> dict[str, str]:
        """The images that could not be read so far, and why."""
        return {**self.pixels.unreadable, **(self.validation.unreadable if self.validation else {})}

    def unreadable_parts(self) -> dict[str, dict[str, str]]:
        """Return what all processes could not read so far, by the side of the split."""
        own = {"training": self.pixels.unreadable, "validation": self.validation.unreadable if self.validation else {}}
        every = gather_objects(own)
        return {side: {path: why for part in every for path, why in part[side].items()} for side in own}

    def note_unreadable(self, parts: Mapping[str, Mapping[str, str]]) -> None:
        """Take over what other processes, or this training before it was interrupted, could not read."""
        self.pixels.unreadable.update(parts["training"])
        if self.validation:
            self.validation.unreadable.update(parts["validation"])

    @property
    def neighbours(self) -> Ints | None:
        """The hard neighbours that batches are made of, (N, m) positions; None for none."""
        return self.sampler.neighbours if isinstance(self.sampler, ClassBalancedSampler) else None

    def use_neighbours(self, neighbours: Ints | None) -> None:
        """Make the batches to come of hard neighbours; None for batches at random."""
        if isinstance(self.sampler, ClassBalancedSampler):
            self.sampler.neighbours = neighbours
