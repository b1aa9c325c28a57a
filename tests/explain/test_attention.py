"""Attention rollout against the paper's recipe as a plain loop; attention distances against cases worked by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, VectorError
from vitembed.explain import (
    FUSIONS,
    attention,
    attention_distances,
    attention_maps,
    attention_rollout,
    mean_attention_distance,
    patch_distances,
)
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig

SMALL = ViTConfig(image_size=(8, 12), patch_size=4, width=16, depth=3, heads=2)


def attentions(batch: int = 3, depth: int = 4, heads: int = 2, tokens: int = 5, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(batch, heads, tokens, tokens, generator=generator) for _ in range(depth)]


def softmaxed(**sizes: int) -> list[torch.Tensor]:
    return [logits.softmax(-1) for logits in attentions(**sizes)]


def embedder(config: ViTConfig, pooling: str = "cls") -> Embedder:
    preprocess = Preprocess(config.image_size)
    return Embedder.create(config, preprocess=preprocess, pooling=pooling, device="cpu")  # type: ignore[arg-type]


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(count)]


def plain_rollout(layers: list[np.ndarray[Any, Any]], fusion: str, discard: float) -> np.ndarray[Any, Any]:
    """The docstring's words as a loop over one image's (heads, T, T) blocks."""
    tokens = layers[0].shape[-1]
    joint = np.eye(tokens)
    for layer in layers:
        fused = getattr(np, fusion)(layer, axis=0)
        for row in fused:
            order = sorted(range(1, tokens), key=lambda column: row[column])
            row[order[: int(discard * (tokens - 1) + 1e-9)]] = 0
        fused += np.eye(tokens)
        joint = fused / fused.sum(axis=1, keepdims=True) @ joint
    return joint


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("discard", [0.0, 0.25, 0.5, 0.9])
def test_rollout_is_the_recipe_as_a_plain_loop(fusion: Any, discard: float) -> None:
    layers = softmaxed(tokens=9)
    found = attention_rollout(layers, fusion=fusion, discard=discard)
    for image in range(3):
        expected = plain_rollout([layer[image].double().numpy() for layer in layers], fusion, discard)
        np.testing.assert_allclose(found[image], expected, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 12),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    depth=st.integers(1, 4),
    fusion=st.sampled_from(FUSIONS),
    discard=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_rows_of_every_rollout_sum_to_one(
    tokens: int, batch: int, heads: int, depth: int, fusion: Any, discard: float, seed: int
) -> None:
    layers = softmaxed(batch=batch, depth=depth, heads=heads, tokens=tokens, seed=seed)
    rollout = attention_rollout(layers, fusion=fusion, discard=discard)
    assert rollout.shape == (batch, tokens, tokens)
    assert (rollout >= 0).all()
    torch.testing.assert_close(rollout.sum(-1), torch.ones(batch, tokens))


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(2, 12), discard=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 9))
def test_discarding_spares_cls_and_leaves_each_row_another_token(tokens: int, discard: float, seed: int) -> None:
    (layer,) = softmaxed(batch=2, depth=1, heads=1, tokens=tokens, seed=seed)
    layer[..., 0] = 1e-4  # the weakest of all
    layer = layer / layer.sum(-1, keepdim=True)
    rollout = attention_rollout([layer], discard=discard) - torch.eye(tokens) / 2
    identity = torch.eye(tokens, dtype=torch.bool)
    assert (rollout[..., 0][:, 1:] > 0).all()
    assert ((rollout[..., 1:] > 1e-6) | identity[:, 1:]).any(-1).all()


def test_a_batch_is_explained_as_its_images_are_alone() -> None:
    layers = softmaxed()
    together = attention_rollout(layers, discard=0.5)
    for image in range(3):
        alone = attention_rollout([layer[image : image + 1] for layer in layers], discard=0.5)
        torch.testing.assert_close(alone[0], together[image])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_rollout_is_never_of_lower_precision_than_float32(dtype: torch.dtype) -> None:
    rollout = attention_rollout([layer.to(dtype) for layer in softmaxed()])
    assert rollout.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "wrong", [[], [torch.zeros(2, 3, 4)], [torch.zeros(2, 1, 4, 5)], [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3)]]
)
def test_other_shapes_are_refused(wrong: list[torch.Tensor]) -> None:
    with pytest.raises(VectorError, match="attentions must be"):
        attention_rollout(wrong)
    with pytest.raises(VectorError, match="attentions must be"):
        mean_attention_distance(wrong, torch.zeros(4, 4))


@pytest.mark.parametrize("discard", [-0.1, 1.0, float("nan")])
def test_settings_out_of_range_are_refused(discard: float) -> None:
    with pytest.raises(ConfigError, match=r"in \[0, 1\); got"):
        attention_rollout(softmaxed(), discard=discard)
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        attention_rollout(softmaxed(), fusion="meen")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size"):
        attention_maps(embedder(SMALL), noise(1), batch_size=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("tokens", [{}, {"registers": 3}, {"distilled": True}, {"registers": 2, "distilled": True}])
def test_maps_are_the_columns_of_the_patches_alone(pooling: str, tokens: dict[str, Any]) -> None:
    model = embedder(dataclasses.replace(SMALL, **tokens), pooling)
    images = noise(3)
    maps = attention_maps(model, images)
    assert maps.shape == (3, 2, 3)
    pixels = torch.from_numpy(np.stack([model.preprocess(image) for image in images]))
    with torch.no_grad():
        weights = model.network.vit(model.network.normalise(pixels), attentions=True).attentions
    prefix = weights[0].shape[-1] - 6
    for image in range(3):
        joint = plain_rollout([layer[image].double().numpy() for layer in weights], "mean", 0.0)
        row = joint[0] if pooling == "cls" else joint[prefix:].mean(axis=0)
        np.testing.assert_allclose(maps[image].ravel(), row[prefix:], atol=1e-6)
    np.testing.assert_allclose(attention_maps(model, images, batch_size=2), maps, atol=1e-6)
    assert attention_maps(model, []).shape == (0, 2, 3)
    assert (maps.sum(axis=(1, 2)) < 1).all()


def test_a_model_that_merges_tokens_is_explained_without_merging() -> None:
    exact = embedder(SMALL)
    merging = exact.replace(merge=1)
    np.testing.assert_allclose(attention_maps(merging, noise(2)), attention_maps(exact, noise(2)), atol=1e-6)
    assert merging.network.vit.config.merge == 1
    assert not np.allclose(merging.encode(noise(2)), exact.encode(noise(2)), atol=1e-7)


def test_no_more_images_are_held_than_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = embedder(SMALL), []
    expected = attention_maps(model, noise(5))
    model.network.vit.patch_embed.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    for images, sizes in ((0, [1] * 5), (2, [2, 2, 1]), (9, [5])):
        passes.clear()
        monkeypatch.setattr(attention, "MEMORY", images * 3 * 2 * 7**2 * 4)  # blocks, heads, tokens, bytes
        np.testing.assert_allclose(attention_maps(model, noise(5)), expected, atol=1e-6)
        assert passes == sizes


def test_explaining_leaves_the_network_in_the_mode_it_was_in() -> None:
    model = embedder(dataclasses.replace(SMALL, drop_path=0.5))
    expected = attention_maps(model, noise(1))
    model.network.train()
    np.testing.assert_array_equal(attention_maps(model, noise(1)), expected)
    assert model.network.training
    assert all(module.training for module in model.network.modules())


def test_a_foreign_backbone_is_refused_with_a_reason() -> None:
    class Colours(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    model = Embedder.from_module(Colours(), Preprocess((8, 8)), device="cpu")
    with pytest.raises(ConfigError, match="Colours"):
        attention_maps(model, noise(1))


def test_distances_between_patches_are_those_of_their_centres() -> None:
    found = patch_distances((2, 3), 4)
    assert found.shape == (6, 6)
    assert found[0, 5] == pytest.approx(4 * np.hypot(1, 2))
    assert found[1, 3] == pytest.approx(4 * np.sqrt(2))
    torch.testing.assert_close(found, found.T)


def test_uniform_attention_on_a_square_of_four_reaches_as_far_as_worked_by_hand() -> None:
    # From each corner: itself 0, two neighbours at 16, the opposite corner at 16 sqrt 2; a quarter of the sum.
    uniform = torch.full((2, 3, 5, 5), 0.2)
    found = mean_attention_distance([uniform, uniform], patch_distances((2, 2), 16))
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found, torch.full((2, 2, 3), 16 * (2 + 2**0.5) / 4))


def test_attention_to_oneself_reaches_nowhere_and_cls_does_not_count() -> None:
    own = torch.eye(5).expand(1, 1, 5, 5)
    apart = patch_distances((2, 2), 16)
    assert mean_attention_distance([own], apart).item() == 0.0
    half = own.clone() / 2
    half[..., 0] += 0.5  # half of the attention goes to CLS, which has no place
    half[..., 1, :] = torch.tensor([0.5, 0, 0.5, 0, 0])  # the first patch looks at its neighbour alone
    assert mean_attention_distance([half], apart).item() == pytest.approx(16 / 4)


def test_patches_that_look_at_no_patch_do_not_count() -> None:
    apart = patch_distances((1, 2), 10)
    only_cls = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]).expand(1, 1, 3, 3)
    assert mean_attention_distance([only_cls], apart).item() == 10.0
    nobody = torch.tensor([[1.0, 0, 0]] * 3).expand(1, 1, 3, 3)
    assert mean_attention_distance([nobody], apart).isnan().all()


def test_the_distances_must_fit_the_tokens() -> None:
    with pytest.raises(VectorError, match=r"5 tokens of which 2 .* \(3, 3\); got \(4, 4\)"):
        mean_attention_distance(softmaxed(), patch_distances((2, 2), 16), prefix_tokens=2)


@pytest.mark.parametrize("tokens", [{}, {"registers": 3, "distilled": True}])
def test_distances_of_a_model_are_the_mean_of_a_plain_loop(tokens: dict[str, Any]) -> None:
    model = embedder(dataclasses.replace(SMALL, **tokens))
    images = noise(3)
    found = attention_distances(model, images, batch_size=2)
    assert found.shape == (3, 2)
    pixels = torch.from_numpy(np.stack([model.preprocess(image) for image in images]))
    with torch.no_grad():
        layers = model.network.vit(model.network.normalise(pixels), attentions=True).attentions
    places = [(4 * row, 4 * column) for row in range(2) for column in range(3)]
    prefix = layers[0].shape[-1] - 6
    weights = layers[1][:, 1, prefix:, prefix:].double().numpy()  # of the second block's second head
    total = 0.0
    for image in range(3):
        for query in range(6):
            row = weights[image, query] / weights[image, query].sum()
            total += sum(w * np.hypot(*np.subtract(places[query], at)) for w, at in zip(row, places, strict=True))
    assert found[1, 1] == pytest.approx(total / 18, rel=1e-5)
    with pytest.raises(ConfigError, match="got none"):
        attention_distances(model, [])
