"""The configuration files that lie beside weights: transformers', timm's and OpenCLIP's, read for what no shape tells.

Heads, activation, the epsilon of the norms, image size, pooling and pre-processing. A configuration of an architecture
that our ViT cannot express is refused here, before the weights are fetched.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitembed.architecture import MlpKind
from vitembed.errors import CheckpointError
from vitembed.preprocess import Preprocess
from vitembed.weights import processing, tensors
from vitembed.weights.checkpoint import Described, Pooling
from vitembed.weights.names import STAND_IN
from vitembed.weights.tensors import read_json

# Files beside the weights, all small.
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json", "README.md")

_MLPS: dict[str, MlpKind] = {"gelu": "gelu", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu"}

# What transformers takes for a key that config.json leaves out.
_VIT = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "image_size": 224}
_CLIP = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "image_size": 224}
_MODEL_TYPES = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": {**_VIT, "layer_norm_eps": 1e-6},
    "dinov2_with_registers": {**_VIT, "layer_norm_eps": 1e-6},
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
}

# timm's architectures of the class VisionTransformer with a CLS token; some others have names that begin alike.
_TIMM = re.compile(r"(vit|deit3?|flexivit|test_vit)[0-9]*_.*|test_vit")
_NOT_TIMM = re.compile(
    r"_(rope|pe|srelpos|relpos|sam|r\d*|resnet\d+d|mci|gap|map|siglip|xp|rpn|18x2|intern300m|radio|dinov3|lingbot|"
    r"sapiens2)"
    r"(_|$)|relpos"
)

# Their heads, by the words of their names; the first that is found counts.
_TIMM_HEADS = (
    ("plus", 14),
    ("giant_patch14_dinov2|giant_patch14_reg\\d_", 24),
    ("tiny", 3),
    ("xsmall", 4),
    ("small", 6),
    ("medium", 8),
    ("betwixt", 10),
    ("base", 12),
    ("large|huge|giant|gigantic|so400m", 16),
    ("test_vit", 2),
)


def describe_folder(folder: Path) -> Described:
    """Read the configuration beside a folder's weights.

    Raises:
        CheckpointError: if there is none, if it is damaged, or if it is of an architecture that is not ours.
    """
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        with processing.refusing_nonsense(str(folder / "config.json")):
            if "architecture" in config:
                return describe_timm(config, folder)
            if "model_type" in config:
                return describe_transformers(config, folder)
        raise CheckpointError(
            f"{folder / 'config.json'} is neither transformers' (it has no model_type) nor timm's (no architecture)"
        )
    if (folder / "open_clip_config.json").is_file():
        with processing.refusing_nonsense(str(folder / "open_clip_config.json")):
            return describe_open_clip(read_json(folder / "open_clip_config.json"), folder)
    file = next((name for name in tensors.FILES if (folder / name).is_file()), None)
    if file is not None:
        raise CheckpointError(
            f"{folder} holds {file} but no description of it (no config.json); pass the file itself to go by its shapes"
        )
    raise CheckpointError(
        f"{folder} is no model folder: it holds no config.json; train one with: vitembed train DATA --out {folder}"
    )


def describe_transformers(config: Mapping[str, Any], folder: Path) -> Described:
    """Read transformers' config.json and preprocessor_config.json.

    Raises:
        CheckpointError: if the model type is none of ours, or a value is unknown.
    """
    model_type = str(config["model_type"])
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"{folder} is a {model_type!r} model of transformers, which this ViT cannot express "
            f"(known: {', '.join(_MODEL_TYPES)}); {STAND_IN}"
        )
    source = str(folder / "config.json")
    given = config.get("vision_config") if model_type == "clip" else config
    values = {**_MODEL_TYPES[model_type], **(given or {})}
    activation = values["hidden_act"]
    if activation not in _MLPS:
        raise CheckpointError(f"{source} has the activation {activation!r}, which this ViT does not know; {STAND_IN}")
    preprocess: Preprocess | None = None
    notes: list[str] = []
    settings, file = _preprocessor(folder)
    if settings is not None:
        preprocess, notes = processing.from_transformers(settings, model_type, str(file))
    return Described(
        heads=_number(values, "num_attention_heads", source),
        image_size=processing.image_size(values["image_size"], source),
        norm_eps=float(values["layer_norm_eps"]),
        mlp=_MLPS[activation],
        preprocess=preprocess,
        licence=_licence(folder),
        notes=tuple(notes),
    )


def describe_timm(config: Mapping[str, Any], folder: Path) -> Described:
    """Read the config.json of timm's hub models.

    What timm's code alone knows (activation, epsilon, heads) goes by the names of its architectures.

    Raises:
        CheckpointError: if the architecture is none of ours, or a value is unknown.
    """
    architecture = str(config["architecture"])
    source = str(folder / "config.json")
    if not _TIMM.fullmatch(architecture) or _NOT_TIMM.search(architecture):
        raise CheckpointError(f"{folder} is timm's {architecture}, which this ViT cannot express; {STAND_IN}")
    arguments = config.get("model_args") or {}
    settings = {**config, **(config.get("pretrained_cfg") or {})}
    channels, *size = settings.get("input_size", (3, 224, 224))
    preprocess, notes = processing.from_timm({**settings, "input_size": (channels, *size)}, source)
    clip = "_clip_" in architecture
    return Described(
        heads=arguments.get("num_heads") or next((n for word, n in _TIMM_HEADS if re.search(word, architecture)), None),
        image_size=processing.image_size(arguments.get("img_size") or size, source),
        norm_eps=1e-5 if clip else 1e-6,
        mlp=_timm_activation(architecture, arguments, source),
        pooling=_timm_pooling(str(arguments.get("global_pool") or config.get("global_pool") or "token"), source),
        preprocess=preprocess,
        licence=settings.get("license") or _licence(folder),
        notes=tuple(notes),
    )


def describe_open_clip(config: Mapping[str, Any], folder: Path) -> Described:
    """Read OpenCLIP's open_clip_config.json.

    Raises:
        CheckpointError: if the image tower is none of ours, or a value is unknown.
    """
    source = str(folder / "open_clip_config.json")
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vision, Mapping):
        raise CheckpointError(f"{source} is damaged: it has no model_cfg with a vision_cfg")
    other = [key for key in ("timm_model_name", "hf_model_name", "attentional_pool", "no_ln_pre") if vision.get(key)]
    other += ["pool_type"] if vision.get("pool_type", "tok") != "tok" or vision.get("global_average_pool") else []
    other += ["final_ln_after_pool"] if vision.get("final_ln_after_pool") else []
    if other or not isinstance(vision.get("layers"), int):
        reason = ", ".join(other) or "a ResNet"
        raise CheckpointError(f"{folder} has an image tower that this ViT cannot express ({reason}); {STAND_IN}")
    size = processing.image_size(vision.get("image_size", 224), source)
    preprocess, notes = processing.from_open_clip(config.get("preprocess_cfg") or {}, size, source)
    norm = vision.get("norm_kwargs") or {}
    return Described(
        heads=_number(vision, "width", source) // int(vision.get("head_width", 64)),
        image_size=size,
        norm_eps=float(norm.get("eps", 1e-5)),
        mlp="quick_gelu" if model.get("quick_gelu") else "gelu",
        preprocess=preprocess,
        licence=_licence(folder),
        notes=tuple(notes),
    )


def _timm_activation(architecture: str, arguments: Mapping[str, Any], source: str) -> MlpKind:
    activation = str(arguments.get("act_layer") or ("quick_gelu" if "_quickgelu_" in architecture else "gelu"))
    if activation not in _MLPS:
        raise CheckpointError(f"{source} has the activation {activation!r}, which this ViT does not know; {STAND_IN}")
    return _MLPS[activation]


def _timm_pooling(pooling: str, source: str) -> Pooling:
    if pooling not in ("token", "avg"):
        raise CheckpointError(f"{source} pools by {pooling!r}, which this ViT does not know; {STAND_IN}")
    return "cls" if pooling == "token" else "mean"


def _preprocessor(folder: Path) -> tuple[Mapping[str, Any] | None, Path]:
    """Return the settings of an image processor, alone in a file or beside a tokenizer's, and where they are."""
    alone, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    if alone.is_file():
        return read_json(alone), alone
    if together.is_file():
        settings = read_json(together).get("image_processor")
        return (settings if isinstance(settings, Mapping) else None), together
    return None, alone


def _licence(folder: Path) -> str | None:
    """Return the licence that a model card names in its first lines."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace")[:4000].split("\n---", 1)[0]
    match = re.search(r"^license: *([\w.-]+) *$", front, re.MULTILINE)
    return match[1] if match else None


def _number(values: Mapping[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source} is damaged: expected {key} as a whole number above 0; got {value!r}")
    return value
