"""timm in both directions: its architectures by name, our weights back into its networks, positions of another size."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from benchmarks.parity import of_timm, outputs, randomise, timm_model
from vitembed.errors import CheckpointError, ConfigError
from vitembed.vit import ViT, ViTConfig
from vitembed.weights import load_checkpoint, load_state, timm_arguments, timm_state
from vitembed.weights.configs import describe_timm
from vitembed.weights.names import to_timm
from vitembed.weights.shapes import to_ours

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}

CONFIGS = {
    "plain": ViTConfig((32, 48), 16, 3, 64, 2, 2, num_classes=5),
    "grey, other MLP, no head": ViTConfig((32, 32), 8, 1, 48, 1, 3, mlp_width=77),
    "registers, LayerScale": ViTConfig((28, 28), 14, 3, 64, 2, 2, registers=4, layer_scale=True),
    "SwiGLU": ViTConfig((32, 32), 16, 3, 60, 2, 2, mlp="swiglu", mlp_width=101),
    "CLIP": ViTConfig((32, 32), 16, 3, 64, 2, 2, mlp="quick_gelu", norm_pre=True, norm_eps=1e-5, num_classes=3),
    "distilled": ViTConfig((32, 32), 16, 3, 64, 2, 2, distilled=True, num_classes=4),
    "distilled, no head": ViTConfig((32, 32), 16, 3, 64, 2, 2, distilled=True),
}


def accepted() -> list[str]:
    """Return timm's architectures that we say we read."""
    names = []
    for name in timm.list_models():
        try:
            describe_timm({"architecture": name}, Path())
        except CheckpointError:
            continue
        names.append(name)
    return names


def test_what_is_read_off_the_name_of_an_architecture_is_what_timm_builds() -> None:
    names = accepted()
    assert len(names) > 80
    assert {"vit_giant_patch14_reg4_dinov2", "deit3_huge_patch14_224", "vit_small_patch8_224"} <= set(names)
    for name in names:
        settings = {"pretrained_cfg": timm.models.get_pretrained_cfg(name).to_dict()}
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, depth=1)
        described = describe_timm({"architecture": name, **settings}, Path(name))
        config, _ = to_ours(to_timm(model.state_dict(), name), described, name)
        block = model.blocks[0]
        theirs = (block.attn.num_heads, model.norm.eps, ACTIVATIONS[type(block.mlp.act).__name__])
        assert (config.heads, config.norm_eps, config.mlp) == theirs, name
        assert described.heads == block.attn.num_heads, name
        assert type(model) in (VisionTransformer, VisionTransformerDistilled), name
        assert model.global_pool == "token", name


def test_every_plain_vit_of_timm_is_read() -> None:
    names = set(timm.list_models(module="vision_transformer") + timm.list_models(module="deit")) - set(accepted())
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        plain = (
            model.cls_token is not None
            and isinstance(model.norm, torch.nn.LayerNorm)
            and hasattr(model.blocks[0], "mlp")
        )
        assert not plain, name


@pytest.mark.parametrize("name", CONFIGS)
def test_our_weights_go_into_timms_network_and_compute_the_same(name: str) -> None:
    config = CONFIGS[name]
    vit = randomise(ViT(config), 0)
    network = VisionTransformerDistilled if config.distilled else VisionTransformer
    model = network(**timm_arguments(config)).eval()
    model.load_state_dict(timm_state(vit.state_dict(), config), strict=True)
    images = torch.randn(2, config.channels, *config.image_size)
    with torch.inference_mode():
        ours, theirs = vit(images), model.forward_features(images)
        assert (ours.cls - theirs[:, 0]).abs().max() < 1e-5
        if ours.logits is not None:
            assert (ours.logits - model(images)).abs().max() < 1e-5


def test_what_timm_has_not_is_refused() -> None:
    for config, message in [
        (ViTConfig((32, 32), 4, 3, 64, 1, 1, stem=((16, 2), (64, 2))), "convolutional stem"),
        (ViTConfig((32, 32), 16, 3, 64, 1, 1, num_classes=3, head_width=8), "hidden layer in its head"),
    ]:
        with pytest.raises(ConfigError, match=message):
            timm_arguments(config)
        with pytest.raises(ConfigError, match=message):
            timm_state(ViT(config).state_dict(), config)


def test_there_and_back_again_is_the_same_file(tmp_path: Path) -> None:
    model = timm_model("vit_small_patch14_reg4_dinov2", 28, num_classes=0)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    checkpoint = load_checkpoint(tmp_path)
    state = timm_state(checkpoint.state, checkpoint.config)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_registers_with_positions_of_their_own_are_folded_in(tmp_path: Path) -> None:
    of_timm("vit_base_patch16_224", reg_tokens=4, num_classes=0)(tmp_path, 48)
    _, peer = of_timm("vit_base_patch16_224", reg_tokens=4, num_classes=0)(tmp_path, 48)
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert (outputs(load_checkpoint(tmp_path), images)["cls"] - peer(images)["cls"]).abs().max() < 1e-5


def test_average_pooling_after_the_norm_is_mean_pooling(tmp_path: Path) -> None:
    model = timm_model("vit_base_patch16_224", 32, global_pool="avg", fc_norm=False)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.pooling == "mean"
    assert checkpoint.config.num_classes == 0
    assert "reads the mean of the patches" in " ".join(checkpoint.notes)
    vit = ViT(checkpoint.config).eval()
    load_state(vit, checkpoint.state, "here")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        assert (vit(images, patches=True).patches.mean(dim=1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("architecture", "patch", "prefix"),
    [
        ("vit_base_patch16_224", 16, 1),
        ("deit_small_distilled_patch16_224", 16, 2),
        ("vit_small_patch14_reg4_dinov2", 14, 0),
    ],
)
def test_positions_of_another_size_are_those_of_timm(
    tmp_path: Path, architecture: str, patch: int, prefix: int
) -> None:
    of_timm(architecture)(tmp_path, 4 * patch)
    checkpoint = load_checkpoint(tmp_path)
    vit = ViT(checkpoint.config)
    load_state(vit, checkpoint.state, "here")
    for grid in ((6, 6), (3, 3), (2, 7)):
        resized = vit.resized((grid[0] * patch, grid[1] * patch)).state_dict()["pos_embed"]
        expected = resample_abs_pos_embed(checkpoint.state["pos_embed"], grid, (4, 4), prefix)
        torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)
        assert torch.equal(resized[:, :prefix], checkpoint.state["pos_embed"][:, :prefix])


def test_a_fine_tuned_clip_keeps_its_head_and_a_plain_one_has_a_projection(tmp_path: Path) -> None:
    for projects in (False, True):
        of_timm("vit_base_patch16_clip_224", projects=projects)(tmp_path, 32)
        checkpoint = load_checkpoint(tmp_path)
        assert (checkpoint.projection is not None) == projects
        assert (checkpoint.config.num_classes == 0) == projects


def test_a_distilled_network_says_that_timms_features_are_others(tmp_path: Path) -> None:
    of_timm("deit_small_distilled_patch16_224", num_classes=0)(tmp_path, 32)
    checkpoint = load_checkpoint(tmp_path)
    (note,) = (note for note in checkpoint.notes if "distilled" in note)
    assert "mean of CLS and the distillation token" in note
    model = randomise(timm_model("deit_small_distilled_patch16_224", 32, num_classes=0), 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():  # what the note says of timm holds
        tokens = model.forward_features(images)
        torch.testing.assert_close(model(images), tokens[:, :2].mean(dim=1))
        assert (model(images) - tokens[:, 0]).abs().max() > 0.01
    of_timm("vit_base_patch16_224")(tmp_path, 32)
    assert not any("distilled" in note for note in load_checkpoint(tmp_path).notes)
