"""Everybody's parameter names become timm's, by tables that are read from top to bottom.

A `Family` is recognised by the name of one parameter, its anchor. What stands before the anchor ("module.backbone.",
"vision_model.") is the prefix of the image tower; every other name must be a head that is kept or a part that is known
to play no role in an image's embedding. Nothing is left out because it did not fit: a name that no table knows stays,
and the network it is loaded into refuses it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitembed.architecture import MlpKind
from vitembed.errors import CheckpointError

Rules = tuple[tuple[str, str], ...]

STAND_IN = "a timm model or any other nn.Module can stand in as backbone: Embedder.from_module(module)"


@dataclass(frozen=True)
class Family:
    """One library's way of naming a ViT.

    Attributes:
        name: whose it is.
        anchor: a parameter that each model of the family has, and no other family.
        rules: (pattern, replacement) for whole names without prefix; the first that matches counts.
        norm_eps: of its LayerNorms where no configuration says it.
        mlp: its activation where no configuration says it.
    """

    name: str
    anchor: str
    rules: Rules
    norm_eps: float = 1e-6
    mlp: MlpKind = "gelu"


@dataclass(frozen=True)
class Named:
    """A state in timm's names.

    Attributes:
        family: whose names it had.
        state: tensors by timm's names.
        projection: (D, W), CLIP's image projection; None for none.
        notes: what was left out, a sentence each.
    """

    family: Family
    state: dict[str, Tensor] = field(repr=False)
    projection: Tensor | None = field(repr=False)
    notes: tuple[str, ...] = ()


# timm itself, and the original code of DeiT, DINO, DINOv2 and MAE, from which timm's names come.
TIMM = Family(
    "timm",
    "patch_embed.proj.weight",
    (
        (r"register_tokens", "reg_token"),
        (r"pre_logits\.fc\.(.+)", r"pre_logits.\1"),
        (r"blocks\.\d+\.(\d+)\.mlp\.w12\.(.+)", r"blocks.\1.mlp.fc1.\2"),  # DINOv2 in chunks of blocks
        (r"blocks\.\d+\.(\d+)\.mlp\.w3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),
        (r"blocks\.(\d+)\.mlp\.w12\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"blocks\.(\d+)\.mlp\.w3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),  # the original DeiT III
    ),
)

TORCHVISION = Family(
    "torchvision",
    "conv_proj.weight",
    (
        (r"class_token", "cls_token"),
        (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(.+)", r"blocks.\1.norm\2.\3"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(.+)", r"norm.\1"),
        (r"heads\.(head|pre_logits)\.(.+)", r"\1.\2"),
    ),
)

# ViT, DeiT, DINOv2 with and without registers: the names in files, and the shorter ones of transformers 5 in memory.
_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
TRANSFORMERS = Family(
    "transformers",
    "embeddings.patch_embeddings.projection.weight",
    (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (_BLOCK + r"attention\.(?:attention\.query|q_proj)\.(.+)", r"blocks.\1.attn.q.\2"),
        (_BLOCK + r"attention\.(?:attention\.key|k_proj)\.(.+)", r"blocks.\1.attn.k.\2"),
        (_BLOCK + r"attention\.(?:attention\.value|v_proj)\.(.+)", r"blocks.\1.attn.v.\2"),
        (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
        (_BLOCK + r"(?:layernorm_before|norm1)\.(.+)", r"blocks.\1.norm1.\2"),
        (_BLOCK + r"(?:layernorm_after|norm2)\.(.+)", r"blocks.\1.norm2.\2"),
        (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (_BLOCK + r"mlp\.gate_proj\.(.+)", r"blocks.\1.mlp.gate.\2"),
        (_BLOCK + r"mlp\.up_proj\.(.+)", r"blocks.\1.mlp.up.\2"),
        (_BLOCK + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layernorm\.(.+)", r"norm.\1"),
    ),
    norm_eps=1e-12,
)

CLIP = Family(
    "transformers CLIP",
    "embeddings.patch_embedding.weight",
    (
        (r"embeddings\.class_embedding", "cls_token"),
        (r"embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
        (r"embeddings\.position_embedding\.weight", "pos_embed"),
        (r"pre_layrnorm\.(.+)", r"norm_pre.\1"),  # the spelling is theirs
        (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
        (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.+)", r"blocks.\1.attn.\2.\3"),
        (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layers\.(\d+)\.mlp\.(.+)", r"blocks.\1.mlp.\2"),
        (r"post_layernorm\.(.+)", r"norm.\1"),
    ),
    norm_eps=1e-5,
    mlp="quick_gelu",
)

# The image tower of OpenAI's CLIP and of OpenCLIP.
OPENAI_CLIP = Family(
    "OpenAI CLIP",
    "ln_pre.weight",
    (
        (r"class_embedding", "cls_token"),
        (r"positional_embedding", "pos_embed"),
        (r"conv1\.weight", "patch_embed.proj.weight"),
        (r"ln_pre\.(.+)", r"norm_pre.\1"),
        (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"blocks.\1.norm\2.\3"),
        (r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
        (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
        (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"ln_post\.(.+)", r"norm.\1"),
    ),
    norm_eps=1e-5,
    mlp="quick_gelu",
)

FAMILIES = (TIMM, TORCHVISION, TRANSFORMERS, CLIP, OPENAI_CLIP)

# Words before a whole model or its image tower: data parallelism, compilation, training code, models around the tower.
PREFIXES = frozenset(
    (
        *("module", "_orig_mod", "model", "backbone", "encoder", "teacher", "student"),
        *("clip", "vision_model", "visual", "vit", "deit", "dinov2", "dinov2_with_registers"),
    )
)

# Parts of a checkpoint that an image's embedding does not need, by their names in timm's spelling.
_LEFT_OUT_OF_THE_TOWER = (
    (r"(embeddings\.)?mask_token", "the mask token"),
    (r"pooler\..+", "the pooler"),
    (r"decoder(_.+|\..+)", "the decoder of a masked autoencoder"),
    (r"embeddings\.position_ids", "a table of numbers"),
)
_LEFT_OUT_BESIDE_THE_TOWER = (
    (r"text(_model|_projection|)(\..+)?|transformer\.resblocks\..+|ln_final\..+", "the text tower"),
    (r"token_embedding\.weight|positional_embedding|attn_mask|context_length|vocab_size", "the text tower"),
    (r"logit_scale|logit_bias|input_resolution", "CLIP's scale"),
    (r"(dino_head|ibot_head|head)\..+", "the head of self-supervised training"),
    (r"pooler\..+", "the pooler"),
    (r"decoder\..+", "the decoder of a masked autoencoder"),
)
_HEADS: Rules = (
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
    (r"(?:visual_)?projection\.weight", "projection"),
)

# Names that tell what a state is that this architecture cannot express; the first that is found counts.
_FOREIGN = (
    (r"patch_embed\.backbone\.|conv_proj\.conv_bn_relu", "a ViT on top of a convolutional network"),
    (r"layers\.\d+\.blocks\.\d+\.|(^|\.)stages\.\d+\.blocks\.", "a hierarchical network such as Swin or ConvNeXt"),
    (r"relative_position|rel_pos", "a transformer with relative positions"),
    (r"(^|\.)attn_?pool\.|(^|\.)head\.attention\.", "a ViT with attention pooling (SigLIP and its like)"),
    (r"(^|\.)fc_norm\.", "a ViT whose last norm comes after average pooling"),
    (r"\.[qk]_norm\.|\.ln_[qk]\.", "a ViT that normalises queries and keys"),
    (r"mlp\.fc1_[gx]\.|(^|\.)rope|rotary|blocks\.\d+\.attn\.[qkv]_proj\.", "an EVA or another ViT of its kind"),
    (r"blocks\.\d+\.(attns|in_proj|attn_out_proj)\.", "a ViT with parallel blocks"),
)
_NO_VIT = (
    (r"(^|\.)word_embeddings\.|(^|\.)embed_tokens\.|(^|\.)wte\.|token_embedding\.", "a text model"),
    (
        r"layer1\.0\.conv1\.|(^|\.)bn1\.running_mean|layers\.0\.layer\.0\.convolution",
        "a convolutional network such as ResNet",
    ),
    (r"(^|\.)features\.0\.|(^|\.)stages\.0\.|(^|\.)conv_stem\.", "a convolutional or hierarchical network"),
)


def to_timm(state: Mapping[str, Tensor], source: str) -> Named:
    """Rename a state of any of the families.

    Args:
        state: tensors by the names of the file.
        source: what to call it in errors.

    Returns:
        Float32 tensors by timm's names. Layouts are as in the file: `vitembed.weights.shapes` brings them to ours.

    Raises:
        CheckpointError: if it is of none of the families, holds a part that no table knows, or is quantised.
    """
    state = _without_common_prefix(state)
    family, prefix = _recognise(state, source)
    inside = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    _refuse(inside, _FOREIGN, source)
    heads, notes = _heads(beside, prefix, source)
    renamed: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        part = _first_match(name, _LEFT_OUT_OF_THE_TOWER)
        if part is not None:
            notes.append(f"left out: {part}")
            continue
        ours = _renamed(name, family.rules) or name
        if ours in renamed or ours in heads:
            raise CheckpointError(f"{source} holds {ours} twice, once as {name}; expected the weights of one model")
        renamed[ours] = _as_float(tensor, name, source)
    renamed |= heads
    projection = renamed.pop("projection", None)
    if family is OPENAI_CLIP and "proj" in renamed:
        projection = renamed.pop("proj").T.contiguous()  # (W, D) -> (D, W)
    return Named(family, _fused(renamed), projection, tuple(dict.fromkeys(notes)))


def _without_common_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Strip the words that stand before every name, as the "module." of data parallelism does."""
    while True:
        first = {name.split(".", 1)[0] if "." in name else "" for name in state}
        word = next(iter(first), "")
        if len(first) != 1 or word not in PREFIXES:
            return state
        state = {name[len(word) + 1 :]: tensor for name, tensor in state.items()}


def _recognise(state: Mapping[str, Tensor], source: str) -> tuple[Family, str]:
    """Find the family of a state and what stands before the names of its image tower.

    Of a student and a teacher in one state the teacher counts: it is the one that DINO's authors evaluate.
    """
    found = [
        (family, name.removesuffix(family.anchor))
        for family in FAMILIES
        for name in state
        if name.endswith(family.anchor) and set(name.removesuffix(family.anchor).split(".")) <= PREFIXES | {""}
    ]
    if len(found) > 1:
        found = [pair for pair in found if "teacher" in pair[1].split(".")] or found
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(repr(prefix) for _, prefix in found)
        raise CheckpointError(f"{source} holds {len(found)} image models (before their names: {places}); keep one")
    _refuse(state, _FOREIGN + _NO_VIT, source)
    names = ", ".join(list(state)[:3]) + (", ..." if len(state) > 3 else "")
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{source} is no ViT whose names are known ({known}); it holds {len(state)} tensors: {names}")


def _refuse(names: Iterable[str], telltales: Rules, source: str) -> None:
    for pattern, what in telltales:
        told = next((name for name in names if re.search(pattern, name)), None)
        if told is not None:
            raise CheckpointError(f"{source} is {what} ({told}), which this ViT cannot express; {STAND_IN}")


def _heads(beside: Mapping[str, Tensor], prefix: str, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Sort what stands beside the image tower into heads, by timm's names, and notes on what is left out."""
    heads: dict[str, Tensor] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for name, tensor in beside.items():
        ours = _renamed(name, _HEADS)
        part = "the student" if prefix.startswith("teacher.") and name.startswith("student.") else None
        part = part or _first_match(name.removeprefix("teacher."), _LEFT_OUT_BESIDE_THE_TOWER)
        if ours is not None:
            heads[ours] = _as_float(tensor, name, source)
        elif part is not None:
            notes.append(f"left out: {part}")
        else:
            unknown.append(f"{name} {tuple(tensor.shape)}")
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        raise CheckpointError(f"{source} holds parts beside the image tower that no rule knows: {shown}")
    return heads, notes


def _first_match(name: str, patterns: Rules) -> str | None:
    return next((what for pattern, what in patterns if re.fullmatch(pattern, name)), None)


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _as_float(tensor: Tensor, name: str, source: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.element_size() < 2:
        raise CheckpointError(
            f"{source} holds {name} as {tensor.dtype}; expected float32, float16 or bfloat16, not a quantised model"
        )
    return tensor.to(torch.float32)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack query, key and value into `attn.qkv`, and the two halves of a gated layer into `mlp.fc1`."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(attn\.[qkv]|mlp\.(?:gate|up))\.(weight|bias)", name)
        if not match:
            fused[name] = tensor
            continue
        block, part, kind = match.groups()
        whole = "attn.qkv" if part.startswith("attn.") else "mlp.fc1"
        parts = ["attn.q", "attn.k", "attn.v"] if part.startswith("attn.") else ["mlp.gate", "mlp.up"]
        wanted = [f"{block}.{each}.{kind}" for each in parts]
        rows = {state[each].shape[1:] if each in state and state[each].ndim else None for each in wanted}
        if len(rows) != 1 or None in rows:
            fused[name] = tensor  # the network will refuse it by its name
        elif part == parts[0]:
            fused[f"{block}.{whole}.{kind}"] = torch.cat([state[each] for each in wanted])
    return fused
