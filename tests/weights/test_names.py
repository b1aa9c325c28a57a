"""Names that are rarer than those of `benchmarks/parity.py`, in bare files: each gives the network it came from."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from benchmarks.parity import outputs, randomise, timm_model
from vitembed.errors import CheckpointError
from vitembed.vit import ViT, ViTConfig
from vitembed.weights import load_checkpoint
from vitembed.weights.names import FAMILIES, to_timm

SMALL = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "bare.pth")
    return folder / "bare.pth"


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        ("ViTModel", transformers.ViTConfig(**SMALL, image_size=32)),
        ("Dinov2Model", transformers.Dinov2Config(**SMALL, image_size=28)),
        ("Dinov2Model", transformers.Dinov2Config(**SMALL, image_size=28, use_swiglu_ffn=True)),
        ("Dinov2WithRegistersModel", transformers.Dinov2WithRegistersConfig(**SMALL, image_size=28, patch_size=14)),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_of_transformers_without_its_configuration(
    tmp_path: Path, model_class: str, config: Any, in_memory: bool
) -> None:
    model = randomise(getattr(transformers, model_class)(config), 0)
    if in_memory:  # transformers 5 has shorter names in memory than in files
        path = saved(tmp_path, model.state_dict())
    else:
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    checkpoint = load_checkpoint(path)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        expected = model(pixel_values=images).last_hidden_state[:, 0]
        assert (outputs(checkpoint, images)["cls"] - expected).abs().max() < 1e-5


def test_a_clip_without_its_configuration_says_which_activation_was_assumed(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=16)
    model = randomise(transformers.CLIPVisionModel(config), 0)
    checkpoint = load_checkpoint(saved(tmp_path, model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixel_values=images).pooler_output
        assert (outputs(checkpoint, images)["cls"] - expected).abs().max() < 1e-5
    assert "quick_gelu" in " ".join(checkpoint.notes)


@pytest.mark.parametrize(
    ("architecture", "size", "renamed"),
    [
        ("deit3_small_patch16_224", 32, [("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")]),  # the original DeiT III
        ("vit_giant_patch14_dinov2", 28, [("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")]),  # DINOv2 without chunks
    ],
)
def test_other_spellings_of_timms_names(
    tmp_path: Path, architecture: str, size: int, renamed: list[tuple[str, str]]
) -> None:
    model = timm_model(architecture, size, num_classes=0)
    state = model.state_dict()
    for ours, theirs in renamed:
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        found = outputs(load_checkpoint(saved(tmp_path, state)), images)
        assert (found["cls"] - model.forward_features(images)[:, 0]).abs().max() < 1e-5


def test_the_hidden_layer_of_older_heads(tmp_path: Path) -> None:
    vit = randomise(ViT(ViTConfig((32, 32), width=64, depth=1, heads=1, num_classes=3, head_width=8)), 0)
    state = {name.replace("pre_logits.", "pre_logits.fc."): tensor for name, tensor in vit.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            outputs(load_checkpoint(saved(tmp_path, state)), images)["logits"], vit(images).logits
        )


def test_layer_scale_of_open_clip_has_its_place() -> None:
    state = {"ln_pre.weight": torch.ones(4), "transformer.resblocks.3.ls_2.gamma": torch.ones(4)}
    assert set(to_timm(state, "here").state) == {"norm_pre.weight", "blocks.3.ls2.gamma"}


def test_heads_that_read_more_than_cls_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    for name, config, note in [
        ("Dinov2ForImageClassification", transformers.Dinov2Config(**SMALL, image_size=28), "mean of the patches"),
        ("DeiTForImageClassification", transformers.DeiTConfig(**SMALL, image_size=32), "beside a distillation token"),
    ]:
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint.config.num_classes == 0
        assert note in " ".join(checkpoint.notes)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, image_size=32))
    model.save_pretrained(tmp_path)
    assert set(load_checkpoint(tmp_path).notes) >= {
        "left out: the mask token",
        "left out: the decoder of a masked autoencoder",
    }


def test_a_parameter_that_comes_twice_is_refused() -> None:
    vit = ViT(ViTConfig((32, 32), width=64, depth=1, heads=1))
    state = {**vit.state_dict(), "blocks.0.0.norm1.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"holds blocks\.0\.norm1\.weight twice"):
        to_timm(state, "here")


def test_patches_that_are_no_squares_and_tokens_of_another_width_are_refused(tmp_path: Path) -> None:
    state = ViT(ViTConfig((32, 32), width=64, depth=1, heads=1)).state_dict()
    for name, tensor, message in [
        ("patch_embed.proj.weight", torch.ones(64, 3, 16, 8), "patches of another kind"),
        ("cls_token", torch.ones(1, 1, 32), "cls_token of shape"),
        ("reg_token", torch.ones(1, 4, 32), "reg_token of shape"),
        ("blocks.x.norm", torch.ones(1), "no whole row of blocks"),
        ("blocks.999999999.norm1.weight", torch.ones(1), "no whole row of blocks"),
        ("blocks.0.mlp.fc1.weight", torch.ones(()), "expected a matrix"),
        ("head.weight", torch.ones(5), "expected a matrix"),
        ("blocks.0.norm1.weight", torch.ones(()), r"\+blocks\.0\.norm1\.weight \(\)"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved(tmp_path, {**state, name: tensor}))
    del state["blocks.0.mlp.fc1.weight"]
    with pytest.raises(CheckpointError, match="no whole ViT"):
        load_checkpoint(saved(tmp_path, state))


def test_no_anchor_belongs_to_two_families() -> None:
    for family in FAMILIES:
        assert not [other for other in FAMILIES if other is not family and other.anchor.endswith(family.anchor)]


def test_rms_norms_are_not_taken_for_layer_norms(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=1, norm_layer=nn.RMSNorm
    )
    with pytest.raises(CheckpointError, match=r"-norm\.bias \(64,\)"):
        load_checkpoint(saved(tmp_path, model.state_dict()))


def test_queries_keys_and_values_of_different_shapes_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SMALL, image_size=32)
    state = transformers.ViTModel(config).state_dict()
    for tensor in (torch.ones(128, 3), torch.ones(())):
        state["layers.0.attention.k_proj.weight"] = tensor
        with pytest.raises(CheckpointError, match=r"-blocks\.0\.attn\.qkv\.weight \(384, 128\)"):
            load_checkpoint(saved(tmp_path, state))
