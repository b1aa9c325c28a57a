"""The folder of a saved model: whole or refused, and readable by timm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models import load_checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitembed import saved_model
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, VitembedError
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig
from vitembed.weights import load_state


def tiny(seed: int = 0, **changes: object) -> Embedder:
    settings = {"preprocess": Preprocess((16, 16)), "device": "cpu", "stem": "conv", "dim": 24, **changes}
    return Embedder.create("N/4", seed=seed, **settings)  # type: ignore[arg-type]


def picture(seed: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny(), tiny(seed=1)
    old.save_pretrained(tmp_path)
    monkeypatch.setattr(Path, "replace", _fail)
    with pytest.raises(VitembedError, match="No space left"):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert Embedder.from_pretrained(tmp_path).fingerprint == old.fingerprint
    new.save_pretrained(tmp_path)
    assert Embedder.from_pretrained(tmp_path).fingerprint == new.fingerprint
    assert len(list(tmp_path.iterdir())) == 3


def _fail(self: Path, target: Path) -> None:
    raise OSError(28, "No space left on device", str(self))


def test_weights_alone_are_a_whole_model(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "README.md").unlink()
    assert Embedder.from_pretrained(tmp_path).fingerprint == model.fingerprint


def test_an_edited_config_is_refused_not_ignored(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["pooling"] = "mean"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'pooling' differs"):
        Embedder.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        Embedder.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="delete it"):
        Embedder.from_pretrained(tmp_path)


def test_a_kill_between_the_files_leaves_a_model_that_loads(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    stale = (tmp_path / "config.json").read_text()
    new = tiny(pooling="mean", dim=7)
    new.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(stale)
    assert Embedder.from_pretrained(tmp_path).fingerprint == new.fingerprint


def test_the_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_damaged_weights_are_one_clear_error(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for content, words in [
        (whole[:-1], "damaged or no safetensors"),
        (b"", "damaged or no safetensors"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "fingerprint"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            Embedder.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        Embedder.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="vitembed train"):
        Embedder.from_pretrained(tmp_path / "missing")


def test_files_of_others_and_other_formats_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no description"):
        Embedder.from_pretrained(tmp_path)
    for header, words in (
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ("{}", "has format None"),
        ('{"format": 1}', "has format 1; this vitembed reads 2: load it with the vitembed that wrote it"),
        ('{"format": 3}', "has format 3"),
        ('{"format": 2}', "lacks backbone, dim, fingerprint"),
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"vitembed": header})
        with pytest.raises(CheckpointError, match=words):
            Embedder.from_pretrained(tmp_path)


def test_a_mismatch_names_both_sides(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"-weight \(3, 2\).*\+weight \(4, 2\), \+extra \(1,\)"):
        load_state(module, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)}, tmp_path)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create the folder"):
        tiny().save_pretrained(tmp_path / "file" / "model")


# What is written.


def content(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the description of a saved model."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["vitembed"])


def rewrite(folder: Path, header: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Save a model again with another description, and without its readable copy."""
    save_file(
        content(folder)[0] if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"vitembed": json.dumps(header)},
    )
    (folder / "config.json").unlink(missing_ok=True)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "registers": ({"registers": 2}, {"reg_tokens": 2, "no_embed_class": True}),
    "distilled": ({"distilled": True, "num_classes": 5}, {"num_classes": 5}),
    "SwiGLU": (
        {"layer_scale": True, "mlp": "swiglu", "mlp_width": 24},
        {"init_values": 1.0, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 1.5},
    ),
    "CLIP": ({"norm_pre": True, "mlp": "quick_gelu"}, {"pre_norm": True, "act_layer": "quick_gelu"}),
    "merging": ({"merge": 2}, {}),
}


@pytest.mark.parametrize("dim", [None, 7])
@pytest.mark.parametrize("option", OPTIONS)
def test_timm_loads_the_file_strictly_and_computes_the_same(tmp_path: Path, option: str, dim: int | None) -> None:
    ours, theirs = OPTIONS[option]
    config = ViTConfig((16, 24), 8, 3, 32, 2, 4, **ours)
    model = Embedder.create(config, preprocess=Preprocess((16, 24)), dim=dim, device="cpu")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    has_head = "num_classes" in ours
    settings = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    kind = VisionTransformerDistilled if "distilled" in ours else VisionTransformer
    peer = kind(**{**settings, "num_classes": dim or 0, **theirs}).eval()
    if has_head and dim:  # the head has its own name, so that the projection is left over
        state = content(tmp_path)[0]
        assert state.pop("projection.weight").shape == (7, 32)
        peer.load_state_dict(state)
    else:
        load_checkpoint(peer, str(tmp_path / "model.safetensors"), strict=True)
    pixels = torch.from_numpy(np.stack([model.preprocess(picture(i)) for i in range(3)]))
    x = model.network.normalise(pixels)
    with torch.no_grad():
        tokens = peer.forward_features(x)
        rows = tokens[:, 0] if has_head or not dim else peer.forward_head(tokens)
        if has_head and dim:
            rows = model.network.projection(rows)
        exact = model.replace(merge=0).embed_pixels(pixels)
        np.testing.assert_allclose(exact, nn.functional.normalize(rows, dim=1).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("pooling", "dim"), [("cls", None), ("cls", 7), ("mean", 7)])
def test_every_architecture_comes_back_to_the_bit(tmp_path: Path, option: str, pooling: Any, dim: int | None) -> None:
    config = ViTConfig((16, 24), 8, 3, 32, 2, 4, **OPTIONS[option][0])
    model = Embedder.create(config, preprocess=Preprocess((16, 24)), pooling=pooling, dim=dim, device="cpu")
    model.save_pretrained(tmp_path)
    loaded = Embedder.from_pretrained(tmp_path, device="cpu")
    assert loaded.network.vit.config == config
    assert loaded.fingerprint == model.fingerprint
    images = [picture(i) for i in range(3)]
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Embedder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# What is refused.


@pytest.mark.parametrize("junk", [None, 3, "x", [1, 2], {"a": 1}, -1, 0.5, True])
@pytest.mark.parametrize("key", ["vit", "backbone", "pooling", "dim", "preprocess", "fingerprint"])
def test_a_description_of_nonsense_is_one_clear_error(tmp_path: Path, key: str, junk: Any) -> None:
    foreign = Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32)), device="cpu")
    (foreign if key == "backbone" else tiny()).save_pretrained(tmp_path)
    header = content(tmp_path)[1]
    if junk == header[key]:
        return
    rewrite(tmp_path, {**header, key: junk})
    with pytest.raises(VitembedError):
        Embedder.from_pretrained(tmp_path)


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [1, 2], [[1, 2]], -1, 0.5, 1e400])
def test_an_architecture_of_nonsense_is_one_clear_error(tmp_path: Path, junk: Any) -> None:
    tiny().save_pretrained(tmp_path)
    header = content(tmp_path)[1]
    for group in ("vit", "preprocess"):
        for key, value in header[group].items():
            if value == junk:
                continue
            rewrite(tmp_path, {**header, group: {**header[group], key: junk}})
            with pytest.raises(VitembedError):
                Embedder.from_pretrained(tmp_path)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tensors, header = content(tmp_path)
    kept = tensors.pop("norm.weight")
    rewrite(tmp_path, header, tensors)
    with pytest.raises(CheckpointError, match=r"-backbone\.norm\.weight \(128,\)"):
        Embedder.from_pretrained(tmp_path)
    rewrite(tmp_path, header, {**tensors, "norm.weight": kept, "stray": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"\+backbone\.stray \(2,\)"):
        Embedder.from_pretrained(tmp_path)


def test_damage_is_told_from_another_kind_of_folder(tmp_path: Path) -> None:
    assert not saved_model.is_saved_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert not saved_model.is_saved_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not saved_model.is_saved_model(tmp_path)
    tiny().save_pretrained(tmp_path)
    assert saved_model.is_saved_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert saved_model.is_saved_model(tmp_path)


# Networks of others.


class Projecting(nn.Module):
    """A network whose tensors have the names of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.projection(x.mean(dim=(2, 3))))
        return result


@pytest.mark.parametrize("dim", [None, 5])
def test_a_network_of_timm_is_saved_and_loaded_by_name(tmp_path: Path, dim: int | None) -> None:
    model = Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32)), dim=dim, device="cpu")
    model.save_pretrained(tmp_path)
    loaded = Embedder.from_pretrained(tmp_path, device="cpu")
    images = [picture(i) for i in range(3)]
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))
    assert loaded.fingerprint == model.fingerprint
    state = content(tmp_path)[0]
    state.pop("projection.weight", None)
    timm.create_model("test_resnet", num_classes=0).load_state_dict(state)  # strictly


@pytest.mark.parametrize("dim", [None, 5])
def test_a_network_of_ones_own_is_saved_and_loaded_with_the_module(tmp_path: Path, dim: int | None) -> None:
    torch.manual_seed(0)
    model = Embedder.from_module(Projecting(), Preprocess((16, 16)), dim=dim, device="cpu")
    model.save_pretrained(tmp_path)
    loaded = Embedder.from_pretrained(tmp_path, module=Projecting(), device="cpu")
    images = [picture(i) for i in range(3)]
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))
    assert loaded.fingerprint == model.fingerprint
    with pytest.raises(ConfigError, match=r"Projecting, which only you can build.*module="):
        Embedder.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit"):
        Embedder.from_pretrained(tmp_path, module=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)))


def test_a_module_without_a_place_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    other = tmp_path / "other.pth"
    torch.save(tiny().network.vit.state_dict(), other)
    with pytest.raises(ConfigError, match="no place for a Projecting"):
        Embedder.from_pretrained(tmp_path, module=Projecting())
    with pytest.raises(ConfigError, match="a module goes with a model that save_pretrained saved"):
        Embedder.from_pretrained(other, module=Projecting())


def test_heads_that_contradict_the_saved_model_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert Embedder.from_pretrained(tmp_path, heads=4).network.vit.config.heads == 4
    with pytest.raises(ConfigError, match="says that it has 4 heads; got heads=2"):
        Embedder.from_pretrained(tmp_path, heads=2)


def test_tied_weights_are_saved_as_copies(tmp_path: Path) -> None:
    config = ViTConfig((16, 16), 8, 3, width=16, depth=2, heads=2)
    model = Embedder.create(config, preprocess=Preprocess((16, 16)), device="cpu")
    blocks = model.network.vit.blocks
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight
    model.save_pretrained(tmp_path)
    assert Embedder.from_pretrained(tmp_path).fingerprint == model.fingerprint
