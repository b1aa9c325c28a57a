"""The ViT against its peers at random weights, and against itself."""

import dataclasses
import json

import pytest
import timm
import torch
import torchvision

from vitembed.errors import ConfigError, VectorError
from vitembed.vit import ViT, ViTConfig, conv_stem


def small(**changes: object) -> ViTConfig:
    return dataclasses.replace(ViTConfig(image_size=(16, 24), patch_size=8, width=32, depth=3, heads=4), **changes)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and buffer a value that is not its default, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                scale = name.endswith("running_var") or ("norm" in name and name.endswith("weight"))
                tensor.copy_(1 + noise.abs() if scale else noise)
    return module.eval()


# Parameter counts of the table: with the 1,000 classes of ImageNet, H/14 without.
@pytest.mark.parametrize(
    ("name", "timm_name", "num_classes", "millions"),
    [
        ("Ti/16", "vit_tiny_patch16_224", 1000, 5.72),
        ("S/16", "vit_small_patch16_224", 1000, 22.05),
        ("S/8", "vit_small_patch8_224", 1000, None),
        ("B/16", "vit_base_patch16_224", 1000, 86.57),
        ("B/32", "vit_base_patch32_224", 1000, None),
        ("L/16", "vit_large_patch16_224", 1000, 304.33),
        ("H/14", "vit_huge_patch14_224", 0, 630.76),
    ],
)
def test_parameter_counts_and_names_equal_timms(
    name: str, timm_name: str, num_classes: int, millions: float | None
) -> None:
    with torch.device("meta"):
        ours = ViT.from_config(name, num_classes=num_classes)
        theirs = timm.create_model(timm_name, num_classes=num_classes)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if millions is not None:
        assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("image_size", [(32, 32), (32, 48)])
def test_cls_patches_and_logits_equal_timms(image_size: tuple[int, int]) -> None:
    theirs = randomised(timm.create_model("vit_tiny_patch16_224", img_size=image_size, num_classes=7))
    ours = ViT(ViTConfig.named("Ti/16", image_size=image_size, num_classes=7)).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, *image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = ours(images, patches=True)
        tokens = theirs.forward_features(images)
        logits = theirs(images)
    torch.testing.assert_close(out.cls, tokens[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.patches, tokens[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)


def test_cls_equals_torchvisions() -> None:
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=5
    )
    randomised(theirs)
    ours = ViT(ViTConfig((32, 32), 16, 3, 64, 2, 4, mlp_width=128, num_classes=5)).eval()
    renamed = {
        "conv_proj": "patch_embed.proj",
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln": "norm",
        "heads.head": "head",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images).logits, theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", [(), ((8, 2), (16, 2), (16, 2))])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_shortened_last_block_changes_nothing(stem: tuple[tuple[int, int], ...], depth: int) -> None:
    vit = randomised(ViT(small(stem=stem, depth=depth)))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        short, whole = vit(images), vit(images, patches=True)
    torch.testing.assert_close(short.cls, whole.cls, rtol=0, atol=1e-6)
    assert short.patches is None
    assert short.attentions is None
    assert whole.patches is not None
    assert whole.patches.shape == (2, 6, 32)


def test_attentions_sum_to_one_and_change_nothing() -> None:
    vit = randomised(ViT(small()))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = vit(images, attentions=True)
        torch.testing.assert_close(out.cls, vit(images).cls, rtol=0, atol=1e-5)
    assert out.attentions is not None
    assert [a.shape for a in out.attentions] == [(2, 4, 7, 7)] * 3
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 7))


def test_with_and_without_a_graph_the_embedding_is_the_same() -> None:
    vit = randomised(ViT(small()))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = vit(images, patches=True)
    with_graph = vit(images, patches=True)
    assert with_graph.cls.requires_grad
    torch.testing.assert_close(with_graph.cls, without.cls, rtol=0, atol=1e-6)
    torch.testing.assert_close(with_graph.patches, without.patches, rtol=0, atol=1e-6)


def test_an_image_is_embedded_the_same_alone_and_in_a_batch() -> None:
    vit = randomised(ViT(small(stem=conv_stem(32, 8))))
    images = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = vit(images).cls
        alone = torch.cat([vit(image[None]).cls for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels: int) -> None:
    vit = ViT.from_config("N/4", image_size=(8, 16), channels=channels, stem="conv")
    assert vit(torch.zeros(2, channels, 8, 16)).cls.shape == (2, 128)


def test_gradients_reach_every_parameter_of_the_embedding() -> None:
    vit = ViT(small(stem=conv_stem(32, 8))).train()
    vit(torch.randn(4, 3, 16, 24), patches=True).patches.square().mean().backward()
    without = [name for name, parameter in vit.named_parameters() if parameter.grad is None]
    assert without == []


def test_the_mlp_head_is_a_tanh_layer_and_a_linear_one() -> None:
    vit = randomised(ViT(small(num_classes=5, head_width=9)))
    out = vit(torch.zeros(2, 3, 16, 24))
    assert vit.pre_logits is not None
    assert vit.head is not None
    expected = vit.head(torch.tanh(vit.pre_logits(out.cls)))
    torch.testing.assert_close(out.logits, expected)
    assert ViT(small())(torch.zeros(1, 3, 16, 24)).logits is None


def test_drop_path_acts_in_training_alone_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    vit = ViT(small(drop_path=0.5))
    images = torch.randn(1, 3, 16, 24)
    vit.eval()
    assert torch.equal(vit(images).cls, vit(images).cls)
    vit.train()
    assert not torch.equal(vit(images).cls, vit(images).cls)
    block = vit.blocks[-1]
    branch = torch.ones(20_000, 1, 1)
    assert block._drop(branch).mean().item() == pytest.approx(1, abs=0.03)


def test_conv_stems_have_the_stride_of_a_patch() -> None:
    for patch in (2, 4, 8, 16, 32):
        vit = ViT(small(image_size=(64, 64), patch_size=patch, stem=conv_stem(32, patch)))
        assert vit.patch_embed(torch.zeros(1, 3, 64, 64)).shape == (1, (64 // patch) ** 2, 32)


def test_a_configuration_survives_json() -> None:
    config = small(stem=conv_stem(32, 8), num_classes=3, head_width=8, drop_path=0.1, mlp_width=50)
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViTConfig(image_size=(224, 225)), "multiples of the patch size 16"),
        (lambda: ViTConfig(width=100, heads=3), "multiple of heads"),
        (lambda: ViTConfig(depth=0), "depth"),
        (lambda: ViTConfig(mlp_width=0), "mlp_width"),
        (lambda: ViTConfig(num_classes=-1), "num_classes"),
        (lambda: ViTConfig(drop_path=1.0), "drop_path"),
        (lambda: ViTConfig(stem=((8, 2),)), "multiply to the patch size 16"),
        (lambda: ViTConfig.named("S16"), "such as 'S/16'"),
        (lambda: ViTConfig.named("T/16"), "did you mean 'Ti'"),
        (lambda: ViTConfig.named("S/16", stem="convs"), "did you mean 'conv'"),
        (lambda: ViTConfig.from_dict({"dept": 3}), "did you mean 'depth'"),
        (lambda: conv_stem(32, 6), "2, 4, 8, 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(2, 1, 16, 24), (2, 3, 24, 16), (3, 16, 24)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VectorError, match=r"\(B, 3, 16, 24\)"):
        ViT(small())(torch.zeros(shape))
