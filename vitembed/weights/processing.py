"""Pre-processing as other libraries write it down becomes a `Preprocess`.

Wrong pre-processing is the commonest silent fault of feature extraction: what cannot be taken over exactly is said in
a note, which stays with the model.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from vitembed.errors import CheckpointError, ConfigError, VitembedError
from vitembed.preprocess import Preprocess

Size = tuple[int, int]

# The numbers of PIL.Image.Resampling, by which transformers names them.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What the image processors of transformers do where their file does not say it; by their names without suffixes.
_VIT = {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": _HALF, "image_std": _HALF}
_CLIP = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_DEIT = {**_VIT, "size": {"height": 256, "width": 256}, "resample": 3, "do_center_crop": True, "crop_size": 224}
_PROCESSORS = {"ViT": _VIT, "DeiT": _DEIT, "CLIP": _CLIP, "Bit": _CLIP}
_SUFFIXES = ("Fast", "Pil", "FeatureExtractor", "ImageProcessor")


@contextlib.contextmanager
def refusing_nonsense(source: str) -> Iterator[None]:
    """Turn what Python says of a value of another kind than expected into one error that names the file.

    Raises:
        CheckpointError: for the errors of values; those of ours pass.
    """
    try:
        yield
    except VitembedError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{source} is damaged or of a kind that is not known: it lacks {error}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: a value in it makes no sense ({error})") from error


def from_torchvision(transforms: Any) -> Preprocess:
    """Read the preset that comes with torchvision's weights: resize the short side, crop the middle."""
    size = (transforms.crop_size[0], transforms.crop_size[-1])
    return Preprocess(
        size,
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_share=min(size) / transforms.resize_size[0],
    )


def from_timm(settings: Mapping[str, Any], source: str) -> tuple[Preprocess | None, list[str]]:
    """Read timm's `pretrained_cfg`.

    Returns:
        The pre-processing, None where the images are neither RGB nor grey, and notes.

    Raises:
        CheckpointError: if a value is unknown.
    """
    with refusing_nonsense(source):
        channels, height, width = settings.get("input_size", (3, 224, 224))
        if channels not in (1, 3):
            return None, [f"no pre-processing: images of {channels} channels are neither RGB nor grey"]
        mode = settings.get("crop_mode") or "center"
        share = float(settings.get("crop_pct") or 0.875)  # timm's default
        notes = []
        if mode == "border":
            notes.append("timm pads with the mean colour in crop mode 'border'; here it is grey")
            share = 1.0
        if mode not in _TIMM_MODES:
            raise CheckpointError(f"{source} has the crop mode {mode!r}; known: {', '.join(_TIMM_MODES)}")
        resize = _TIMM_MODES[mode]
        mean, std = (_channels(settings.get(key, default), channels) for key, default in _TIMM_DEFAULTS)
        return _checked(
            source,
            size=(height, width),
            mode="RGB" if channels == 3 else "L",
            resize=resize,
            interpolation=settings.get("interpolation") or "bicubic",
            mean=mean,
            std=std,
            fill=round(255 * sum(mean) / len(mean)) if resize == "pad" else 255,
            crop_share=min(share, 1.0),
        ), notes


_TIMM_MODES: dict[str, Literal["crop", "pad", "squash"]] = {"center": "crop", "squash": "squash", "border": "pad"}
_TIMM_DEFAULTS = (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))


def from_open_clip(settings: Mapping[str, Any], size: Size, source: str) -> tuple[Preprocess, list[str]]:
    """Read OpenCLIP's `preprocess_cfg`.

    Raises:
        CheckpointError: if a value is unknown.
    """
    with refusing_nonsense(source):
        mode = settings.get("resize_mode") or "shortest"
        if mode not in ("shortest", "squash", "longest"):
            raise CheckpointError(f"{source} has the resize mode {mode!r}; known: shortest, squash, longest")
        mean = tuple(settings.get("mean") or _CLIP_MEAN)
        fill = settings.get("fill_color", 0)
        return _checked(
            source,
            size=image_size(settings.get("size") or size, source),
            resize={"shortest": "crop", "squash": "squash", "longest": "pad"}[mode],
            interpolation=settings.get("interpolation") or "bicubic",
            mean=mean,
            std=tuple(settings.get("std") or _CLIP_STD),
            fill=fill if isinstance(fill, int) else 0,
        ), []


def from_transformers(settings: Mapping[str, Any], model_type: str, source: str) -> tuple[Preprocess, list[str]]:
    """Read a preprocessor_config.json.

    Args:
        settings: its content.
        model_type: of config.json, which tells the processor where the file does not.
        source: what to call it in errors.

    Returns:
        The pre-processing, and notes on what it cannot do exactly.

    Raises:
        CheckpointError: if a value is unknown.
    """
    with refusing_nonsense(source):
        kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
        for suffix in _SUFFIXES:
            kind = kind.removesuffix(suffix)
        if not kind:
            kind = {"vit": "ViT", "deit": "DeiT", "clip": "CLIP", "clip_vision_model": "CLIP"}.get(model_type, "Bit")
        if kind not in _PROCESSORS and not isinstance(settings.get("size"), Mapping):
            raise CheckpointError(
                f"{source} is of an image processor that is not known: {kind}; known: ViT, DeiT, CLIP, Bit"
            )
        values = {**_PROCESSORS.get(kind, {}), **{key: value for key, value in settings.items() if value is not None}}
        resize, size, share, notes = _geometry(values, kind, source)
        mean, std = _normalisation(values)
        resample = values.get("resample", 2)
        if resample not in _RESAMPLING:
            raise CheckpointError(f"{source} has the resampling filter {resample!r}; known: 0 to 5, as in Pillow")
        return _checked(
            source,
            size=size,
            resize=resize,
            interpolation=_RESAMPLING[resample],
            mean=mean,
            std=std,
            crop_share=share,
            crop_offset="down",
        ), notes


def _geometry(
    values: Mapping[str, Any], kind: str, source: str
) -> tuple[Literal["crop", "squash"], Size, float, list[str]]:
    """Return how to resize, to what, the share that the crop keeps, and notes."""
    crop = image_size(values["crop_size"], source) if values.get("do_center_crop") and "crop_size" in values else None
    size = values["size"]
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if isinstance(size, int) and kind in ("CLIP", "Bit"):
        short = size
    if not values.get("do_resize", True):
        target = crop or image_size(size if short is None else short, source)
        return "crop", target, 1.0, ["its own pre-processing does not resize; here the short side is brought to size"]
    if short is not None:
        target = crop or (short, short)
        notes = [] if crop else ["its own pre-processing keeps the long side; here the middle is cut out"]
        if min(target) > short:
            return "crop", target, 1.0, ["its own pre-processing pads after resizing; here images are resized to size"]
        return "crop", target, min(target) / short, notes
    whole = image_size(size, source)
    if crop is None or crop == whole:
        return "squash", whole, 1.0, []
    shares = {part / side for part, side in zip(crop, whole, strict=True) if part <= side}
    if len(shares) != 1:
        raise CheckpointError(f"{source} crops {crop} of {whole}; expected the same share of height and width")
    return "squash", crop, shares.pop(), []


def _normalisation(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation for pixels in [0, 1], whatever range theirs are for.

    transformers computes (pixels x factor - mean) / std, with steps that can be switched off.
    """
    factor = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values.get("do_normalize", True):
        mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    unit = 255 * factor
    if abs(unit - 1) < 1e-6:
        return tuple(map(float, mean)), tuple(map(float, std))
    return tuple(value / unit for value in mean), tuple(value / unit for value in std)


def image_size(value: Any, source: str) -> Size:
    """Return (height, width) of an int, a pair or a dictionary."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(pair) == 1:
        pair = 2 * pair
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise CheckpointError(f"{source} has an image size that is not known: {value!r}; expected height and width")
    return pair[0], pair[1]


def _channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a number a channel: of three for RGB the mean, where the images are grey."""
    numbers = tuple(float(value) for value in values)
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def _checked(source: str, **settings: Any) -> Preprocess:
    try:
        return Preprocess(**settings)
    except ConfigError as error:
        raise CheckpointError(f"{source} has a pre-processing that is not known: {error}") from error
