"""Distillation: a network learns from others, its teachers, which images are alike.

Labels say of two classes that they differ, and never by how much; where two characters are drawn alike by half of the
writers, a loss of labels pulls them apart all the same. What teachers have learned is softer. Several of them, trained
from different seeds, err in different places, so that the mean of their cosines can know more than any of them.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitembed.errors import ConfigError, VectorError
from vitembed.training.losses.specs import construct, parse_call

if TYPE_CHECKING:
    from vitembed.embedder import Embedder

DISTILLATION = "distillation"  # by which a line of text names the loss


class DistillationLoss(nn.Module):
    """How far the neighbours that a network finds in a batch are from those that its teachers find.

    For each image the cosines to the others of the batch, divided by a temperature, make a distribution by softmax: p
    of the teachers, whose cosines are averaged, and q of the network. The loss is the Kullback-Leibler divergence
    sum p log(p / q), in the mean over the images. Cosines are compared and not vectors, so that all may have embeddings
    of their own width. (Passalis and Tefas 2018, arXiv:1803.10837, have this divergence with another kernel; Fang et
    al. 2021, arXiv:2101.04731, softmax with a temperature, over a queue of embeddings.)

    The labels are not looked at. `train` makes batches by them all the same, and what the teachers make of an image is
    asked of the very pixels that the network sees, after augmentation.

    Args:
        teachers: who teaches, one at least; copied, so that a model can be trained that is its own teacher.
        temperature: at least 0.001; the lower, the more the nearest neighbours alone count. No other than the default
            was tried on Omniglot.

    Attributes:
        fingerprints: of the teachers.
        trained_classes: the names of the classes that some teacher was trained on, as far as that is recorded: a
            checkpoint of others does not tell.
        held_out_classes: the names of those that some teacher held out, and none was trained on.

    Raises:
        ConfigError: there is no teacher, a teacher is no sound embedder, or the temperature is out of range.
    """

    needs_pairs = False  # nor labels at all

    def __init__(self, teachers: Sequence["Embedder"], *, temperature: float = 0.07) -> None:
        super().__init__()
        _check_teachers(teachers)
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, int | float)
            or not 1e-3 <= temperature < math.inf
        ):
            raise ConfigError(f"temperature must be a finite number of at least 0.001; got {temperature!r}")
        self.temperature = float(temperature)
        self.fingerprints = [teacher.fingerprint for teacher in teachers]
        self.trained_classes = sorted({name for one in teachers for name in one.provenance.get("trained classes", ())})
        held_out = [set(one.provenance.get("held-out classes", ())) for one in teachers]
        self.held_out_classes = sorted(set.union(*held_out) - set(self.trained_classes))
        # A tuple is no submodule: teachers are neither trained nor saved with the loss.
        self._networks = tuple(copy.deepcopy(one.network).eval().requires_grad_(False) for one in teachers)
        self._pre_processing = [one.preprocess for one in teachers]

    @property
    def teachers_bytes(self) -> int:
        """What the weights of the teachers take in memory."""
        tensors = [tensor for network in self._networks for tensor in (*network.parameters(), *network.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check_student(self, model: "Embedder") -> None:
        """Check that the teachers can look at a model's pixels; they may be of another size in the same proportions.

        Raises:
            ConfigError: if a teacher has been trained on images of another kind.
        """
        own, count = model.preprocess, len(self.fingerprints)
        for number, preprocess in enumerate(self._pre_processing, start=1):
            for name in ("mode", "scan", "binarize", "invert"):
                theirs, given = getattr(preprocess, name), getattr(own, name)
                if theirs != given:
                    raise ConfigError(
                        f"teacher {number} of {count} knows images with {name} {theirs!r} in the pre-processing, and "
                        f"the model is given {given!r}: create the model with its teachers' pre-processing"
                    )
            (height, width), (rows, columns) = preprocess.size, own.size
            if height * columns != width * rows and own.resize != "squash":
                raise ConfigError(
                    f"teacher {number} of {count} knows images of {height} x {width} pixels, and those of the model, "
                    f"{rows} x {columns}, are of other proportions: give the model a size of the same"
                )

    @torch.no_grad()
    def teach(self, pixels: Tensor) -> Tensor:
        """Return (B, sum of the teachers' widths) rows of length 1, whose inner products are the mean cosines.

        Teachers compute in evaluation mode, without gradients, and in the precision of an autocast around the call.

        Args:
            pixels: (B, C, H, W) in [0, 255], as the pre-processing gives them; resampled for teachers of another size.
        """
        rows = []
        for network in self._networks:
            size = network.input_shape[1:]
            seen = pixels
            if tuple(pixels.shape[-2:]) != tuple(size):
                seen = functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
            rows.append(network.to(pixels.device)(seen))
        return torch.cat(rows, dim=1) / math.sqrt(len(rows))

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: object = None, *, taught: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar, in float32 at least; 0 of a single image, which has no neighbours.

        Args:
            embeddings: (B, D), of any length.
            labels: (B,), not looked at.
            tuples: None: there is nothing to choose for a miner.
            taught: (B, any width), what `teach` gave for the images.

        Raises:
            VectorError: there are not as many rows of the teachers' as embeddings.
            ConfigError: a miner has chosen tuples, or the teachers were not asked.
        """
        if tuples is not None:
            raise ConfigError("distillation compares all images of a batch: leave the miner out")
        if taught is None:
            raise ConfigError("distillation needs what the teachers say of the images; `train` asks them")
        if len(taught) != len(embeddings):
            raise VectorError(f"{len(embeddings)} images need as many rows of their teachers; got {len(taught)}")
        if len(embeddings) < 2:
            return embeddings.sum() * 0.0
        with torch.autocast(embeddings.device.type, enabled=False):
            own, theirs = (self._log_shares(rows) for rows in (embeddings, taught.to(embeddings.device)))
            return functional.kl_div(own, theirs.to(own), reduction="batchmean", log_target=True)

    def _log_shares(self, rows: Tensor) -> Tensor:
        """Return (B, B - 1) logarithms of the shares that the other images have as neighbours of each."""
        rows = functional.normalize(rows if rows.dtype == torch.float64 else rows.float())
        cosines = _without_diagonal(rows @ rows.T)
        return functional.log_softmax(cosines / self.temperature, dim=1)

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)` and for what a model records of its training."""
        return f"teachers=[{', '.join(self.fingerprints)}], temperature={self.temperature}"


def build_distillation(spec: str, teachers: Sequence["Embedder"], **settings: object) -> DistillationLoss:
    """Return the loss that a line of text names, which is `distillation` or `distillation(temperature=0.1)`.

    Args:
        spec: the line.
        teachers: who teaches.
        settings: more arguments, which win over those in `spec`.

    Raises:
        ConfigError: it names another loss, which has no use of teachers, or an argument is unknown or makes no sense.
    """
    name, arguments = parse_call(spec, "loss")
    if name != DISTILLATION:
        raise ConfigError(
            f"teachers are for the loss {DISTILLATION}, not {spec!r}: choose it, or leave the teachers out"
        )
    if "teachers" in arguments:
        raise ConfigError(f"teachers are models, which a line of text cannot hold; got {spec!r}")
    return construct(DistillationLoss, {**arguments, **settings}, {"teachers": teachers})


def _check_teachers(teachers: Sequence["Embedder"]) -> None:
    """Refuse what cannot teach."""
    from vitembed.embedder import Embedder

    if not isinstance(teachers, list | tuple):
        raise ConfigError(f"teachers must be a list of embedders; got {type(teachers).__name__}")
    if not teachers:
        raise ConfigError("distillation needs one teacher at least")
    for number, teacher in enumerate(teachers, start=1):
        if not isinstance(teacher, Embedder):
            raise ConfigError(f"teachers must be embedders; number {number} is a {type(teacher).__name__}")
        if not all(bool(one.isfinite().all()) for one in teacher.network.parameters()):
            raise ConfigError(f"teacher {number} has weights that are NaN or infinite, and nothing to teach")


def _without_diagonal(square: Tensor) -> Tensor:
    """Return (B, B - 1), the rows of a (B, B) matrix without the entries on its diagonal."""
    count = len(square)
    return square.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
