"""What two images share: the parts sum to the score, and the parts are those of a network worked out by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import ConfigError, ImageError, VectorError
from vitembed.explain import explain_pair
from vitembed.explain.pairs import frozen, patch_contributions
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT, ViTConfig

SMALL = ViTConfig(image_size=(8, 12), patch_size=4, width=16, depth=3, heads=2)
KINDS: list[dict[str, Any]] = [
    {},
    {"layer_scale": True},
    {"mlp": "quick_gelu", "norm_pre": True},
    {"mlp": "swiglu", "mlp_width": 24, "registers": 2},
    {"distilled": True, "num_classes": 3},
    {"stem": ((8, 2), (16, 2)), "norm_eps": 1e-2},
]
ADDED = (".bias", "cls_token", "dist_token", "reg_token", "pos_embed")  # parameters that are added, not multiplied


def network(config: ViTConfig, *, pooling: str = "cls", dim: int | None = None) -> EmbeddingNet:
    """Return a network in float64, none of whose parameters is left at 0 or 1."""
    torch.manual_seed(0)
    net = EmbeddingNet(ViT(config), mean=[0.5] * 3, std=[0.3] * 3, pooling=pooling, dim=dim)  # type: ignore[arg-type]
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.double().eval()


def two_images(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 12), dtype=np.uint8))


def embedder(net: EmbeddingNet) -> Embedder:
    return Embedder(net.float(), Preprocess((8, 12), mean=(0.5,) * 3, std=(0.3,) * 3), device="cpu")


def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in two_images()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("pooling", "dim"), [("cls", None), ("cls", 5), ("mean", None), ("mean", 5)])
def test_patches_and_all_that_is_added_beside_them_sum_to_the_score(
    kind: dict[str, Any], pooling: str, dim: int | None
) -> None:
    net = network(dataclasses.replace(SMALL, **kind), pooling=pooling, dim=dim)
    contributions, scores = patch_contributions(net, two_images())
    unit = net(two_images())
    torch.testing.assert_close(scores, (unit[0] @ unit[1]).expand(2).double(), atol=1e-6, rtol=0)

    # A function that is linear in the patches and in everything that is added is the sum of gradient times value.
    vit = net.vit
    with frozen(vit):
        out = vit(net.normalise(two_images()), patches=True)
    pooled = out.cls if pooling == "cls" else out.patches.mean(dim=1)
    pooled = pooled if net.projection is None else net.projection(pooled)
    length = pooled.detach().norm(dim=-1, keepdim=True)
    score = ((pooled / length)[0] * (pooled / length)[1].detach()).sum()
    outside = [p for name, p in vit.named_parameters() if name.endswith(ADDED) and not name.startswith("patch_embed")]
    gradients = torch.autograd.grad(score, outside, allow_unused=True)  # without use: the head, the last block's rest
    rest = sum((g * p).sum() for g, p in zip(gradients, outside, strict=True) if g is not None)
    assert abs(contributions[0].sum() + rest - score) < 1e-10
    assert abs(rest) > 1e-4, "nothing is left to be stated, so that nothing was tested"


def test_contributions_of_one_block_without_mlp_are_those_worked_out_by_hand() -> None:
    net = network(dataclasses.replace(SMALL, depth=1))
    vit, images = net.vit, net.normalise(two_images())
    vit.blocks[0].mlp.fc2.weight.data.zero_()
    found, _ = patch_contributions(net, two_images())
    block = vit.blocks[0]
    with torch.no_grad():
        out = vit(images, attentions=True)
        patches = vit.patch_embed(images)[0]  # (N, W)
        tokens = patches + vit.pos_embed[0, 1:]
        lengths, units = out.cls.norm(dim=-1), F.normalize(out.cls, dim=-1)
        before_norm = vit.cls_token[0, 0] + vit.pos_embed[0, 0] + block.mlp.fc2.bias
        before_norm = before_norm + block.attn(block.norm1(torch.cat(
            [(vit.cls_token[0] + vit.pos_embed[0, :1]), tokens])[None]))[0, 0]  # fmt: skip
        for j in range(6):
            normed = (patches[j] - patches[j].mean()) / (tokens[j].var(unbiased=False) + 1e-6).sqrt()
            value = block.attn.qkv.weight[32:] @ (normed * block.norm1.weight)
            heads = [out.attentions[0][0, h, 0, 1 + j] * value[8 * h : 8 * (h + 1)] for h in range(2)]
            written = block.attn.proj.weight @ torch.cat(heads)
            written = (written - written.mean()) / (before_norm.var(unbiased=False) + 1e-6).sqrt() * vit.norm.weight
            assert found[0, j].item() == pytest.approx((written @ units[1] / lengths[0]).item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_frozen_network_gives_what_it_always_gives_and_thaws_again(kind: dict[str, Any]) -> None:
    net = network(dataclasses.replace(SMALL, **kind))
    images = net.normalise(two_images()).requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = net.vit(images, patches=True)
        return out.cls, torch.autograd.grad(out.cls.square().sum(), images, allow_unused=True)[0]

    before, gradient = run()
    with frozen(net.vit) as patches:
        inside, cut = run()
    after, again = run()
    torch.testing.assert_close(inside, before)
    assert cut is None
    assert patches[0].requires_grad
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(again, gradient)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_maps_and_residuals_sum_to_the_cosine_of_the_embeddings(pooling: str) -> None:
    model = embedder(network(SMALL, pooling=pooling, dim=5))
    first, second = pictures()
    shared = explain_pair(model, first, second)
    vectors = model.encode([first, second])
    assert shared.score == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
    assert shared.first.shape == shared.second.shape == (2, 3)
    assert shared.first.sum() + shared.residual_first == pytest.approx(shared.score, abs=1e-12)
    assert shared.second.sum() + shared.residual_second == pytest.approx(shared.score, abs=1e-12)
    turned = explain_pair(model, second, first)
    np.testing.assert_allclose(turned.first, shared.second, atol=1e-6)
    np.testing.assert_allclose(turned.second, shared.first, atol=1e-6)


def test_an_image_shares_with_itself_the_same_on_both_sides() -> None:
    first, _ = pictures()
    shared = explain_pair(embedder(network(SMALL)), first, first)
    assert shared.score == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(shared.first, shared.second, atol=1e-7)


def test_the_mode_of_the_network_stays_and_dropping_out_has_no_say() -> None:
    model = embedder(network(dataclasses.replace(SMALL, drop_path=0.5)))
    expected = explain_pair(model, *pictures())
    model.network.train()
    model.network.requires_grad_(False)
    np.testing.assert_allclose(explain_pair(model, *pictures()).first, expected.first, atol=1e-7)
    assert model.network.training
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_a_pair_of_a_merging_model_is_that_of_the_network_without_merging() -> None:
    exact = embedder(network(SMALL))
    merging = exact.replace(merge=1)
    found, expected = explain_pair(merging, *pictures()), explain_pair(exact, *pictures())
    assert found.score == pytest.approx(expected.score, abs=1e-6)
    np.testing.assert_allclose(found.first, expected.first, atol=1e-6)
    assert merging.network.vit.config.merge == 1


def test_what_cannot_be_explained_is_refused() -> None:
    model = embedder(network(SMALL))
    with pytest.raises(ImageError, match="missing"):
        explain_pair(model, pictures()[0], "missing.png")
    model.network.vit.norm.weight.data[0] = float("nan")
    with pytest.raises(VectorError, match="NaN or infinity"):
        explain_pair(model, *pictures())
    foreign = Embedder.from_module(torch.nn.Conv2d(3, 4, 1), Preprocess((8, 8)), device="cpu")
    with pytest.raises(ConfigError, match="Conv2d"):
        explain_pair(foreign, *pictures())
