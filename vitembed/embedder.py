"""The embedder: a network and its pre-processing as one sealed thing; images in, unit vectors out.

Two classes. `EmbeddingNet` is the tensor side: uint8 pixels to unit rows, trained by `vitembed.training`. `Embedder` is
the user's side: paths, PIL images and arrays in, a numpy array out, saved and loaded as a folder. What an embedding
depends on (weights, pre-processing, pooling) is saved together and hashed into one fingerprint, so that an index or a
verifier can tell whose embeddings it holds.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitembed import weights
from vitembed.errors import CheckpointError, ConfigError, ImageError, VectorError, unknown_name
from vitembed.files import atomic_write
from vitembed.images import ImageSource, Preprocess
from vitembed.model_card import model_card
from vitembed.vit import ViT, ViTConfig

Pooling = Literal["cls", "mean"]
POOLINGS = ("cls", "mean")
FORMAT = 1  # of the saved folder; a reader refuses a newer one


class EmbeddingNet(nn.Module):
    """Pixels to unit rows: normalisation, ViT, pooling, an optional projection, division by the length.

    Args:
        vit: the backbone.
        mean: the pixel mean of each channel, for values in [0, 1].
        std: the pixel standard deviation of each channel.
        pooling: "cls" for the CLS token, "mean" for the mean of the patch tokens.
        dim: width of a linear projection after pooling; None for none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: ViT,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: Pooling = "cls",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown_name("pooling", pooling, POOLINGS)
        if dim is not None and dim < 1:
            raise ConfigError(f"dim must be at least 1; got {dim}")
        self.vit = vit
        self.pooling = pooling
        self.projection = nn.Linear(vit.config.width, dim, bias=False) if dim else None
        # Buffers follow the network to its device; they belong to the pre-processing and are saved with that.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.projection.out_features if self.projection else self.vit.config.width

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return what the ViT takes: pixels of mean 0 and deviation 1 on the images that mean and std were taken of."""
        return (pixels.float() - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, dim) float32 rows of length 1 for (B, C, H, W) pixels in [0, 255], of any dtype."""
        out = self.vit(self.normalise(pixels), patches=self.pooling == "mean")
        pooled: Tensor = out.cls if self.pooling == "cls" else out.patches.mean(dim=1)  # (B, N, W) -> (B, W)
        if self.projection is not None:
            pooled = self.projection(pooled)
        return F.normalize(pooled.float(), dim=-1)


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
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        vit = network.vit.config
        if (preprocess.channels, *preprocess.size) != (vit.channels, *vit.image_size):
            raise ConfigError(
                f"pre-processing gives {preprocess.channels} channels of {preprocess.size} pixels, "
                f"but the network takes {vit.channels} of {vit.image_size}"
            )
        self.device = _pick_device(device)
        self.network = network.to(self.device).eval()
        self.preprocess = preprocess
        self.provenance = dict(provenance or {})

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
            arch: a size of `ViTConfig.named`, or a whole configuration (then `stem` must be left alone).
            preprocess: decides image size and channels; None for 224 x 224 RGB.
            stem: linear patches, or the hybrid's convolutions, which learn from small data many times faster.
            pooling: "cls" or "mean".
            dim: width of the embedding; None for the width of the ViT.
            seed: of the random weights; the global random state is left as it was.
            device: as for the class.
        """
        preprocess = preprocess or Preprocess()
        if isinstance(arch, str):
            arch = ViTConfig.named(arch, image_size=preprocess.size, channels=preprocess.channels, stem=stem)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = EmbeddingNet(ViT(arch), mean=preprocess.mean, std=preprocess.std, pooling=pooling, dim=dim)
        return cls(network, preprocess, device=device)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.network.dim

    @property
    def fingerprint(self) -> str:
        """Whose embeddings these are: "sha256:..." of weights, architecture, pooling and pre-processing."""
        return weights.fingerprint(self.network.state_dict(), self._description())

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
            workers: processes that read and resize; None decides by the number of paths, 0 uses this process.

        Returns:
            (N, dim) float32, one row of length 1 an image, in the order of the images.

        Raises:
            ImageError: for the first image that cannot be read.
            VectorError: if the network gives NaN or infinity.
        """
        images = _as_sequence(images)
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

        Nothing is read before it is needed, so that the images need not fit into memory. Arguments as for `encode`.

        Raises:
            ConfigError: if `batch_size` is below 1 or `workers` below 0.
            VectorError: if the network gives NaN or infinity.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
        if workers is not None and (not isinstance(workers, int) or workers < 0):
            raise ConfigError(f"workers must be a whole number, not negative; got {workers!r}")
        if workers is None:
            workers = _workers_for(images, batch_size)
        return self._stream(_Decoder(images, self.preprocess), batch_size, workers)

    def embed_pixels(self, pixels: Tensor) -> NDArray[np.float32]:
        """Return (B, dim) unit rows of (B, C, H, W) uint8 pixels that the pre-processing has made.

        Raises:
            VectorError: if the network gives NaN or infinity.
        """
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.inference_mode():
                vectors: NDArray[np.float32] = self.network(pixels.to(self.device, non_blocking=True)).cpu().numpy()
        finally:
            self.network.train(was_training)
        if not np.isfinite(vectors).all():
            raise VectorError("the network gave NaN or infinity: its weights are damaged or its training diverged")
        return vectors

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save as a folder: model.safetensors, config.json and README.md (the model card).

        The weights' file also carries the configuration and is complete by itself; config.json is the readable copy.
        Each file is written wholly or not at all.

        Raises:
            VitembedError: if the folder cannot be written or the disk is full.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create the folder {path}: {error.strerror}") from error
        config = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **self._description(),
            "provenance": self.provenance,
        }
        weights.save_weights(path / "model.safetensors", self.network.state_dict(), config)
        atomic_write(path / "config.json", json.dumps(config, indent=2) + "\n")
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        card = model_card(config, dim=self.dim, parameters=parameters, fingerprint=config["fingerprint"])
        atomic_write(path / "README.md", card)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: str | torch.device | None = None) -> "Embedder":
        """Load what `save_pretrained` saved: its embeddings are equal to the bit on the same device.

        Raises:
            CheckpointError: if the folder is missing, damaged, or made by a newer vitembed.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"there is no model folder {path}; train one with: vitembed train DATA --out {path}")
        file = path / "model.safetensors"
        state, header = weights.load_weights(file)
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} has format {header.get('format')!r}; this vitembed reads {FORMAT}: upgrade it"
            )
        missing = {"vit", "pooling", "dim", "preprocess", "provenance", "fingerprint"} - header.keys()
        if missing:
            raise CheckpointError(f"{file} is damaged: its description lacks {', '.join(sorted(missing))}")
        _check_readable_copy(path / "config.json", header)
        preprocess = Preprocess.from_dict(header["preprocess"])
        network = EmbeddingNet(
            ViT(ViTConfig.from_dict(header["vit"])),
            mean=preprocess.mean,
            std=preprocess.std,
            pooling=header["pooling"],
            dim=header["dim"],
        )
        weights.load_state(network, state, file)
        embedder = cls(network, preprocess, device=device, provenance=header["provenance"])
        if embedder.fingerprint != header["fingerprint"]:
            raise CheckpointError(f"{file} is damaged: its weights do not have the fingerprint recorded with them")
        return embedder

    def _stream(self, decoder: "_Decoder", batch_size: int, workers: int) -> Iterator[EncodedBatch]:
        loader: DataLoader[Any] = DataLoader(
            decoder, batch_size, num_workers=workers, collate_fn=_collate, pin_memory=self.device.type == "cuda"
        )
        done = 0
        for pixels, errors in loader:
            size = len(pixels) + len(errors)
            failures = [(done + offset, error) for offset, error in errors]
            failed = {offset for offset, _ in errors}
            read = np.array([done + offset for offset in range(size) if offset not in failed], dtype=np.int64)
            vectors = self.embed_pixels(pixels) if len(read) else np.empty((0, self.dim), dtype=np.float32)
            yield EncodedBatch(positions=read, vectors=vectors, failures=failures)
            done += size

    def _description(self) -> dict[str, Any]:
        projection = self.network.projection
        return {
            "vit": self.network.vit.config.to_dict(),
            "pooling": self.network.pooling,
            "dim": projection.out_features if projection else None,
            "preprocess": self.preprocess.to_dict(),
        }


class _Decoder(Dataset[NDArray[np.uint8] | ImageError]):
    """Images to pixels, in worker processes; an image that cannot be read becomes its error, as a value.

    An exception would end the worker, and torch would wrap its message in a traceback.
    """

    def __init__(self, images: Sequence[ImageSource], preprocess: Preprocess) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> NDArray[np.uint8] | ImageError:
        try:
            return self.preprocess(self.images[position])
        except ImageError as error:
            return error


def _collate(items: list[NDArray[np.uint8] | ImageError]) -> tuple[Tensor, list[tuple[int, ImageError]]]:
    errors = [(offset, item) for offset, item in enumerate(items) if isinstance(item, ImageError)]
    arrays = [item for item in items if not isinstance(item, ImageError)]
    pixels = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty((0,), dtype=torch.uint8)
    return pixels, errors


def _as_sequence(images: Iterable[ImageSource] | ImageSource) -> Sequence[ImageSource]:
    """Make a sequence of anything: one image, an array (N, H, W, C), an array of paths, a list, a generator."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        is_sequence = images.ndim == 4 or (images.ndim == 1 and images.dtype.kind in "UO")
        return images.tolist() if images.ndim == 1 and is_sequence else list(images) if is_sequence else [images]
    given: object = images
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"expected images: paths, PIL images or arrays; got {type(given).__name__}")
    return images if isinstance(images, Sequence) else list(images)


def _workers_for(images: Sequence[ImageSource], batch_size: int) -> int:
    """Starting processes pays for files of more than two batches; images in memory would only be copied around."""
    if len(images) <= 2 * batch_size or not isinstance(images[0], str | os.PathLike):
        return 0
    return default_workers()


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return how many processes decode images unless told otherwise: one a core, 8 at most."""
    return min(8, available_cores())


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
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_readable_copy(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse a config.json that somebody edited: the change would have no effect, which must not pass unsaid.

    A copy with another fingerprint is that of an earlier model: saving was interrupted between the two files.
    """
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it: the weights' file carries a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); delete it: the weights' file carries a copy")
    if config.get("fingerprint") != header["fingerprint"]:
        return
    for key in ("vit", "pooling", "dim", "preprocess"):
        if config.get(key) != header[key]:
            raise CheckpointError(
                f"{path} and model.safetensors describe different models ({key!r} differs); "
                "delete config.json to load the model as it was saved"
            )
