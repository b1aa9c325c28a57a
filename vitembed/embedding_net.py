"""The tensor side of an embedder: uint8 pixels in, unit rows out. `vitembed.training` trains it.

`vitembed.embedder` is the user's side: paths and pictures in, numpy out.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitembed.errors import ConfigError, MissingExtraError, VectorError, unknown_name
from vitembed.vit import ViT

Pooling = Literal["cls", "mean"]
POOLINGS = ("cls", "mean")


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and each of its parts back into the mode that it had.

    Parts may have modes of their own, as a frozen batch norm has.
    """
    training = [part for part in network.modules() if part.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Run what `torch.compile` made, and say in one line why it cannot be made here.

    Raises:
        ConfigError: if the function that is called cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().split("\n\n")[0].split())  # the rest is advice on torch's own logs
        raise ConfigError(
            f"torch.compile cannot translate the network here ({reason}); on a processor it needs a C++ compiler "
            "such as g++: install one, or do without compile"
        ) from error


class ForeignBackbone(nn.Module):
    """Any module that turns images into features, in the place of our `ViT`: one of timm, a ResNet, your own.

    Args:
        module: maps (B, C, H, W) normalised floats to (B, W), or to (B, W, h, w), which is averaged over h and w.
        image_size: (height, width) of the images.
        channels: of the images.
        timm: the name under which timm builds the module, so that a saved embedder can be loaded without it.

    Raises:
        ConfigError: if the module does not take such images or gives something else.
    """

    def __init__(
        self, module: nn.Module, *, image_size: tuple[int, int], channels: int = 3, timm: str | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.image_size = image_size
        self.channels = channels
        self.timm = timm
        self.width = self._probe()

    @classmethod
    def of_timm(cls, name: str, *, image_size: tuple[int, int], channels: int = 3) -> "ForeignBackbone":
        """Build one of timm's models with random weights and without its classifier.

        Raises:
            MissingExtraError: without timm.
            ConfigError: if timm knows no such model, or the model takes no such images.
        """
        try:
            import timm
        except ImportError as error:
            raise MissingExtraError(f"the backbone timm:{name}", extra="timm") from error
        if not timm.is_model(name):
            nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; timm.list_models() lists them"
            raise ConfigError(f"timm has no model {name!r}{hint}")
        settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
        try:
            try:
                module = timm.create_model(name, img_size=image_size, **settings)
            except TypeError:  # most convolutional networks take any size, and no such argument
                module = timm.create_model(name, **settings)
        except Exception as error:  # timm lets through whatever a network of its makes of the size
            raise ConfigError(
                f"timm cannot build {name!r} for images of {channels} x {image_size[0]} x {image_size[1]}: {error}"
            ) from error
        return cls(module, image_size=image_size, channels=channels, timm=name)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, W) features of (B, C, H, W) normalised images.

        Raises:
            VectorError: if the module gives something else.
        """
        features = self.module(images)
        if not isinstance(features, Tensor) or features.ndim not in (2, 4):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise VectorError(
                f"a backbone must give features of shape (B, W) or (B, W, h, w); {type(self.module).__name__} gave "
                f"{shape}"
            )
        return features if features.ndim == 2 else features.mean(dim=(2, 3))

    def _probe(self) -> int:
        """Return the width of the features of a black image; no running statistics change."""
        first = next(self.module.parameters(), torch.empty(0))
        self.training = self.module.training
        try:
            with evaluating(self), torch.no_grad():
                features = self(torch.zeros(1, self.channels, *self.image_size, device=first.device))
        except VectorError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # a stranger's code may stumble over a size with anything
            raise ConfigError(
                f"the backbone {type(self.module).__name__} does not take images of {self.channels} x "
                f"{self.image_size[0]} x {self.image_size[1]}: {error}"
            ) from error
        return int(features.shape[1])

    def describe(self) -> dict[str, Any]:
        """Return what is saved of it, as JSON types."""
        kind = type(self.module)
        return {
            "timm": self.timm,
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "image_size": list(self.image_size),
            "channels": self.channels,
            "width": self.width,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], module: nn.Module | None) -> "ForeignBackbone":
        """Rebuild what `describe` described, for weights to be loaded into.

        Args:
            description: what was saved.
            module: a module of the same class, which becomes part of the result; None lets timm build one.

        Raises:
            ConfigError: if there is no module and timm does not know it either.
        """
        size, channels = tuple(description["image_size"]), description["channels"]
        if module is not None:
            return cls(module, image_size=size, channels=channels, timm=description["timm"])
        if description["timm"] is None:
            raise ConfigError(
                f"the backbone of this model is a {description['class']}, which only you can build; "
                "pass it: Embedder.from_pretrained(folder, module=...)"
            )
        return cls.of_timm(description["timm"], image_size=size, channels=channels)


class EmbeddingNet(nn.Module):
    """Pixels to unit rows: normalisation, backbone, pooling, an optional projection, division by the length.

    Args:
        backbone: a `ViT`, or a `ForeignBackbone`.
        mean: the pixel mean of each channel, for values in [0, 1].
        std: the pixel standard deviation of each channel.
        pooling: "cls" for the CLS token, "mean" for the mean of the patch tokens; a foreign backbone pools by itself,
            and has "cls".
        dim: width of a linear projection after pooling; None for none.

    Raises:
        ConfigError: if pooling or dim is not one of those.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: ViT | ForeignBackbone,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: Pooling = "cls",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown_name("pooling", pooling, POOLINGS)
        if pooling != "cls" and not isinstance(backbone, ViT):
            raise ConfigError(f"pooling {pooling!r} is for a ViT of vitembed; a backbone of others pools by itself")
        if dim is not None and dim < 1:
            raise ConfigError(f"dim must be at least 1; got {dim}")
        self.backbone = backbone
        self.pooling = pooling
        self.projection = nn.Linear(self.width, dim, bias=False) if dim else None
        # Buffers follow the network to its device; they belong to the pre-processing and are saved with that.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def vit(self) -> ViT:
        """The backbone, where it is our ViT.

        Raises:
            ConfigError: if another module stands in.
        """
        if isinstance(self.backbone, ViT):
            return self.backbone
        raise ConfigError(
            f"this needs a ViT of vitembed, with its tokens and attentions; the backbone of this model is a "
            f"{type(self.backbone.module).__name__}"
        )

    @property
    def width(self) -> int:
        """Width of the backbone's features."""
        return self.backbone.config.width if isinstance(self.backbone, ViT) else self.backbone.width

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pixels."""
        backbone = self.backbone.config if isinstance(self.backbone, ViT) else self.backbone
        return (backbone.channels, *backbone.image_size)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.projection.out_features if self.projection else self.width

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return what the ViT takes: pixels of mean 0 and deviation 1 on the images that mean and std were taken of."""
        return (pixels.float() - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, dim) float32 rows of length 1 for (B, C, H, W) pixels in [0, 255], of any dtype."""
        if isinstance(self.backbone, ViT):
            return self.forward_with_logits(pixels)[0]
        return self._embed(self.backbone(self.normalise(pixels)))

    def forward_with_logits(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `forward` gives and the (B, classes) logits of the ViT's head; None where it has none.

        Raises:
            ConfigError: if the backbone is not our ViT.
        """
        out = self.vit(self.normalise(pixels), patches=self.pooling == "mean")
        pooled = out.cls if self.pooling == "cls" else out.patches.mean(dim=1)  # (B, N, W) -> (B, W)
        return self._embed(pooled), out.logits

    def _embed(self, pooled: Tensor) -> Tensor:
        if self.projection is not None:
            pooled = self.projection(pooled)
        return F.normalize(pooled.float(), dim=-1)
