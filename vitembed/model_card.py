"""The text of a model card: what a saved embedder is, how to use it, with us and with timm, where it comes from."""

import dataclasses
import functools
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from vitembed.architecture import ViTConfig
from vitembed.errors import ConfigError
from vitembed.weights import timm_arguments

_TEMPLATE = """\
---
library_name: vitembed
tags: [{tags}]
---

# Image embedder

{summary}

```python
from vitembed import Embedder

model = Embedder.from_pretrained("this folder")
vectors = model.encode(["a.jpg", "b.jpg"])  # (2, {dim}) float32, rows of length 1
```

Fingerprint: `{fingerprint}`

## With timm

{timm}

## Where it comes from

```json
{provenance}
```

## Licence and limits

To be filled in by whoever publishes it: the licence of the training images, on what the model was measured, and on
what it was not.
"""

_TIMM = """\
The tensors have timm's names. `pixels` are (B, {channels}, {height}, {width}) in [0, 255], prepared as `preprocess`
of config.json says.{exact}

```python
{code}
```"""

_MLPS = {"quick_gelu": "quick GELU", "swiglu": "SwiGLU"}


def model_card(config: Mapping[str, Any], *, dim: int, parameters: int, fingerprint: str) -> str:
    """Return the Markdown of a card.

    Args:
        config: the saved configuration of an embedder: "vit" or "backbone", "pooling", "dim", "preprocess" and
            "provenance"; see `vitembed.saved_model`.
        dim: width of an embedding.
        parameters: how many numbers the network holds.
        fingerprint: of weights and pre-processing.
    """
    vit = None if config["vit"] is None else ViTConfig.from_dict(config["vit"])
    network = _foreign(config["backbone"], parameters) if vit is None else _vit(vit, parameters)
    size, mode = "{} x {}".format(*config["preprocess"]["size"]), config["preprocess"]["mode"]
    summary = (
        f"{network} that maps {size} {mode} images to unit vectors of {dim} numbers{_pooled(vit, config)}. The cosine "
        f"of two vectors says how alike two images are.{'' if vit is None else _merging(vit)}"
    )
    return _TEMPLATE.format(
        tags=f"image-embeddings, {'' if vit is None else 'vision-transformer, '}metric-learning",
        summary=textwrap.fill(summary, 120, break_long_words=False, break_on_hyphens=False),
        dim=dim,
        fingerprint=fingerprint,
        timm=_foreign_in_timm(config) if vit is None else _vit_in_timm(vit, config),
        provenance=json.dumps({name: _brief(value) for name, value in config["provenance"].items()}, indent=2),
    )


def _vit(vit: ViTConfig, parameters: int) -> str:
    """Name the network, and all of it that is not as in the paper."""
    parts = [
        f"{vit.depth} blocks of width {vit.width}",
        f"{vit.heads} heads",
        f"{'a convolutional stem with' if vit.stem else 'linear'} patches of {vit.patch_size} pixels",
        "a distillation token" if vit.distilled else "",
        f"{vit.registers} register tokens" if vit.registers else "",
        "LayerScale" if vit.layer_scale else "",
        _MLPS.get(vit.mlp, ""),
        "a LayerNorm before the blocks" if vit.norm_pre else "",
        f"a head for {vit.num_classes} classes" if vit.num_classes else "",
        f"{parameters:,} parameters",
    ]
    return f"A Vision Transformer ({', '.join(filter(None, parts))})"


def _foreign(backbone: Mapping[str, Any], parameters: int) -> str:
    name = f"timm's {backbone['timm']}" if backbone["timm"] else f"A network of the class {backbone['class']}"
    return f"{name} ({parameters:,} parameters)"


def _pooled(vit: ViTConfig | None, config: Mapping[str, Any]) -> str:
    """Say what the vectors are taken from."""
    source = {"cls": "the CLS token", "mean": "the mean of the patch tokens"}[config["pooling"]]
    parts = [source if vit else "", "a linear projection" if config["dim"] else ""]
    text = ", through ".join(filter(None, parts))
    return f" ({text})" if text else ""


def _merging(vit: ViTConfig) -> str:
    if not vit.merge:
        return ""
    return (
        f" Each block but the last merges {vit.merge} tokens away (ToMe, arXiv:2210.09461), which is faster and "
        "changes the vectors; `model.replace(merge=0)` gives the exact ones, of another fingerprint."
    )


def _foreign_in_timm(config: Mapping[str, Any]) -> str:
    backbone = config["backbone"]
    if backbone["timm"] is None:
        return (
            "The network is none of timm's. Whoever has its class loads the model with\n"
            '`Embedder.from_pretrained("this folder", module=...)`.'
        )
    arguments = f'"{backbone["timm"]}", num_classes=0, in_chans={backbone["channels"]}'
    besides = "; `projection.weight` comes after it" if config["dim"] else ""
    return f"The tensors are those of `timm.create_model({arguments})`{besides}."


def _vit_in_timm(vit: ViTConfig, config: Mapping[str, Any]) -> str:
    """Say how timm loads the weights' file, or why it cannot."""
    try:
        arguments = _arguments(vit)
    except ConfigError as error:
        return f"timm cannot load this model: {error}."
    height, width = vit.image_size
    exact = " timm merges no tokens: its vectors are those of merge=0." if vit.merge else ""
    code = _timm_code(vit, config, arguments)
    return _TIMM.format(channels=vit.channels, height=height, width=width, exact=exact, code=code)


def _arguments(vit: ViTConfig) -> dict[str, str]:
    """Return `timm_arguments` as source text, without needing timm.

    Raises:
        ConfigError: if timm has no such network.
    """
    gated = vit.mlp == "swiglu"  # for which `timm_arguments` would import a class of timm
    if gated:
        # The first layer of SwiGLU is twice as wide, which is all that timm's `mlp_ratio` sees of it.
        vit = dataclasses.replace(vit, mlp="gelu", mlp_width=2 * (vit.mlp_width or 4 * vit.width))
    texts = {}
    for name, value in timm_arguments(vit).items():
        is_norm = isinstance(value, functools.partial)
        texts[name] = f"partial(torch.nn.LayerNorm, eps={vit.norm_eps})" if is_norm else repr(value)
    return texts | ({"mlp_layer": "SwiGLUPacked", "act_layer": "'silu'"} if gated else {})


def _timm_code(vit: ViTConfig, config: Mapping[str, Any], arguments: Mapping[str, str]) -> str:
    """Return Python that computes `vectors` of `pixels` with timm."""
    settings = dict(arguments)
    dim, preprocess = config["dim"], config["preprocess"]
    # A projection is saved as the head, unless there is a head for classes; of a distilled network timm wants two.
    as_head = dim is not None and not vit.num_classes and not vit.distilled
    if as_head:
        settings["num_classes"] = str(dim)
    home, kind = "vision_transformer", "VisionTransformer"
    if vit.distilled:
        home, kind = "deit", "VisionTransformerDistilled"
    lines = ["from functools import partial", ""] if "norm_layer" in settings else []
    lines += ["import torch", "from safetensors.torch import load_file"]
    lines += ["from timm.layers import SwiGLUPacked"] if "mlp_layer" in settings else []
    lines += [f"from timm.models.{home} import {kind}", ""]
    lines += ['state = load_file("model.safetensors")']
    if dim is not None and not as_head:
        lines += [f'projection = state.pop("{"projection" if vit.num_classes else "head"}.weight")']
        lines += [] if vit.num_classes else ['del state["head.bias"]']
    lines += [f"network = {kind}("]
    lines += [f"    {name}={value}," for name, value in settings.items()]
    lines += [")", "network.load_state_dict(state)", "network.eval()"]
    lines += [f"mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ({preprocess['mean']}, {preprocess['std']}))"]
    lines += ["images = (pixels / 255 - mean) / std"]
    lines += _timm_features(vit, config["pooling"], as_head)
    features = "features @ projection.T" if dim is not None and not as_head else "features"
    return "\n".join([*lines, f"vectors = torch.nn.functional.normalize({features})"])


def _timm_features(vit: ViTConfig, pooling: str, as_head: bool) -> list[str]:
    if pooling == "cls" and not vit.num_classes and not vit.distilled:
        return ["features = network(images)"]
    pooled = "tokens[:, 0]" if pooling == "cls" else f"tokens[:, {vit.prefix_tokens}:].mean(dim=1)"
    return [
        "tokens = network.forward_features(images)  # (B, tokens, width)",
        f"features = {f'network.head({pooled})' if as_head else pooled}",
    ]


def _brief(value: Any) -> Any:
    """Shorten a long list, such as the names of thousands of classes; config.json has it whole."""
    return [*value[:5], f"and {len(value) - 5} more"] if isinstance(value, list) and len(value) > 6 else value
