"""Files of weights: whole ones of every kind are read; empty, truncated, foreign and hostile ones are refused."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.parity import outputs
from vitembed.errors import CheckpointError, ConfigError
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT, ViTConfig
from vitembed.weights import load_checkpoint, load_state
from vitembed.weights.shapes import expected_shapes

CONFIG = ViTConfig(image_size=(32, 32), width=64, depth=2, heads=1, num_classes=3)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in ViT(CONFIG).state_dict().items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_a_bare_state_dict_is_read_and_says_what_it_did_not_know(
    tmp_path: Path, state: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"vit{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert checkpoint.state.keys() == state.keys()
    assert all(torch.equal(checkpoint.state[name], state[name]) for name in state)
    assert checkpoint.preprocess == Preprocess((32, 32))
    assert "without pre-processing" in " ".join(checkpoint.provenance["notes"])
    assert "how many heads" in " ".join(checkpoint.notes)
    assert json.loads(json.dumps(checkpoint.provenance))["source"] == str(path)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ViTConfig((28, 42), 14, 1, 64, 1, 2, 96, "swiglu", registers=4, layer_scale=True),
        ViTConfig((32, 32), 16, 3, 64, 1, 2, distilled=True, num_classes=4, norm_pre=True),
        ViTConfig((32, 32), 16, 3, 64, 1, 2, num_classes=4, head_width=8),
    ],
)
def test_the_expected_names_and_shapes_are_those_of_the_network(config: ViTConfig) -> None:
    assert expected_shapes(config) == {name: tuple(t.shape) for name, t in ViT(config).state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": t for name, t in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {name: -t for name, t in state.items()}, "model_ema": state},
        lambda state: {"state_dict": {f"_orig_mod.model.{name}": t for name, t in state.items()}},
        lambda state: {"state_dict": {f"model.backbone.{name}": t.half().float() for name, t in state.items()}},
    ],
)
def test_what_training_scripts_wrap_around_a_state_is_taken_off(
    tmp_path: Path, state: dict[str, Tensor], wrap: Any
) -> None:
    state = {name: tensor.half().float() for name, tensor in state.items()}
    checkpoint = load_checkpoint(saved(tmp_path / "run.pth", wrap(state)))
    assert all(torch.equal(checkpoint.state[name], state[name]) for name in state)


def test_the_choice_between_several_states_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    both = {"student": {name: -t for name, t in state.items()}, "teacher": state}
    checkpoint = load_checkpoint(saved(tmp_path / "run.pth", both))
    assert torch.equal(checkpoint.state["cls_token"], state["cls_token"])
    assert "read 'teacher' and left out 'student'" in checkpoint.notes


def test_student_and_teacher_in_one_state_give_the_teacher(tmp_path: Path, state: dict[str, Tensor]) -> None:
    flat = {f"student.backbone.{name}": -t for name, t in state.items()}
    flat |= {f"teacher.backbone.{name}": t for name, t in state.items()}
    flat |= {"teacher.dino_head.mlp.0.weight": torch.ones(2, 2)}
    checkpoint = load_checkpoint(saved(tmp_path / "run.pth", flat))
    assert torch.equal(checkpoint.state["cls_token"], state["cls_token"])
    assert {"left out: the student", "left out: the head of self-supervised training"} <= set(checkpoint.notes)


def test_two_models_in_one_state_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    flat = {f"{prefix}.{name}": t for name, t in state.items() for prefix in ("vit", "backbone")}
    with pytest.raises(CheckpointError, match="holds 2 image models"):
        load_checkpoint(saved(tmp_path / "two.pth", flat))


def test_unknown_parts_beside_and_inside_the_tower_are_refused_by_name(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    inside = {**state, "blocks.0.adapter.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"\+blocks\.0\.adapter\.weight \(3,\)"):
        load_checkpoint(saved(tmp_path / "inside.pth", inside))
    beside = {f"vit.{name}": t for name, t in state.items()} | {"neck.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"beside the image tower that no rule knows: neck\.weight \(3,\)"):
        load_checkpoint(saved(tmp_path / "beside.pth", beside))


def test_a_missing_parameter_and_a_wrong_shape_are_listed_on_both_sides(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    del state["norm.bias"]
    state["blocks.1.norm1.weight"] = torch.ones(7)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved(tmp_path / "vit.pth", state))
    assert "-blocks.1.norm1.weight (64,) +blocks.1.norm1.weight (7,), -norm.bias (64,)" in str(error.value)
    with pytest.raises(CheckpointError, match=r"-norm\.bias \(64,\)"):
        load_state(ViT(CONFIG), state, "here")


class Hostile:
    """What a hostile file holds: unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])
def test_a_pickle_that_would_run_code_does_not_run(
    tmp_path: Path, state: dict[str, Tensor], protocol: int | None
) -> None:
    target, path = tmp_path / "owned", tmp_path / "vit.pth"
    content = {**state, "extra": Hostile(target)}
    if protocol is None:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Hostile(target)}, protocol))
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load_checkpoint(path)
    assert not target.exists()
    if protocol is not None:  # the file is what it pretends to be: an ordinary reader runs it
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_a_whole_pickled_module_is_refused_with_its_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear|network\.ViT"):
        load_checkpoint(saved(tmp_path / "model.pth", ViT(CONFIG)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [1, 9, 100, 0.5, 0.99])
def test_a_truncated_file_is_one_error(tmp_path: Path, state: dict[str, Tensor], suffix: str, kept: float) -> None:
    path = tmp_path / f"vit{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    with pytest.raises(CheckpointError, match="damaged") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "no state dict but a dictionary of epoch"),
        ({}, "no state dict but a dictionary of nothing"),
        ([1, 2], "no state dict but a list"),
        ({"a": torch.ones(1), "b": 3}, "mixes tensors with other things"),
        ({"a": torch.ones(1), "b.c": torch.ones(2)}, "no ViT whose names are known"),
    ],
)
def test_a_file_without_a_vit_is_one_error(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved(tmp_path / "x.pth", content))


def test_empty_missing_and_unknown_files_are_one_error_each(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    (tmp_path / "weights.npz").write_bytes(b"PK")
    for name, message in {
        "empty.pth": "is empty",
        "missing.pth": "there is no file",
        "missing": "there is no model folder",
        "weights.npz": "expected .safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)


def test_folders_without_configuration_or_weights_are_one_error_each(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="pass the file itself"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for text, message in {
        "{": "cannot be read as JSON",
        "[]": "expected a JSON object",
        "{}": "neither transformers'",
        '{"model_type": "vit"}': "holds no weights",
        '{"model_type": "bert"}': "a 'bert' model of transformers",
        '{"model_type": "vit", "hidden_act": "relu"}': "activation 'relu'",
        '{"architecture": "resnet50"}': "timm's resnet50",
        '{"architecture": "vit_base_patch16_rope_ape_224"}': "timm's vit_base_patch16_rope_ape_224",
        '{"architecture": "vit_base_patch16_224", "global_pool": "map"}': "pools by 'map'",
    }.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["head.weight"] = state["head.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"holds head\.weight as torch\.int8"):
        load_checkpoint(saved(tmp_path / "vit.pth", state))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("resnet18", {}, "a convolutional network"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, "a hierarchical network"),
        ("convnext_atto", {}, "a hierarchical network"),
        ("beit_base_patch16_224", {}, "relative positions"),
        ("vit_base_patch16_siglip_224", {}, "attention pooling"),
        ("vit_medium_patch16_reg1_gap_256", {}, "after average pooling"),
        ("vit_medium_patch16_gap_240", {}, "without a CLS token"),
        ("vit_base_patch16_224", {"qk_norm": True}, "normalises queries and keys"),
        ("vit_base_patch16_18x2_224", {}, "parallel blocks"),
        ("vit_small_r26_s32_224", {}, "on top of a convolutional network"),
        ("vit_base_patch16_dinov3", {}, "without learned positions"),
        ("vit_intern300m_patch14_448", {}, r"-norm\.weight"),
        ("cait_xxs24_224", {"depth": 2}, r"\+blocks\.0\.attn\.proj_l"),
    ],
)
def test_what_the_architecture_cannot_express_is_named(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    small = {"depth": 1, "embed_dim": 192} if "vit" in architecture or "beit" in architecture else {}
    model = timm.create_model(architecture, **{**small, **({"num_heads": 3} if small else {}), **changes})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(saved(tmp_path / "x.pth", model.state_dict()))
    assert "can stand in as backbone" in str(error.value)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("BertModel", transformers.BertConfig, "a text model"),
        ("SiglipVisionModel", transformers.SiglipVisionConfig, "attention pooling"),
    ],
)
def test_other_models_of_transformers_are_named(tmp_path: Path, model: str, config: Any, message: str) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    getattr(transformers, model)(config(**small)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model of transformers, which this ViT cannot express"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.safetensors")


def test_heads_are_asked_for_where_no_rule_gives_them(tmp_path: Path) -> None:
    config = ViTConfig(image_size=(32, 32), width=96, depth=1, heads=4)
    path = saved(tmp_path / "vit.pth", ViT(config).state_dict())
    with pytest.raises(CheckpointError, match=r"width 96 is no multiple of 64; say how many.*heads="):
        load_checkpoint(path)
    assert load_checkpoint(path, heads=4).config == config
    with pytest.raises(CheckpointError, match="width must be a multiple of heads"):
        load_checkpoint(path, heads=7)
    with pytest.raises(ConfigError, match="heads must be a whole number"):
        load_checkpoint(path, heads=0)


def test_the_largest_models_have_the_heads_of_their_papers(tmp_path: Path) -> None:
    for width, heads in {192: 3, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}.items():
        config = ViTConfig(image_size=(16, 16), width=width, depth=1, heads=heads, mlp_width=8)
        path = saved(tmp_path / "vit.pth", ViT(config).state_dict())
        assert load_checkpoint(path).config.heads == heads


def test_a_size_that_is_no_square_is_asked_for_and_not_guessed(tmp_path: Path) -> None:
    for size in ((32, 64), (48, 32)):  # with CLS 9 positions, which might be 3 x 3 patches, and 7
        config = ViTConfig(image_size=size, width=64, depth=1, heads=1)
        path = saved(tmp_path / "vit.pth", ViT(config).state_dict())
        with pytest.raises(CheckpointError, match=r"Embedder\.from_pretrained\(\.\.\., image_size=\(height, width\)\)"):
            load_checkpoint(path)
        assert load_checkpoint(path, image_size=size).config == config
        with pytest.raises(CheckpointError, match="fit no image of 80 x 80"):
            load_checkpoint(path, image_size=80)


def test_linear_layers_without_bias_have_one_of_zeros(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=1, qkv_bias=False, proj_bias=False
    ).eval()
    checkpoint = load_checkpoint(saved(tmp_path / "vit.pth", model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(outputs(checkpoint, images)["cls"], model.forward_features(images)[:, 0])


def test_shards_of_an_index_are_read_together_and_only_from_its_folder(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    checkpoint = load_checkpoint(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixel_values=images).last_hidden_state[:, 0]
        torch.testing.assert_close(outputs(checkpoint, images)["cls"], expected, atol=1e-5, rtol=0)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_ = names = sorted(set(content["weight_map"].values()))
    assert names == sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    for target, message in (("../secret.safetensors", "outside its folder"), ("model-9.safetensors", "not there")):
        moved = {key: target if name == first else name for key, name in content["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_checkpoint(tmp_path)


def test_images_that_are_neither_rgb_nor_said_to_be_grey_have_no_preprocessing(tmp_path: Path) -> None:
    for channels in (1, 5):
        config = ViTConfig(image_size=(32, 32), channels=channels, width=64, depth=1, heads=1)
        checkpoint = load_checkpoint(saved(tmp_path / "vit.pth", ViT(config).state_dict()))
        assert checkpoint.preprocess is None
        assert "no pre-processing" in " ".join(checkpoint.notes)


def test_a_configuration_of_other_channels_than_the_weights_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(image_size=(32, 32), channels=1, width=64, depth=1, heads=1)
    save_file(ViT(config).state_dict(), tmp_path / "model.safetensors")
    settings = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 1}, "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="gives 3 channels, its patches take 1"):
        load_checkpoint(tmp_path)


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is going out of fashion
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*with the package clip and save model\.state_dict"):
        load_checkpoint(tmp_path / "ViT-B-32.pt")
