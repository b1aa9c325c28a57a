"""Whether our ViT gives what the library gives that the weights come from: one row a family.

    python benchmarks/parity.py

Each row builds a small network of the other library with random weights (every one of them: scales, tokens, positions
and biases too), saves it the way that library saves, loads it by `vitembed.weights.load_checkpoint`, and shows the
largest absolute difference of the CLS embedding, of the class logits and of the projected embedding, in float32, at
two image sizes. The original files of DINO, DINOv2 and OpenAI's CLIP are imitated: their names and layouts, with a
network of timm that computes the same. About ten seconds.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn

from vitembed.vit import ViT
from vitembed.weights import Checkpoint, load_checkpoint, load_state

WIDTH, DEPTH, HEADS, CLASSES = 128, 2, 2, 5  # heads of width 64, which bare files are taken to have
LIMIT = 1e-5

Outputs = dict[str, Tensor]
Peer = Callable[[Tensor], Outputs]
Build = Callable[[Path, int], tuple[Path, Peer]]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        family: what it is called.
        patch: side of a patch; images are of two and of three patches a side.
        build: saves a network for images of a size into a folder; returns what to load, and the network's outputs
            for normalised images: "cls", and where it has them "logits" and "projected".
    """

    family: str
    patch: int
    build: Build

    @property
    def sizes(self) -> tuple[int, int]:
        """The two image sizes."""
        return 2 * self.patch, 3 * self.patch


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, scales around one: of zeros and ones a wrong place in the network stays unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if parameter.ndim == 1 and name.endswith(".weight") else 0.0  # of a norm
            parameter.copy_(around + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def difference(case: Case, size: int, folder: Path) -> dict[str, float]:
    """Return the largest absolute difference of each output that the peer has."""
    path, peer = case.build(folder, size)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.image_size == (size, size), checkpoint.config
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs, ours = peer(images), outputs(checkpoint, images)
    return {name: (theirs[name] - ours[name]).abs().max().item() for name in theirs}


def outputs(checkpoint: Checkpoint, images: Tensor) -> Outputs:
    """Return what our network gives: "cls", and where it has them "logits" and "projected"."""
    vit = ViT(checkpoint.config)
    load_state(vit, checkpoint.state, checkpoint.source)
    out = vit.eval()(images)
    result = {"cls": out.cls}
    if out.logits is not None:
        result["logits"] = out.logits
    if checkpoint.projection is not None:
        result["projected"] = out.cls @ checkpoint.projection.T
    return result


def of_torchvision(representation: int | None = None) -> Build:
    """Return a builder of torchvision's VisionTransformer, saved as a bare state dict."""

    def build(folder: Path, size: int) -> tuple[Path, Peer]:
        model = torchvision.models.VisionTransformer(
            size, 16, DEPTH, HEADS, WIDTH, 3 * WIDTH, num_classes=CLASSES, representation_size=representation
        )
        randomise(model, size)
        torch.save(model.state_dict(), folder / "vit.pth")
        return folder / "vit.pth", lambda images: {"cls": torchvision_cls(model, images), "logits": model(images)}

    return build


def torchvision_cls(model: Any, images: Tensor) -> Tensor:
    """Return the CLS token, which torchvision's own forward pass hands to the head."""
    tokens = model._process_input(images)
    return model.encoder(torch.cat([model.class_token.expand(len(images), -1, -1), tokens], dim=1))[:, 0]


def timm_model(architecture: str, size: int, **changes: Any) -> Any:
    """Return a small timm model of an architecture, with random weights."""
    settings = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES, **changes}
    return randomise(timm.create_model(architecture, img_size=size, **settings), size)


def timm_peer(model: Any, *, projects: bool = False) -> Peer:
    """Return the outputs of a timm model; CLIP's head is its projection."""

    def peer(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        result = {"cls": tokens[:, 0]}
        if model.num_classes:
            result["projected" if projects else "logits"] = model.forward_head(tokens)
        return result

    return peer


def of_timm(architecture: str, *, projects: bool = False, **changes: Any) -> Build:
    """Return a builder of a timm model, saved with its configuration as on the hub."""

    def build(folder: Path, size: int) -> tuple[Path, Peer]:
        model = timm_model(architecture, size, **changes)
        if projects:
            nn.init.zeros_(model.head.bias)
        save_for_hf(model, str(folder), safe_serialization=True)
        return folder, timm_peer(model, projects=projects)

    return build


def original_dino(folder: Path, size: int) -> tuple[Path, Peer]:
    """Build the training checkpoint of the original DINO: student and teacher, each with a head, and its settings."""
    model = timm_model("vit_small_patch16_224", size, num_classes=0)
    state = model.state_dict()
    head = {"head.mlp.0.weight": torch.randn(8, WIDTH), "head.last_layer.weight_g": torch.ones(8, 1)}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()} | head
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    content = {"student": student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit_small")}
    torch.save(content, folder / "dino.pth")
    return folder / "dino.pth", timm_peer(model)


def original_dinov2(architecture: str, *, chunks: bool) -> Build:
    """Return a builder of the original files of DINOv2: positions with CLS, other names, blocks in chunks if wanted."""

    def build(folder: Path, size: int) -> tuple[Path, Peer]:
        model = timm_model(architecture, size, num_classes=0)
        state = model.state_dict()
        if "reg_token" in state:
            state["register_tokens"] = state.pop("reg_token")
            first = torch.randn(1, 1, WIDTH)
            state["cls_token"] = state["cls_token"] - first  # in this layout CLS has a position, too
            state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
        state["mask_token"] = torch.randn(1, WIDTH)
        if "giant" in architecture:
            state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
        if chunks:
            state = {n.replace("blocks.", "blocks.0."): t for n, t in state.items()}
        torch.save(state, folder / "dinov2.pth")
        return folder / "dinov2.pth", timm_peer(model)

    return build


def openai_clip(folder: Path, size: int) -> tuple[Path, Peer]:
    """Build a whole CLIP with OpenAI's names in half precision, image tower and text tower."""
    model = timm_model("vit_base_patch16_clip_quickgelu_224", size)
    nn.init.zeros_(model.head.bias)
    model.half().float()
    renamed = (
        ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("norm.", "ln_post."),
    )
    tower = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        tower[f"visual.{name}"] = tensor.half()
    tower["visual.class_embedding"] = tower["visual.class_embedding"][0, 0]
    tower["visual.positional_embedding"] = tower["visual.positional_embedding"][0]
    tower["visual.proj"] = tower.pop("visual.head.weight").T.contiguous()
    del tower["visual.head.bias"]
    text = {
        "token_embedding.weight": torch.randn(10, 8),
        "positional_embedding": torch.randn(4, 8),
        "transformer.resblocks.0.ln_1.weight": torch.randn(8),
        "ln_final.weight": torch.randn(8),
        "text_projection": torch.randn(8, CLASSES),
        "logit_scale": torch.tensor(4.6),
        "input_resolution": torch.tensor(size),
    }
    torch.save(tower | text, folder / "clip.pt")
    return folder / "clip.pt", timm_peer(model, projects=True)


def of_transformers(
    model_class: str, config_class: str, read: Callable[[Any, Tensor], Outputs], **changes: Any
) -> Build:
    """Return a builder of a transformers model, saved by its own `save_pretrained`."""

    def build(folder: Path, size: int) -> tuple[Path, Peer]:
        settings = {
            "hidden_size": WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 2 * HEADS,  # of width 32: the configuration's word counts
            "intermediate_size": 3 * WIDTH,
            "image_size": size,
            "num_labels": CLASSES,
            **changes,
        }
        if config_class == "CLIPConfig":
            settings = {
                "vision_config": settings,
                "text_config": {**settings, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2},
            }
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
        randomise(model, size).save_pretrained(folder)
        return folder, lambda images: read(model, images)

    return build


def hidden_cls(model: Any, images: Tensor) -> Outputs:
    """Read the CLS token of ViT, DeiT and DINOv2, whose hidden state is after the last norm."""
    return {"cls": model(pixel_values=images).last_hidden_state[:, 0]}


def cls_and_logits(model: Any, images: Tensor) -> Outputs:
    """Read a classifier and the model inside it."""
    return hidden_cls(model.base_model, images) | {"logits": model(pixel_values=images).logits}


def clip_pooled(model: Any, images: Tensor) -> Outputs:
    """Read CLIP's pooled token, which is after the last norm as its hidden state is not."""
    return {"cls": model(pixel_values=images).pooler_output}


def clip_projected(model: Any, images: Tensor) -> Outputs:
    """Read the pooled token and the image embedding of CLIP's image tower."""
    return clip_pooled(model.vision_model, images) | {"projected": model(pixel_values=images).image_embeds}


def clip_features(model: Any, images: Tensor) -> Outputs:
    """Read the pooled token and the image embedding of a whole CLIP."""
    pooled = clip_pooled(model.vision_model, images)
    return pooled | {"projected": model.visual_projection(pooled["cls"])}


CASES = [
    Case("torchvision ViT", 16, of_torchvision()),
    Case("torchvision ViT, MLP head", 16, of_torchvision(representation=24)),
    Case("timm ViT, AugReg", 16, of_timm("vit_base_patch16_224")),
    Case("timm DeiT", 16, of_timm("deit_small_patch16_224")),
    Case("timm DeiT, distilled", 16, of_timm("deit_small_distilled_patch16_224")),
    Case("timm DeiT III", 16, of_timm("deit3_small_patch16_224")),
    Case("timm DINO", 8, of_timm("vit_small_patch8_224", num_classes=0)),
    Case("timm DINOv2", 14, of_timm("vit_small_patch14_dinov2")),
    Case("timm DINOv2, registers", 14, of_timm("vit_small_patch14_reg4_dinov2", num_classes=0)),
    Case("timm DINOv2 giant, SwiGLU", 14, of_timm("vit_giant_patch14_dinov2", num_classes=0)),
    Case("timm CLIP", 16, of_timm("vit_base_patch16_clip_224", projects=True)),
    Case("timm CLIP, quick-GELU", 16, of_timm("vit_base_patch16_clip_quickgelu_224", projects=True)),
    Case("timm CLIP, fine-tuned", 16, of_timm("vit_base_patch16_clip_224")),
    Case("original DINO", 16, original_dino),
    Case("original DINOv2", 14, original_dinov2("vit_small_patch14_dinov2", chunks=False)),
    Case("original DINOv2, registers", 14, original_dinov2("vit_small_patch14_reg4_dinov2", chunks=True)),
    Case("original DINOv2 giant", 14, original_dinov2("vit_giant_patch14_dinov2", chunks=True)),
    Case("OpenAI CLIP", 16, openai_clip),
    Case("transformers ViTModel", 16, of_transformers("ViTModel", "ViTConfig", hidden_cls)),
    Case("transformers ViT classifier", 16, of_transformers("ViTForImageClassification", "ViTConfig", cls_and_logits)),
    Case("transformers DeiTModel", 16, of_transformers("DeiTModel", "DeiTConfig", hidden_cls)),
    Case(
        "transformers DeiT, distilled",
        16,
        of_transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", cls_and_logits),
    ),
    Case("transformers Dinov2Model", 14, of_transformers("Dinov2Model", "Dinov2Config", hidden_cls, patch_size=14)),
    Case(
        "transformers Dinov2, SwiGLU",
        14,
        of_transformers("Dinov2Model", "Dinov2Config", hidden_cls, patch_size=14, use_swiglu_ffn=True),
    ),
    Case(
        "transformers Dinov2, registers",
        14,
        of_transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", hidden_cls, patch_size=14),
    ),
    Case(
        "transformers CLIPVisionModel",
        16,
        of_transformers("CLIPVisionModel", "CLIPVisionConfig", clip_pooled, patch_size=16),
    ),
    Case(
        "transformers CLIP, projection",
        16,
        of_transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", clip_projected, patch_size=16),
    ),
    Case("transformers CLIPModel", 16, of_transformers("CLIPModel", "CLIPConfig", clip_features, patch_size=16)),
]


def rows(cases: list[Case] = CASES) -> Iterator[tuple[Case, dict[int, dict[str, float]]]]:
    """Yield each case with the differences at its two image sizes."""
    for case in cases:
        found = {}
        for size in case.sizes:
            with tempfile.TemporaryDirectory() as folder:
                found[size] = difference(case, size, Path(folder))
        yield case, found


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print(
        f"timm {timm.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}; largest absolute difference, float32, random weights\n"
    )
    print(f"{'family':<34}{'pixels':>7}{'CLS':>10}{'logits':>10}{'projected':>11}")
    worst = 0.0
    for case, found in rows():
        for size, values in found.items():
            cells = [f"{values[name]:.1e}" if name in values else "" for name in ("cls", "logits", "projected")]
            print(f"{case.family:<34}{size:>7}{cells[0]:>10}{cells[1]:>10}{cells[2]:>11}", flush=True)
            worst = max(worst, *values.values())
    print(f"\nlargest of all: {worst:.1e}; the limit is {LIMIT:.0e}")
    if worst >= LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
