"""Attention rollout against the paper's recipe as a plain loop."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.errors import VectorError
from vitembed.explain import attention_maps, attention_rollout
from vitembed.images import Preprocess


def attentions(batch: int = 3, depth: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, 5, 5, generator=generator).softmax(-1) for _ in range(depth)]


def test_rollout_is_that_of_the_paper() -> None:
    layers = attentions()
    found = attention_rollout(layers)
    for image in range(3):
        joint = np.eye(5)
        for layer in layers:
            mixed = 0.5 * layer[image].numpy().mean(axis=0) + 0.5 * np.eye(5)
            joint = mixed @ joint
        np.testing.assert_allclose(found[image], joint, atol=1e-6)


def test_rows_of_a_rollout_sum_to_one() -> None:
    torch.testing.assert_close(attention_rollout(attentions()).sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize("wrong", [[], [torch.zeros(2, 3, 4)], [torch.zeros(2, 1, 4, 5)]])
def test_other_shapes_are_refused(wrong: list[torch.Tensor]) -> None:
    with pytest.raises(VectorError, match="attentions must be"):
        attention_rollout(wrong)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_maps_have_the_grid_of_the_patches_and_at_most_the_whole_share(pooling: str) -> None:
    model = Embedder.create("N/4", preprocess=Preprocess((8, 12)), pooling=pooling, device="cpu")  # type: ignore[arg-type]
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    maps = attention_maps(model, images)
    assert maps.shape == (3, 2, 3)
    assert (maps >= 0).all()
    assert (maps.sum(axis=(1, 2)) < 1).all()
    np.testing.assert_allclose(attention_maps(model, images[1:2])[0], maps[1], atol=1e-6)
    assert attention_maps(model, []).shape == (0, 2, 3)
