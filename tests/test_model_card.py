"""The model card: it says what the model is, and the code that it prints runs."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitembed import model_card
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig
from vitembed.weights import timm_arguments

SMALL = ViTConfig(image_size=(16, 24), patch_size=8, width=32, depth=2, heads=2)


def saved(folder: Path, pooling: str = "cls", dim: int | None = None, grey: bool = False, **changes: Any) -> Embedder:
    """Save a model in which no parameter is zero, and return it."""
    preprocess = Preprocess.grey((16, 24)) if grey else Preprocess((16, 24))
    config = dataclasses.replace(SMALL, channels=preprocess.channels, **changes)
    model = Embedder.create(config, preprocess=preprocess, pooling=pooling, dim=dim, device="cpu")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def code_blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card(folder), flags=re.DOTALL)


SETTINGS: dict[str, dict[str, Any]] = {
    "linear patches": {},
    "projection": {"dim": 6},
    "grey, mean of the patches": {"pooling": "mean", "grey": True},
    "mean of the patches, projection": {"pooling": "mean", "dim": 6},
    "head for classes": {"num_classes": 3},
    "head for classes, projection": {"num_classes": 3, "dim": 6},
    "distilled": {"distilled": True},
    "distilled, projection": {"distilled": True, "dim": 6},
    "registers, LayerScale, SwiGLU": {
        "registers": 2,
        "layer_scale": True,
        "mlp": "swiglu",
        "mlp_width": 44,
        "pooling": "mean",
    },
    "as CLIP": {"norm_pre": True, "mlp": "quick_gelu", "norm_eps": 1e-5, "dim": 6},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_timm_loads_the_file_with_the_code_of_the_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, **SETTINGS[name])
    _, code = code_blocks(tmp_path)
    shape = (3, *model.network.input_shape)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"pixels": pixels}
    exec(code, names)
    vectors = names["vectors"].detach().numpy()
    assert np.ptp(vectors, axis=0).max() > 0.01
    np.testing.assert_allclose(vectors, model.embed_pixels(pixels), atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values())
def test_the_card_names_the_arguments_of_timm(settings: dict[str, Any]) -> None:
    changes = {key: value for key, value in settings.items() if key not in ("dim", "pooling", "grey")}
    vit = dataclasses.replace(SMALL, **changes)
    wanted = timm_arguments(vit)
    texts = model_card._arguments(vit)
    assert texts.keys() == wanted.keys()
    for name in wanted.keys() - {"norm_layer", "mlp_layer"}:
        assert texts[name] == repr(wanted[name])


def test_the_code_of_the_card_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "this folder")
    for number, name in enumerate(("a.jpg", "b.jpg")):
        Image.fromarray(np.full((20, 20, 3), 100 * number, dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_blocks(tmp_path / "this folder")[0], names)
    np.testing.assert_allclose(names["vectors"], model.encode(["a.jpg", "b.jpg"]), atol=1e-5)


def test_saving_needs_no_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    saved(tmp_path, mlp="swiglu", layer_scale=True)
    assert "mlp_layer=SwiGLUPacked" in card(tmp_path)


def test_the_card_says_what_is_not_as_in_the_paper(tmp_path: Path) -> None:
    saved(tmp_path, "mean", 6, merge=2, registers=4, layer_scale=True, mlp="swiglu", norm_pre=True, num_classes=3)
    text = " ".join(card(tmp_path).split())
    for words in (
        "4 register tokens, LayerScale, SwiGLU, a LayerNorm before the blocks, a head for 3 classes",
        "16 x 24 RGB images to unit vectors of 6 numbers (the mean of the patch tokens, through a linear projection)",
        "Each block but the last merges 2 tokens away",
        "timm merges no tokens: its vectors are those of merge=0",
    ):
        assert words in text


def test_the_card_of_a_plain_model_says_nothing_of_what_it_has_not(tmp_path: Path) -> None:
    saved(tmp_path)
    text = card(tmp_path)
    for word in ("register", "LayerScale", "merge", "projection", "distillation", "LayerNorm", "None"):
        assert word not in text


def test_the_card_says_why_timm_cannot_load_a_convolutional_stem(tmp_path: Path) -> None:
    model = Embedder.create("N/4", preprocess=Preprocess((16, 16)), stem="conv", device="cpu")
    model.save_pretrained(tmp_path)
    assert "a convolutional stem with patches of 4 pixels" in " ".join(card(tmp_path).split())
    assert "timm cannot load this model: timm has no ViT with a convolutional stem" in card(tmp_path)
    assert len(code_blocks(tmp_path)) == 1


class Means(nn.Module):
    """A foreign backbone that timm does not know."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_the_card_of_a_foreign_backbone_names_it(tmp_path: Path) -> None:
    Embedder.from_module(Means(), Preprocess((16, 16)), dim=2, device="cpu").save_pretrained(tmp_path)
    assert f"A network of the class {Means.__module__}.Means (6 parameters)" in " ".join(card(tmp_path).split())
    assert "Transformer" not in card(tmp_path)
    assert "module=..." in card(tmp_path)


def test_the_card_says_how_timm_builds_its_own_network(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file

    Embedder.create("timm:resnet10t", preprocess=Preprocess.grey((32, 32)), device="cpu").save_pretrained(tmp_path)
    assert "timm's resnet10t" in card(tmp_path)
    (call,) = re.findall(r"`(timm\.create_model\(.*?\))`", card(tmp_path))
    eval(call, {"timm": timm}).load_state_dict(load_file(tmp_path / "model.safetensors"))
