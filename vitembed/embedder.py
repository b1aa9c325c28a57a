"""The embedder: a network and its pre-processing as one sealed thing; images in, unit vectors out.

`Embedder` is the user's side: paths, PIL images and arrays in, a numpy array out, saved and loaded as a folder. What an
embedding depends on (weights, pre-processing, pooling) is saved together and hashed into one fingerprint, so that an
index or a verifier can tell whose embeddings it holds. The tensor side is `vitembed.embedding_net`.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from vitembed import saved_model, weights
from vitembed.decoding import PixelBatch, as_sequence, pixel_batches
from vitembed.embedding_net import EmbeddingNet, ForeignBackbone, Pooling, compiling, evaluating
from vitembed.errors import CheckpointError, ConfigError, ImageError, VectorError, unknown_name
from vitembed.images import ImageSource
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT, ViTConfig

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FOREIGN = "timm:"  # what names a backbone of timm in the place of a size of ours


@dataclass(frozen=True)
class EncodedBatch:
    """One step of `Embedder.stream`.

    Attributes:
        positions: (b,) int64, where the encoded images stand in the input.
        vectors: (b, dim) float32, rows of length 1.
        failures: position and error of the images that could not be read.
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]
    failures: list[tuple[int, ImageError]]


class Embedder:
    """A network with its pre-processing, on a device.

    Args:
        network: the tensor side.
        preprocess: from images to pixels; its channels and size must be the network's.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the first accelerator there is.
        precision: of the arithmetic at inference: "fp32", or "bf16" or "fp16" (on a GPU about twice as fast and more,
            embeddings off by about 1e-2). A setting of this run: neither saved nor part of the fingerprint.
        compile: let `torch.compile` build the forward pass: slow at first, then faster, most of all on a GPU. Likewise
            not saved; embeddings change by rounding.
        provenance: JSON types that say where the weights come from (data, settings, figures); saved along.

    Raises:
        ConfigError: if pre-processing and network do not fit.
    """

    def __init__(
        self,
        network: EmbeddingNet,
        preprocess: Preprocess,
        *,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        compile: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        given, wanted = (preprocess.channels, *preprocess.size), network.input_shape
        if given != wanted:
            raise ConfigError(
                f"pre-processing gives {given[0]} channels of {given[1:]} pixels, "
                f"but the network takes {wanted[0]} of {wanted[1:]}"
            )
        if precision not in _DTYPES:
            raise unknown_name("precision", precision, _DTYPES)
        self.device = _pick_device(device)
        self.network = network.to(self.device).eval()
        self.preprocess = preprocess
        self.precision = precision
        self.provenance = dict(provenance or {})
        self._compiled = compile
        self._forward: Any = torch.compile(self.network) if compile else self.network

    @classmethod
    def create(
        cls,
        arch: str | ViTConfig = "S/16",
        *,
        preprocess: Preprocess | None = None,
        stem: Literal["linear", "conv"] = "linear",
        pooling: Pooling = "cls",
        dim: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> "Embedder":
        """Return an untrained embedder, the same for the same seed.

        Args:
            arch: a size of `ViTConfig.named`, a whole configuration, or "timm:NAME", one of timm's networks with
                random weights; with the latter two, `stem` must be left alone.
            preprocess: decides image size and channels; None for 224 x 224 RGB.
            stem: linear patches, or the hybrid's convolutions, which learn from small data many times faster.
            pooling: "cls" or "mean".
            dim: width of the embedding; None for the width of the ViT.
            seed: of the random weights; the global random state is left as it was.
            device: as for the class.

        Raises:
            ConfigError: if a setting is unknown, or the network does not take what the pre-processing gives.
            MissingExtraError: for "timm:NAME" without timm.
        """
        preprocess = preprocess or Preprocess()
        if stem != "linear" and (isinstance(arch, ViTConfig) or arch.startswith(_FOREIGN)):
            raise ConfigError(f"stem={stem!r} is for a named size such as 'S/16'; a configuration has its own stem")
        size, channels = preprocess.size, preprocess.channels
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices, too
            backbone: ViT | ForeignBackbone
            if isinstance(arch, str) and arch.startswith(_FOREIGN):
                name = arch.removeprefix(_FOREIGN)
                backbone = ForeignBackbone.of_timm(name, image_size=size, channels=channels)
            else:
                if isinstance(arch, str):
                    arch = ViTConfig.named(arch, image_size=size, channels=channels, stem=stem)
                backbone = ViT(arch)
            network = EmbeddingNet(backbone, mean=preprocess.mean, std=preprocess.std, pooling=pooling, dim=dim)
        return cls(network, preprocess, device=device)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.network.dim

    @property
    def fingerprint(self) -> str:
        """Whose embeddings these are: "sha256:..." of weights, architecture, pooling and pre-processing."""
        return saved_model.fingerprint(self.network, self.preprocess)

    def encode(
        self,
        images: Iterable[ImageSource] | ImageSource,
        *,
        batch_size: int = 64,
        progress: bool = False,
        workers: int | None = None,
    ) -> NDArray[np.float32]:
        """Embed images.

        Args:
            images: paths, PIL images or arrays (see `vitembed.images.load_image`), mixed as you like; or one of them.
            batch_size: images in one pass of the network; changes speed and memory, the result only by rounding (1e-6).
            progress: show a progress bar on standard error.
            workers: threads that read and resize; None takes one a core for paths and none for what is in memory.

        Returns:
            (N, dim) float32, one row of length 1 an image, in the order of the images.

        Raises:
            ImageError: for the first image that cannot be read.
            VectorError: if the network gives NaN or infinity.
        """
        images = as_sequence(images)
        vectors = np.empty((len(images), self.dim), dtype=np.float32)
        with tqdm(total=len(images), unit="image", disable=not progress) as bar:
            for batch in self.stream(images, batch_size=batch_size, workers=workers):
                for _, error in batch.failures:
                    raise error
                vectors[batch.positions] = batch.vectors
                bar.update(len(batch.positions))
        return vectors

    def stream(
        self, images: Sequence[ImageSource], *, batch_size: int = 64, workers: int | None = None
    ) -> Iterator[EncodedBatch]:
        """Embed images batch by batch, in order; images that cannot be read are handed back beside the others.

        No more than two batches are read ahead, so that the images need not fit into memory. Arguments as for `encode`.

        Raises:
            ConfigError: if `batch_size` is below 1 or `workers` below 0.
            VectorError: if the network gives NaN or infinity.
        """
        return self._stream(self._batches(images, batch_size, workers))

    def embed_pixels(self, pixels: Tensor) -> NDArray[np.float32]:
        """Return (B, dim) unit rows of (B, C, H, W) uint8 pixels that the pre-processing has made.

        Raises:
            VectorError: if the network gives NaN or infinity.
        """
        with self._inference(), compiling() if self._compiled else contextlib.nullcontext():
            vectors: Tensor = self._forward(pixels.to(self.device, non_blocking=True))
        return _finite(vectors)

    def embed_and_classify(self, pixels: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (B, dim) unit rows and (B, classes) logits of (B, C, H, W) uint8 pixels.

        Raises:
            ConfigError: if the network has no classification head.
            VectorError: if the network gives NaN or infinity.
        """
        with self._inference():
            vectors, logits = self.network.forward_with_logits(pixels.to(self.device, non_blocking=True))
        if logits is None:
            raise ConfigError(
                "this model has no classification head; train one with: vitembed train --loss cross-entropy"
            )
        return _finite(vectors), _finite(logits)

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the network's head tells apart; empty where the model's provenance names none."""
        return list(self.provenance.get("classes", ()))

    def classify(
        self, images: Iterable[ImageSource] | ImageSource, *, batch_size: int = 64, workers: int | None = None
    ) -> NDArray[np.float32]:
        """Return the probability of each class, for a model that was trained with `--loss cross-entropy`.

        Args:
            images: as for `encode`.
            batch_size: as for `encode`.
            workers: as for `encode`.

        Returns:
            (N, classes) float32, rows summing to one; the columns are in the order of `classes`.

        Raises:
            ConfigError: if the network has no classification head.
            ImageError: for the first image that cannot be read.
            VectorError: if the network gives NaN or infinity.
        """
        backbone = self.network.backbone
        classes = backbone.config.num_classes if isinstance(backbone, ViT) else 0
        if classes == 0:
            raise ConfigError(
                "this model has no classification head; train one with: vitembed train --loss cross-entropy"
            )
        rows = [np.empty((0, classes), dtype=np.float32)]
        for pixels, errors in self._batches(as_sequence(images), batch_size, workers):
            for _, error in errors:
                raise error
            _, logits = self.embed_and_classify(pixels)
            rows.append(torch.from_numpy(logits).softmax(dim=-1).numpy())
        return np.concatenate(rows)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save as a folder: model.safetensors, config.json and README.md (the model card).

        The weights' file also carries the configuration and is complete by itself; config.json is the readable copy.
        Each file is written wholly or not at all. The tensors have timm's names: timm loads the file, too, unless the
        network has a convolutional stem; the model card says how.

        Raises:
            VitembedError: if the folder cannot be written or the disk is full.
        """
        saved_model.save(Path(folder), self.network, self.preprocess, self.provenance)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        compile: bool = False,
        heads: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        module: nn.Module | None = None,
    ) -> "Embedder":
        """Load a model.

        What `save_pretrained` saved gives embeddings that are equal to the bit on the same device. Everybody else's
        ViT comes with the pre-processing, pooling and projection of its own configuration; a bare file of weights says
        nothing of those, and has the defaults, as `provenance` then tells.

        Args:
            name: "ink", the model of handwritten characters that ships with vitembed; a folder that `save_pretrained`
                wrote, or a hub id of such; or what `vitembed.weights.load_checkpoint` takes: "torchvision:vit_b_16",
                "timm:vit_small_patch16_224.dino", a hub id, a folder of transformers, a file. Where the current folder
                has a model `ink` of its own, "ink" is still the one that ships, with a warning; the other is "./ink".
            device: as for the class.
            precision: as for the class.
            compile: as for the class.
            heads: attention heads of a bare file of weights, which no shape tells; None for heads of width 64.
            image_size: side or (height, width) that the positions of a bare file are for, where they are no square; to
                work at another size, see `replace`.
            module: the foreign backbone of a saved model, where only you can build it.

        Raises:
            CheckpointError: if there is nothing, nothing whole, or no ViT under that name.
            ConfigError: if the model says otherwise than `heads` or `image_size`, has no place for `module`, or
                cannot be built without one.
        """
        folder = weights.saved_model_at(name)
        if folder is not None:
            network, preprocess, provenance = saved_model.load(folder, module=module)
            if heads is not None and heads != network.vit.config.heads:
                raise ConfigError(f"{name} says that it has {network.vit.config.heads} heads; got heads={heads}")
            size = (image_size, image_size) if isinstance(image_size, int) else image_size
            if size is not None and tuple(size) != preprocess.size:
                raise ConfigError(f"{name} is for images of {preprocess.size}; for others, use replace(image_size=...)")
        elif module is not None:
            raise ConfigError(f"a module goes with a model that save_pretrained saved, which {name} is not")
        else:
            network, preprocess, provenance = _from_checkpoint(
                weights.load_checkpoint(name, heads=heads, image_size=image_size)
            )
        return cls(network, preprocess, device=device, precision=precision, compile=compile, provenance=provenance)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        preprocess: Preprocess | None = None,
        *,
        dim: int | None = None,
        timm: str | None = None,
        device: str | torch.device | None = None,
    ) -> "Embedder":
        """Make an embedder of any network that turns images into features.

        Args:
            module: see `ForeignBackbone`.
            preprocess: from images to its input; None for 224 x 224 RGB with ImageNet's mean and deviation.
            dim: width of a linear projection after it; None for none.
            timm: the name under which timm builds the module; without it, a saved model asks for `module` to be loaded.
            device: as for the class.

        Raises:
            ConfigError: if the module does not take what the pre-processing gives, or gives no features.
        """
        preprocess = preprocess or Preprocess()
        backbone = ForeignBackbone(module, image_size=preprocess.size, channels=preprocess.channels, timm=timm)
        return cls(EmbeddingNet(backbone, mean=preprocess.mean, std=preprocess.std, dim=dim), preprocess, device=device)

    def replace(
        self,
        *,
        image_size: int | tuple[int, int] | None = None,
        merge: int | None = None,
        projection: int | Literal[False] | None = None,
        seed: int = 0,
    ) -> "Embedder":
        """Return a model with the same weights that works otherwise; it has a fingerprint of its own.

        Args:
            image_size: side or (height, width) of the images; the position embeddings are resampled.
            merge: tokens that each block merges away (see `ViTConfig.merge`): faster, and no longer exact.
            projection: False takes the projection after pooling off, as a classification head on the CLS token wants; a
                width puts a new, untrained one there.
            seed: of a new projection.

        Raises:
            ConfigError: if the size is no multiple of the patch size, or the backbone is not our ViT.
        """
        if projection is not None and projection is not False and projection < 1:
            raise ConfigError(f"a projection must be at least 1 wide; got {projection}")
        before = self.network
        vit = before.vit.resized(before.vit.config.image_size if image_size is None else image_size)
        if merge is not None:
            vit.config = dataclasses.replace(vit.config, merge=merge)
        preprocess = dataclasses.replace(self.preprocess, size=vit.config.image_size)
        with torch.inference_mode(False):
            settings: dict[str, Any] = {
                "mean": preprocess.mean,
                "std": preprocess.std,
                "pooling": before.pooling,
                "dim": projection or None,
            }
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the processor's alone
                network = EmbeddingNet(vit, **settings)
            if projection is None:
                network.projection = copy.deepcopy(before.projection)
        provenance = dict(self.provenance)
        if projection:  # nobody trained it: the figures are of another model, which is the one to be named
            figures = ("epoch", "validation recall@1", "validation accuracy")
            provenance = {key: value for key, value in provenance.items() if key not in figures}
            provenance["derived from"] = self.fingerprint
        return Embedder(
            network,
            preprocess,
            device=self.device,
            precision=self.precision,
            compile=self._compiled,
            provenance=provenance,
        )

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Run the network without gradients, in evaluation mode and the wanted precision; then leave it as it was."""
        with (
            evaluating(self.network),
            torch.inference_mode(),
            torch.autocast(self.device.type, _DTYPES[self.precision], enabled=self.precision != "fp32"),
        ):
            yield

    def _batches(self, images: Sequence[ImageSource], batch_size: int, workers: int | None) -> Iterable[PixelBatch]:
        return pixel_batches(
            images, self.preprocess, batch_size=batch_size, workers=workers, pin=self.device.type == "cuda"
        )

    def _stream(self, batches: Iterable[PixelBatch]) -> Iterator[EncodedBatch]:
        done = 0
        for pixels, errors in batches:
            size = len(pixels) + len(errors)
            failures = [(done + offset, error) for offset, error in errors]
            failed = {offset for offset, _ in errors}
            read = np.array([done + offset for offset in range(size) if offset not in failed], dtype=np.int64)
            vectors = self.embed_pixels(pixels) if len(read) else np.empty((0, self.dim), dtype=np.float32)
            yield EncodedBatch(positions=read, vectors=vectors, failures=failures)
            done += size


def _from_checkpoint(checkpoint: "weights.Checkpoint") -> tuple[EmbeddingNet, Preprocess, dict[str, Any]]:
    """Build the network of a checkpoint, with its pre-processing and what it says of itself."""
    vit = ViT.empty(checkpoint.config)
    weights.load_state(vit, checkpoint.state, checkpoint.source)
    preprocess = checkpoint.preprocess
    if preprocess is None:
        raise CheckpointError(
            f"{checkpoint.source} takes images of {vit.config.channels} channels and says nothing of its "
            "pre-processing; load it with ViT.from_pretrained and make an Embedder of it with your own Preprocess"
        )
    if preprocess.size != vit.config.image_size:  # positions of DINOv2 are for 518 pixels, its pictures have 224
        vit = vit.resized(preprocess.size)
    projection = checkpoint.projection
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        network = EmbeddingNet(
            vit,
            mean=preprocess.mean,
            std=preprocess.std,
            pooling=checkpoint.pooling,
            dim=None if projection is None else len(projection),
        )
    if projection is not None and network.projection is not None:
        weights.load_state(network.projection, {"weight": projection}, checkpoint.source)
    return network, preprocess, dict(checkpoint.provenance)


def _finite(rows: Tensor) -> NDArray[np.float32]:
    """Return rows of any device and precision as numpy, checked."""
    array: NDArray[np.float32] = rows.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise VectorError("the network gave NaN or infinity: its weights are damaged or its training diverged")
    return array


def _pick_device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        try:
            picked = torch.device(device)
            if picked.type == "meta":
                raise RuntimeError("it holds no numbers")
            torch.empty(0, device=picked)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}; try 'cpu'") from error
        return picked
    if torch.cuda.is_available():
        # Launchers of several processes on one machine number them: each takes a GPU of its own.
        number = os.environ.get("LOCAL_RANK", "")
        return torch.device("cuda", int(number)) if number.isdigit() else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
