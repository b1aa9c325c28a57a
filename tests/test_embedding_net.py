"""The tensor side of an embedder, with a ViT of ours and with the networks of others."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitembed.embedding_net import EmbeddingNet, ForeignBackbone
from vitembed.errors import ConfigError, MissingExtraError
from vitembed.vit import ViT, ViTConfig

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def network(pooling: Any = "cls", dim: int | None = None, **changes: Any) -> EmbeddingNet:
    torch.manual_seed(0)
    vit = ViT(ViTConfig((16, 24), 8, 3, 32, 2, 4, **changes))
    if vit.head is not None:
        nn.init.normal_(vit.head.weight)
    return EmbeddingNet(vit, mean=MEAN, std=STD, pooling=pooling, dim=dim).eval()


def pixels(count: int = 3, size: tuple[int, int] = (16, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


class Average(nn.Module):
    """A stranger's network: the mean of each channel, and what a test wants of it."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x.mean(dim=(2, 3))) -> None:
        super().__init__()
        self.change = change
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Any:
        self.seen.append(tuple(x.shape))
        return self.change(self.norm(x))


# A ViT of ours.


@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"distilled": True}])
@pytest.mark.parametrize("dim", [None, 5])
def test_an_embedding_is_what_its_parts_say(dim: int | None, changes: dict[str, Any]) -> None:
    x = (pixels() / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for pooling in ("cls", "mean"):
        net = network(pooling, dim, **changes)
        out = net.vit(x, patches=True)
        pooled = out.cls if pooling == "cls" else out.patches.mean(dim=1)  # of patches alone, not of registers
        if net.projection is not None:
            pooled = pooled @ net.projection.weight.T
        expected = F.normalize(pooled, dim=1)
        torch.testing.assert_close(net(pixels()), expected, rtol=0, atol=1e-5)
        assert net.dim == expected.shape[1]
        assert net.input_shape == (3, 16, 24)


def test_mean_pooling_counts_a_merged_token_for_each_of_its_patches() -> None:
    exact, merging = network("mean"), network("mean", merge=2)
    merging.load_state_dict(exact.state_dict())
    with torch.no_grad():
        out = merging.vit(merging.normalise(pixels()), patches=True)
        assert out.patches.shape == (3, 6, 32)
        expected = F.normalize(out.patches.mean(dim=1), dim=1)
        torch.testing.assert_close(merging(pixels()), expected, rtol=0, atol=1e-6)
        assert (merging(pixels()) * exact(pixels())).sum(dim=1).min() > 0.9


def test_logits_come_with_the_same_embedding() -> None:
    net = network(num_classes=4)
    rows, logits = net.forward_with_logits(pixels())
    torch.testing.assert_close(rows, net(pixels()))
    torch.testing.assert_close(logits, net.vit(net.normalise(pixels())).logits)
    assert network().forward_with_logits(pixels())[1] is None


def test_rows_are_float32_of_length_one_whatever_the_precision() -> None:
    net = network(dim=5)
    with torch.autocast("cpu", torch.bfloat16):
        rows = net(pixels())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        network("meen")
    with pytest.raises(ConfigError, match="dim must be at least 1"):
        network(dim=0)
    foreign = ForeignBackbone(Average(), image_size=(16, 24))
    with pytest.raises(ConfigError, match="pools by itself"):
        EmbeddingNet(foreign, mean=MEAN, std=STD, pooling="mean")


# Networks of others.


@pytest.mark.parametrize("name", ["test_resnet", "resnet10t"])
def test_a_network_of_timm_stands_in(name: str) -> None:
    torch.manual_seed(0)
    backbone = ForeignBackbone.of_timm(name, image_size=(32, 32))
    net = EmbeddingNet(backbone, mean=MEAN, std=STD).eval()
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        expected = F.normalize(peer(net.normalise(pixels(2, (32, 32)))), dim=1)
        torch.testing.assert_close(net(pixels(2, (32, 32))), expected, rtol=0, atol=1e-6)
    assert (net.dim, net.input_shape) == (peer.num_features, (3, 32, 32))


def test_a_transformer_of_timm_is_built_for_the_size_and_channels() -> None:
    backbone = ForeignBackbone.of_timm("test_vit", image_size=(32, 48), channels=1)
    assert backbone(torch.zeros(2, 1, 32, 48)).shape == (2, backbone.width)


def test_a_map_of_features_is_averaged() -> None:
    backbone = ForeignBackbone(Average(lambda x: x), image_size=(4, 6)).eval()
    x = torch.randn(2, 3, 4, 6)
    assert backbone.width == 3
    torch.testing.assert_close(backbone(x), backbone.module.norm(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.flatten(2), r"\(B, W\) or \(B, W, h, w\); Average gave \(1, 3, 24\)"),
        (lambda x: {"features": x}, "Average gave dict"),
        (lambda x: (x, x), "Average gave tuple"),
        (lambda x: x @ x, r"the backbone Average does not take images of 3 x 4 x 6: "),
    ],
)
def test_what_gives_no_features_is_refused_and_left_as_it_was(change: Callable[[Tensor], Any], words: str) -> None:
    module = Average(change).train()
    with pytest.raises(ConfigError, match=words):
        ForeignBackbone(module, image_size=(4, 6))
    assert module.training
    assert module.norm.training


def test_the_trial_changes_neither_statistics_nor_modes() -> None:
    module = Average().train()
    module.norm.eval()  # a frozen batch norm in a network that trains
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    backbone = ForeignBackbone(module, image_size=(4, 6))
    assert (backbone.training, module.training, module.norm.training) == (True, True, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.seen == [(1, 3, 4, 6)]


def test_what_timm_does_not_know_or_cannot_build_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet10'; did you mean '"):
        ForeignBackbone.of_timm("resnet10", image_size=(32, 32))
    with pytest.raises(ConfigError, match=r"timm\.list_models"):
        ForeignBackbone.of_timm("?", image_size=(32, 32))
    with pytest.raises(ConfigError, match="3 x 8 x 8"):
        ForeignBackbone.of_timm("vit_tiny_patch16_224", image_size=(8, 8))


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitembed\["):
        ForeignBackbone.of_timm("resnet10t", image_size=(32, 32))


def test_a_description_rebuilds_the_backbone_or_asks_for_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = ForeignBackbone.of_timm("test_resnet", image_size=(32, 32), channels=1)
    again = ForeignBackbone.from_description(known.describe(), None)
    assert again.describe() == known.describe()
    own = ForeignBackbone(Average(), image_size=(4, 6)).describe()
    with pytest.raises(ConfigError, match=r"is a .*Average, which only you can build.*module=\.\.\."):
        ForeignBackbone.from_description(own, None)
    module = Average()
    assert ForeignBackbone.from_description(own, module).module is module


def test_what_needs_a_vit_says_so() -> None:
    net = EmbeddingNet(ForeignBackbone(Average(), image_size=(4, 6)), mean=MEAN, std=STD)
    for use in (lambda: net.vit, lambda: net.forward_with_logits(pixels(1, (4, 6)))):
        with pytest.raises(ConfigError, match=r"this needs a ViT of vitembed.*Average"):
            use()
