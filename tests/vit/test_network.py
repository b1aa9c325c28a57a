"""The ViT against its peers at random weights, and against itself."""

import dataclasses
import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from vitembed.errors import ConfigError, VectorError
from vitembed.vit import ViT, ViTConfig, conv_stem
from vitembed.vit.layers import LayerScale, Mlp


def small(**changes: Any) -> ViTConfig:
    return dataclasses.replace(ViTConfig(image_size=(16, 24), patch_size=8, width=32, depth=3, heads=4), **changes)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer a value that is not its default, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                scale = name.endswith(("running_var", "gamma")) or ("norm" in name and name.endswith("weight"))
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


@pytest.mark.parametrize("shape", [(2, 1, 16, 24), (2, 3, 24, 16), (3, 16, 24)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VectorError, match=r"\(B, 3, 16, 24\)"):
        ViT(small())(torch.zeros(shape))


# What came after the paper, against timm: each option by itself and together.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "registers": ({"registers": 3}, {"reg_tokens": 3, "no_embed_class": True}),
    "LayerScale": ({"layer_scale": True}, {"init_values": 1e-5}),
    "SwiGLU": (
        {"mlp": "swiglu", "mlp_width": 40},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 80 / 32},
    ),
    "a norm before": ({"norm_pre": True}, {"pre_norm": True}),
    "quick GELU": ({"mlp": "quick_gelu"}, {"act_layer": "quick_gelu"}),
    "a coarse norm": ({"norm_eps": 1e-2}, {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-2)}),
    "distillation": ({"distilled": True}, {}),
    "distillation and LayerScale": ({"distilled": True, "layer_scale": True}, {"init_values": 1.0}),
    "all of DINOv2's giant": (
        {"registers": 4, "layer_scale": True, "mlp": "swiglu", "mlp_width": 24},
        {
            "reg_tokens": 4,
            "no_embed_class": True,
            "init_values": 1.0,
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
            "mlp_ratio": 1.5,
        },
    ),
}


def pair_of(option: str, image_size: tuple[int, int] = (16, 24)) -> tuple[ViT, Any]:
    """Return our network and timm's with the same random weights."""
    ours, theirs = OPTIONS[option]
    kind = VisionTransformerDistilled if "distilled" in ours else VisionTransformer
    settings = {"img_size": image_size, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 4}
    peer = randomised(kind(**settings, **theirs))
    vit = ViT(small(image_size=image_size, num_classes=5, **ours)).eval()
    vit.load_state_dict(peer.state_dict())  # strictly: the names are timm's
    return vit, peer


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("image_size", [(16, 24), (32, 8)])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_timms(option: str, image_size: tuple[int, int], graph: bool) -> None:
    vit, peer = pair_of(option, image_size)
    images = draw(3, 3, *image_size)
    with torch.set_grad_enabled(graph):
        short, whole = vit(images), vit(images, patches=True)
        weighed = vit(images, attentions=True, patches=True)
        tokens, logits = peer.forward_features(images), peer(images)
    for out in (short, whole, weighed):
        torch.testing.assert_close(out.cls, tokens[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)
    for out in (whole, weighed):
        torch.testing.assert_close(out.patches, tokens[:, vit.config.prefix_tokens :], rtol=0, atol=1e-5)
    assert [a.shape[-1] for a in weighed.attentions] == [vit.config.prefix_tokens + vit.config.patches] * 3


def test_the_logits_of_a_distilled_network_are_the_mean_of_two_heads() -> None:
    vit, _ = pair_of("distillation")
    images, tokens = draw(2, 3, 16, 24), []
    assert vit.head is not None
    assert vit.head_dist is not None
    handle = vit.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    logits = vit(images).logits
    handle.remove()
    assert tokens[0].shape[1] == 2  # the last block ran for CLS and DIST alone
    torch.testing.assert_close(logits, (vit.head(tokens[0][:, 0]) + vit.head_dist(tokens[0][:, 1])) / 2)


@pytest.mark.parametrize(("kind", "theirs"), [("quick_gelu", "quick_gelu"), ("gelu", "gelu")])
@pytest.mark.parametrize("graph", [True, False])
def test_the_mlp_equals_that_of_transformers_clip(kind: Any, theirs: str, graph: bool) -> None:
    peer = CLIPMLP(CLIPVisionConfig(hidden_size=12, intermediate_size=20, hidden_act=theirs))
    ours = Mlp(12, 20, kind)
    ours.load_state_dict(peer.state_dict())
    x, shortcut = 3 * draw(2, 5, 12), draw(2, 5, 12, seed=1)
    with torch.set_grad_enabled(graph):
        torch.testing.assert_close(ours(x), peer(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(x, shortcut), shortcut + peer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_first_tokens_of_a_block_are_those_of_all(option: str) -> None:
    vit, _ = pair_of(option)
    block, x = vit.blocks[1], draw(2, 9, 32)
    bias = draw(2, 1, 1, 9, seed=1)
    with torch.no_grad():
        for count in (1, 2, 9):
            torch.testing.assert_close(block.first_tokens(x, count), block(x)[:, :count], rtol=0, atol=1e-5)
        biased = block.attn.with_keys(x, bias)[0][:, :2]
        torch.testing.assert_close(block.attn.first_tokens(x, 2, bias), biased, rtol=0, atol=1e-5)


class Adapter(nn.Linear):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def test_an_adapter_on_the_last_block_is_not_passed_by() -> None:
    torch.manual_seed(0)
    vit = randomised(ViT(small()))
    attention, images = vit.blocks[-1].attn, draw(2, 3, 16, 24)
    before = vit(images).cls
    attention.qkv = Adapter(32, 96)
    assert (vit(images).cls - before).abs().max() > 1e-3
    torch.testing.assert_close(vit(images).cls, vit(images, patches=True).cls, rtol=0, atol=1e-5)
    x = draw(2, 7, 32)
    torch.testing.assert_close(vit.blocks[-1].first_tokens(x, 2), vit.blocks[-1](x)[:, :2], rtol=0, atol=1e-5)


def test_a_hook_on_the_last_block_is_called() -> None:
    vit, images, calls = randomised(ViT(small())), draw(2, 3, 16, 24), []
    before = vit(images).cls
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    torch.testing.assert_close(vit(images).cls, before, rtol=0, atol=1e-6)
    assert calls == [(2, 7, 96)]


# Positions withheld: the network sees a set of patches.


def puzzled(images: Tensor, order: Tensor) -> Tensor:
    """Return the images with their 8 x 8 patches in another order."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, rows, columns, 8, 8)
    batch, channels, rows, columns = patches.shape[:4]
    shuffled = patches.reshape(batch, channels, rows * columns, 8, 8)[:, :, order]
    return shuffled.view(batch, channels, rows, columns, 8, 8).transpose(3, 4).reshape(images.shape)


@pytest.mark.parametrize("option", OPTIONS)
def test_without_positions_patches_move_with_the_picture_and_cls_stays(option: str) -> None:
    vit, _ = pair_of(option)
    images, order = draw(2, 3, 16, 24), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        out = vit(images, patches=True, positions=False)
        moved = vit(puzzled(images, order), patches=True, positions=False)
        placed = vit(puzzled(images, order), patches=True)
    torch.testing.assert_close(moved.cls, out.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.patches, out.patches[:, order], rtol=0, atol=1e-5)
    assert (placed.cls - out.cls).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["registers", "distillation", "SwiGLU"])
def test_without_positions_those_of_the_prefix_stay(option: str) -> None:
    vit, _ = pair_of(option)
    images, prefix = draw(2, 3, 16, 24), vit.config.prefix_positions
    with torch.no_grad():
        before = vit(images, positions=False).cls
        vit.pos_embed[:, prefix:] += 1
        assert torch.equal(vit(images, positions=False).cls, before)
        if prefix:
            vit.pos_embed[:, :prefix] += draw(1, prefix, 32)
            assert not torch.allclose(vit(images, positions=False).cls, before)


# Other image sizes.


@pytest.mark.parametrize("option", ["registers", "distillation", "a norm before"])
def test_a_resized_network_equals_timms_for_that_size(option: str) -> None:
    vit, peer = pair_of(option)
    peer.dynamic_img_size = peer.patch_embed.dynamic_img_pad = True  # timm then resamples positions as it goes
    peer.patch_embed.strict_img_size = peer.patch_embed.flatten = False
    peer.patch_embed.output_fmt = timm.layers.Format.NHWC
    other = vit.resized((32, 16))
    images = draw(2, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(images).cls, peer.forward_features(images)[:, 0], rtol=0, atol=1e-5)
    assert other.config == dataclasses.replace(vit.config, image_size=(32, 16))


def test_resizing_copies_all_else_and_shares_nothing() -> None:
    vit = randomised(ViT(small(registers=2, num_classes=3, stem=conv_stem(32, 8)))).double()
    vit.patch_dropout, vit.gradient_checkpointing = 0.5, True
    vit.blocks[0].requires_grad_(False)
    vit.pos_embed.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    same, other = vit.resized((16, 24)), vit.resized(32)
    assert other.pos_embed.shape == (1, 16, 32)
    for copy in (same, other):
        assert (copy.training, copy.patch_dropout, copy.gradient_checkpointing) == (False, 0.5, True)
        frozen = [name for name, parameter in copy.named_parameters() if not parameter.requires_grad]
        assert frozen == [name for name, parameter in vit.named_parameters() if not parameter.requires_grad]
        assert {tensor.dtype for tensor in copy.parameters()} == {torch.float64}
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_there_and_back_the_prefix_is_untouched() -> None:
    vit = randomised(ViT(small(distilled=True)))
    back = vit.resized((40, 64)).resized((16, 24))
    assert torch.equal(back.pos_embed[:, :2], vit.pos_embed[:, :2])
    assert not torch.equal(back.pos_embed, vit.pos_embed)
    back.pos_embed = vit.pos_embed
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), vit.parameters(), strict=True))
    with pytest.raises(ConfigError, match="multiples of the patch size 8"):
        vit.resized(20)


# What acts in training alone.


def test_patch_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    vit, images, lengths = randomised(ViT(small(registers=1))), draw(2, 3, 16, 24), []
    expected = vit(images).cls
    vit.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    vit.patch_dropout = 0.5
    assert torch.equal(vit(images).cls, expected)
    vit.train()
    assert not torch.allclose(vit(images).cls, expected)
    assert lengths == [8, 2 + 3]
    assert vit(images, patches=True).patches.shape == (2, 3, 32)


@pytest.mark.parametrize("patches", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(patches: bool) -> None:
    vit = randomised(ViT(small(drop_path=0.5, layer_scale=True))).train()
    images, gradients, calls = draw(4, 3, 16, 24), [], []
    vit.blocks[0].norm1.register_forward_hook(lambda module, inputs, output: calls.append(1))
    for vit.gradient_checkpointing in (False, True):
        torch.manual_seed(0)  # stochastic depth must draw the same branches the second time
        vit.zero_grad()
        out = vit(images, patches=patches)
        (out.patches if patches else out.cls).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None})
    assert len(calls) == 1 + 2  # with checkpoints a block runs twice
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()


def test_layer_scale_is_small_at_first_and_multiplies_channels() -> None:
    scale = LayerScale(3)
    assert torch.equal(scale(torch.ones(2, 3)), torch.full((2, 3), 1e-5))
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(scale(torch.ones(2, 3)), torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1))


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_reach_every_parameter_of_every_option(option: str) -> None:
    vit = ViT(small(num_classes=5, **OPTIONS[option][0])).train()
    for head in (vit.head, vit.head_dist):
        if head is not None:
            nn.init.normal_(head.weight)
    vit(draw(4, 3, 16, 24)).logits.square().mean().backward()
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None] == []


def test_building_an_empty_network_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ViT.empty(small())
    assert torch.equal(torch.get_rng_state(), state)
