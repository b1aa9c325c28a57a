"""Distillation: a network learns from others, its teachers, which images are alike.

Labels say of two classes that they differ, and never by how much; where two characters are drawn alike by half of the
writers, a loss of labels pulls them apart all the same. Teachers know better, and several of them, trained from
different seeds, err in different places: their mean is a better teacher than any of them.
"""

import copy
import dataclasses
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

    For each image the cosines to the others of the batch, divided by a temperature, make a distribution by softmax. The
    loss is the Kullback-Leibler divergence of the network's distribution from the teachers', in the mean over the
    images. Teachers' cosines are averaged. Cosines are compared and not vectors, so that all may have embeddings of
    their own width. (Passalis and Tefas 2018, arXiv:1803.10837, have this divergence with another kernel; Fang et
    al. 2021, arXiv:2101.04731, softmax with a temperature, over a queue of embeddings.)

    The labels are not looked at. `train` makes batches by them all the same, and what the teachers make of an image is
    asked of the very pixels that the network sees, after augmentation.

    Args:
        teachers: who teaches, one at least; copied, so that a model can be trained that is its own teacher.
        temperature: above 0; the lower, the more the nearest neighbours alone count.

    Attributes:
        fingerprints: of the teachers.
        trained_classes: the names of the classes that the teachers know from their trainings.
        held_out_classes: the names of those that they never saw, but all held out.

    Raises:
        ConfigError: there is no teacher, or the temperature is not a finite number above 0.
    """

    needs_pairs = False  # nor labels at all

    def __init__(self, teachers: Sequence["Embedder"], *, temperature: float = 0.07) -> None:
        super().__init__()
        if not teachers:
            raise ConfigError("distillation needs one teacher at least")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ConfigError(f"temperature must be a finite number above 0; got {temperature!r}")
        self.temperature = float(temperature)
        self.fingerprints = [teacher.fingerprint for teacher in teachers]
        self.trained_classes = sorted({name for one in teachers for name in one.provenance.get("trained classes", ())})
        held_out = [set(one.provenance.get("held-out classes", ())) for one in teachers]
        self.held_out_classes = sorted(set.union(*held_out) - set(self.trained_classes))
        # A tuple is no submodule: teachers are neither trained nor saved with the loss.
        self._networks = tuple(copy.deepcopy(one.network).eval().requires_grad_(False) for one in teachers)
        self._pre_processing = [one.preprocess for one in teachers]

    def check_student(self, model: "Embedder") -> None:
        """Check that the teachers can look at a model's pixels; they may be of another size.

        Raises:
            ConfigError: if a teacher has been trained on images that were prepared otherwise.
        """
        own = dataclasses.asdict(model.preprocess)
        for fingerprint, preprocess in zip(self.fingerprints, self._pre_processing, strict=True):
            for name, theirs in dataclasses.asdict(preprocess).items():
                if name not in ("size", "mean", "std") and theirs != own[name]:
                    raise ConfigError(
                        f"teacher {fingerprint[:15]} knows images with {name} {theirs!r} in the pre-processing, and "
                        f"the model is given {own[name]!r}: create the model with its teachers' pre-processing"
                    )

    @torch.no_grad()
    def teach(self, pixels: Tensor) -> Tensor:
        """Return (B, sum of the teachers' widths) rows of length 1, whose inner products are the mean cosines.

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
        """Return the loss, a scalar, in float32 at least.

        Args:
            embeddings: (B, D), of any length; two images at least.
            labels: (B,), not looked at.
            tuples: None: there is nothing to choose for a miner.
            taught: (B, any width), what `teach` gave for the images.

        Raises:
            VectorError: there are fewer than two images, or not as many rows of the teachers' as embeddings.
            ConfigError: a miner has chosen tuples, or the teachers were not asked.
        """
        if tuples is not None:
            raise ConfigError("distillation compares all images of a batch: leave the miner out")
        if taught is None:
            raise ConfigError("distillation needs what the teachers say of the images; `train` asks them")
        if len(embeddings) < 2 or len(taught) != len(embeddings):
            raise VectorError(
                f"distillation needs two images at least and a row of the teachers' for each; got {len(embeddings)} "
                f"and {len(taught)}"
            )
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
        raise ConfigError(f"teachers are for the loss {DISTILLATION}; got {spec!r}: leave the teachers or the loss out")
    return construct(DistillationLoss, {**arguments, **settings}, {"teachers": teachers})


def _without_diagonal(square: Tensor) -> Tensor:
    """Return (B, B - 1), the rows of a (B, B) matrix without the entries on its diagonal."""
    count = len(square)
    return square.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
