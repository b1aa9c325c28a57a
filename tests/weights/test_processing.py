"""Pre-processing of other libraries' configurations gives the pixels that those libraries' own code gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image

from vitembed.errors import CheckpointError
from vitembed.preprocess import Preprocess
from vitembed.weights import load_checkpoint
from vitembed.weights.processing import from_open_clip, from_timm, from_torchvision, from_transformers

SHAPES = [(90, 61), (57, 110), (64, 64)]  # (height, width)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.4, 0.3)}


def picture(shape: tuple[int, int]) -> Image.Image:
    """Return smooth noise: a resampling filter that is another one shows."""
    pixels = np.random.default_rng(sum(shape)).integers(0, 256, (shape[0] // 4, shape[1] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def normalised(preprocess: Preprocess, image: Image.Image) -> np.ndarray:
    pixels = preprocess(image).astype(np.float64) / 255
    return (pixels - np.reshape(preprocess.mean, (-1, 1, 1))) / np.reshape(preprocess.std, (-1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resized", [32, 37, 40])
def test_torchvision(shape: tuple[int, int], resized: int) -> None:
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=resized, **HALF)
    image = picture(shape)
    np.testing.assert_allclose(normalised(from_torchvision(preset), image), preset(image), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.9, 0.875, 0.95])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_timm(shape: tuple[int, int], share: float, mode: str) -> None:
    settings = {"input_size": (3, 32, 32), "crop_pct": share, "crop_mode": mode, "interpolation": "bicubic", **HALF}
    transform = timm.data.create_transform(**settings)
    image = picture(shape)
    preprocess, notes = from_timm(settings, "here")
    assert preprocess is not None
    assert notes == []
    np.testing.assert_allclose(normalised(preprocess, image), transform(image), atol=1e-6)


def test_timm_defaults_and_oddities() -> None:
    assert from_timm({}, "here") == (Preprocess(crop_share=0.875), [])
    preprocess, notes = from_timm({"crop_mode": "border", "mean": [0.5] * 3}, "here")
    assert preprocess is not None
    assert (preprocess.resize, preprocess.fill) == ("pad", 128)
    assert "border" in notes[0]
    assert from_timm({"input_size": (5, 32, 32)}, "here")[0] is None
    grey, _ = from_timm({"input_size": (1, 32, 32)}, "here")
    assert grey is not None
    assert (grey.mode, grey.mean) == ("L", (pytest.approx(0.449),))
    with pytest.raises(CheckpointError, match="crop mode 'round'"):
        from_timm({"crop_mode": "round"}, "here")
    with pytest.raises(CheckpointError, match="unknown interpolation 'random'"):
        from_timm({"interpolation": "random"}, "here")


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 48}, "resample": 3}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_mean": [127.5] * 3}),
    ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_transformers(tmp_path: Path, kind: str, settings: dict[str, Any], shape: tuple[int, int]) -> None:
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    preprocess, notes = from_transformers(saved, "vit", "here")
    assert notes == []
    image = picture(shape)
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    spread = 255 * np.abs(normalised(preprocess, image) - theirs) * np.reshape(preprocess.std, (-1, 1, 1))
    assert spread.max() < 3.1  # levels of 255: their torch backend rounds other than Pillow here and there
    assert spread.mean() < 0.6


def test_old_files_of_transformers_say_less() -> None:
    old_vit = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "image_mean": [0.485, 0.456, 0.406]}
    preprocess, _ = from_transformers(old_vit, "vit", "here")
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == ((224, 224), "squash", "bilinear")
    assert preprocess.mean == (0.485, 0.456, 0.406)
    old_clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    preprocess, _ = from_transformers(old_clip, "clip", "here")
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == ((224, 224), "crop", "bicubic")
    assert from_transformers({}, "clip", "here")[0] == preprocess
    assert from_transformers({}, "vit", "here")[0].resize == "squash"


def test_what_transformers_does_and_we_cannot_is_said() -> None:
    size = {"shortest_edge": 256}
    assert "keeps the long side" in from_transformers({"size": size, "do_center_crop": False}, "clip", "here")[1][0]
    assert "does not resize" in from_transformers({"do_resize": False}, "clip", "here")[1][0]
    assert "pads" in from_transformers({"size": {"shortest_edge": 100}}, "clip", "here")[1][0]
    for settings, message in [
        ({"resample": 9}, "resampling filter 9"),
        ({"size": {"longest_edge": 9}}, "image size that is not known"),
        ({"image_processor_type": "OddImageProcessor", "size": 224}, "not known: Odd"),
        ({"image_std": [0.0] * 3}, "std must be above 0"),
        ({"size": {"height": 64, "width": 32}, "do_center_crop": True, "crop_size": 16}, "the same share"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            from_transformers(settings, "vit", "here")


def test_open_clip() -> None:
    plain = from_open_clip({}, (224, 224), "here")[0]
    assert plain.mean == from_transformers({}, "clip", "here")[0].mean
    assert (plain.resize, plain.interpolation, plain.size) == ("crop", "bicubic", (224, 224))
    assert from_open_clip({"resize_mode": "squash"}, (224, 224), "here")[0].resize == "squash"
    assert from_open_clip({"resize_mode": "longest"}, (224, 224), "here")[0].resize == "pad"
    with pytest.raises(CheckpointError, match="resize mode 'odd'"):
        from_open_clip({"resize_mode": "odd"}, (224, 224), "here")


@pytest.mark.parametrize("side", [96, 112, 224, 384, 518])
def test_a_crop_share_that_was_read_gives_the_resized_side_back(side: int) -> None:
    for resized in range(side, 3 * side):
        settings = {"size": {"shortest_edge": resized}, "crop_size": side}
        assert from_transformers(settings, "clip", "here")[0]._whole((1, 1)) == (resized, resized)


JUNK: list[Any] = ["x", [1], 0.5, {"a": 1}, [[1, 2]], 1e400, 0, -1, True, []]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_nonsense_in_a_description_is_one_error_that_names_the_file(junk: Any) -> None:
    names = {
        from_transformers: "size crop_size resample image_mean image_std rescale_factor do_resize do_normalize",
        from_timm: "input_size crop_mode crop_pct mean std interpolation",
        from_open_clip: "size resize_mode mean std interpolation fill_color",
    }
    refusals = []
    for read, keys in names.items():
        for key in keys.split():
            between = {from_transformers: ("clip",), from_open_clip: ((32, 32),)}.get(read, ())
            try:
                read({key: junk}, *between, "the/file.json")  # some of it makes sense, such as a number for a size
            except CheckpointError as error:
                refusals.append(str(error))
    assert len(refusals) > 5
    assert all("the/file.json" in text and "\n" not in text for text in refusals)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "OddImageProcessor", "size": {"height": 32, "width": 32}},
        {"rescale_factor": "x"},
        {"rescale_factor": 0},
        {"resample": [1]},
        {"image_mean": 0.5},
    ],
    ids=str,
)
def test_a_malformed_processor_beside_the_weights_is_one_error_with_its_path(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is damaged") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"layer_norm_eps": "x"}, {"hidden_act": [1]}, {"image_size": {}}], ids=str)
def test_nonsense_beside_the_weights_is_one_error_with_its_path(tmp_path: Path, change: dict[str, Any]) -> None:
    save_clip(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)


def save_clip(folder: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)


def test_the_preprocessing_beside_the_weights_is_found(tmp_path: Path) -> None:
    save_clip(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert "without pre-processing" in " ".join(checkpoint.notes)
    assert checkpoint.preprocess == Preprocess((64, 64))
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 80}, "crop_size": 32}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    beside_a_tokenizer = load_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_checkpoint(tmp_path).preprocess == beside_a_tokenizer.preprocess
    preprocess = beside_a_tokenizer.preprocess
    assert preprocess is not None
    assert (preprocess.size, preprocess.crop_share) == ((32, 32), 0.4)
    assert beside_a_tokenizer.config.image_size == (64, 64)  # of the positions: the caller resamples them
    assert beside_a_tokenizer.notes == ("the positions are for (64, 64) pixels, the pre-processing gives (32, 32)",)


def test_an_open_clip_folder(tmp_path: Path) -> None:
    names = {"visual.class_embedding": (64,), "visual.positional_embedding": (5, 64), "visual.proj": (64, 8)}
    names |= {"visual.conv1.weight": (64, 3, 16, 16), "visual.transformer.resblocks.0.attn.in_proj_weight": (192, 64)}
    block = "visual.transformer.resblocks.0."
    names |= {f"{block}mlp.c_fc.weight": (128, 64), f"{block}mlp.c_proj.weight": (64, 128)}
    names |= {f"{block}attn.in_proj_bias": (192,), f"{block}mlp.c_fc.bias": (128,), f"{block}mlp.c_proj.bias": (64,)}
    names |= {f"{block}attn.out_proj.weight": (64, 64), f"{block}attn.out_proj.bias": (64,), "logit_scale": ()}
    norms = ("visual.ln_pre", "visual.ln_post", f"{block}ln_1", f"{block}ln_2")
    names |= {f"{norm}.{kind}": (64,) for norm in norms for kind in ("weight", "bias")}
    torch.save({name: torch.randn(shape) for name, shape in names.items()}, tmp_path / "open_clip_pytorch_model.bin")
    model = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32}}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps(config))
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.config.heads, checkpoint.config.mlp, checkpoint.config.norm_eps) == (2, "gelu", 1e-5)
    assert checkpoint.projection is not None
    assert tuple(checkpoint.projection.shape) == (8, 64)
    assert checkpoint.preprocess == Preprocess((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, fill=0)
    file.write_text(json.dumps({"model_cfg": {**model, "quick_gelu": True}}))
    assert load_checkpoint(tmp_path).config.mlp == "quick_gelu"
    for change in ({"timm_model_name": "x"}, {"pool_type": "avg"}, {"layers": [3, 4, 6, 3]}):
        file.write_text(json.dumps({"model_cfg": {"vision_cfg": {**model["vision_cfg"], **change}}}))
        with pytest.raises(CheckpointError, match="image tower that this ViT cannot express"):
            load_checkpoint(tmp_path)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="no model_cfg"):
        load_checkpoint(tmp_path)
