"""Names: torchvision's enumerations, models of the hub through its cache without a network, our own folders."""

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torchvision
import transformers
from torch import Tensor

from benchmarks.parity import of_timm, outputs, randomise, torchvision_cls
from vitembed import weights
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, MissingExtraError, VitembedError
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT, ViTConfig
from vitembed.weights import load_checkpoint, load_weights, save_weights
from vitembed.weights.sources import describe_torchvision, resolve
from vitembed.weights.tensors import FILES, weights_in

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SWAG_LICENCE = "https://github.com/facebookresearch/SWAG/blob/main/LICENSE"

# Image size, resized side and interpolation of every entry, from torchvision's documentation.
TORCHVISION = {
    "vit_b_16:IMAGENET1K_V1": (224, 256, "bilinear"),
    "vit_b_16:IMAGENET1K_SWAG_E2E_V1": (384, 384, "bicubic"),
    "vit_b_16:IMAGENET1K_SWAG_LINEAR_V1": (224, 224, "bicubic"),
    "vit_b_32:IMAGENET1K_V1": (224, 256, "bilinear"),
    "vit_l_16:IMAGENET1K_V1": (224, 242, "bilinear"),
    "vit_l_16:IMAGENET1K_SWAG_E2E_V1": (512, 512, "bicubic"),
    "vit_l_16:IMAGENET1K_SWAG_LINEAR_V1": (224, 224, "bicubic"),
    "vit_l_32:IMAGENET1K_V1": (224, 256, "bilinear"),
    "vit_h_14:IMAGENET1K_SWAG_E2E_V1": (518, 518, "bicubic"),
    "vit_h_14:IMAGENET1K_SWAG_LINEAR_V1": (224, 224, "bicubic"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub, which is all that there is: no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repository: str, revision: str = "main") -> Path:
    """Return the folder of a model in the cache, laid out as the hub's library does it."""
    model = hub / f"models--{repository.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / revision).write_text(COMMIT)
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def save_vit(folder: Path) -> Any:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    model = randomise(transformers.ViTModel(config), 0)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [vision]\n---\n# Card\n")
    return model


def test_a_hub_model_is_read_from_the_cache_without_a_network(hub: Path) -> None:
    folder = cached(hub, "owner/some-vit")
    model = save_vit(folder)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixel_values=images).last_hidden_state[:, 0]
        for name in ("owner/some-vit", "hf-hub:owner/some-vit", f"hf-hub:owner/some-vit@{COMMIT}"):
            checkpoint = load_checkpoint(name)
            assert (checkpoint.source, checkpoint.revision, checkpoint.licence) == (name, COMMIT, "apache-2.0")
            torch.testing.assert_close(outputs(checkpoint, images)["cls"], expected, atol=1e-5, rtol=0)


def test_a_timm_model_of_the_hub_is_found_by_name_and_tag(hub: Path) -> None:
    folder = cached(hub, "timm/vit_base_patch16_224.augreg_in21k")
    of_timm("vit_base_patch16_224")(folder, 32)
    checkpoint = load_checkpoint("timm:vit_base_patch16_224.augreg_in21k")
    assert (checkpoint.family, checkpoint.config.image_size) == ("timm", (32, 32))


def test_timm_knows_the_tag_that_is_left_out(hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"timm/vit_small_patch14_dinov2\.lvd142m could not be had"):
        resolve("timm:vit_small_patch14_dinov2")
    with pytest.raises(CheckpointError, match="timm has no pre-trained weights for 'vit_nothing'"):
        resolve("timm:vit_nothing")


def test_without_timm_the_tag_must_be_given(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(CheckpointError, match="names no weights; say which"):
        resolve("timm:vit_small_patch14_dinov2")


@pytest.mark.parametrize("name", ["owner/absent", "hf-hub:owner/absent", "hf-hub:owner/absent@v2", "timm:vit.absent"])
def test_without_a_network_an_absent_model_is_one_line_that_says_what_to_do(hub: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not in the local cache.*pass its folder, or set HF_HOME") as error:
        load_checkpoint(name)
    assert "\n" not in str(error.value)


def test_an_unknown_repository_is_told_from_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    errors = huggingface_hub.errors
    for kind, message in {
        errors.RepositoryNotFoundError: "no public model of that name",
        errors.GatedRepoError: "only to those who ask",
        errors.RevisionNotFoundError: "no such revision",
    }.items():
        refusal = kind.__new__(kind)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint("owner/name")
    refusal = TimeoutError("read timed out\nwith details")
    with pytest.raises(CheckpointError, match="could not be had: read timed out; download it elsewhere"):
        load_checkpoint("owner/name")


def test_what_is_no_vit_is_refused_before_its_weights_are_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(hub, "owner/text")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    fetched = []
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: fetched.append(k["allow_patterns"]) or original(*a, **k)
    )
    with pytest.raises(CheckpointError, match="a 'llama' model of transformers"):
        load_checkpoint("owner/text")
    assert not any("safetensors" in pattern for patterns in fetched for pattern in patterns)


def test_safetensors_are_preferred_to_pickles_and_pickles_to_nothing(hub: Path) -> None:
    folder = cached(hub, "owner/old")
    save_vit(folder)
    state = load_checkpoint("owner/old").state
    (folder / "model.safetensors").rename(folder / "aside")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint("owner/old")
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(load_checkpoint("owner/old").state["cls_token"], state["cls_token"])
    (folder / "pytorch_model.bin").write_bytes(b"hostile")
    (folder / "aside").rename(folder / "model.safetensors")
    assert torch.equal(load_checkpoint("owner/old").state["cls_token"], state["cls_token"])


def test_what_is_fetched_is_what_a_folder_is_searched_for(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vit(cached(hub, "owner/bare"))
    (cached_file,) = (hub / "models--owner--bare").rglob("model.safetensors")
    cached_file.unlink()
    fetched: list[str] = []
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: fetched.extend(k["allow_patterns"]) or original(*a, **k)
    )
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint("owner/bare")
    assert [name for name in fetched if name in FILES] == list(FILES)
    assert {"model-*.safetensors", "pytorch_model-*.bin"} <= set(fetched)
    for name in reversed(FILES):  # best first
        (tmp_path / name).touch()
        assert weights_in(tmp_path).name == name


def test_a_folder_is_never_looked_for_on_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    save_vit(tmp_path / "owner" / "some-vit")
    assert load_checkpoint("owner/some-vit").revision is None
    for name in ("runs/2024/birds", "../other", "weights/vit.pth", "word", Path("owner/absent")):
        with pytest.raises(CheckpointError, match="there is no"):
            load_checkpoint(name)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_entry_of_torchvision_has_its_size_and_preprocessing(name: str) -> None:
    size, resized, interpolation = TORCHVISION[name]
    source = resolve(f"torchvision:{name}")
    described = describe_torchvision(source)
    preprocess = described.preprocess
    assert source.name == f"torchvision:{name}"
    assert described.image_size == (size, size)
    assert preprocess is not None
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == ((size, size), "crop", interpolation)
    assert preprocess._whole((1, 1)) == (resized, resized)
    assert described.licence == (SWAG_LICENCE if "SWAG" in name else None)  # torchvision names none for its own


def test_the_table_of_torchvision_is_complete() -> None:
    names = [name for name in torchvision.models.list_models(torchvision.models) if name.startswith("vit_")]
    entries = {f"{name}:{entry.name}" for name in names for entry in torchvision.models.get_model_weights(name)}
    assert entries == set(TORCHVISION)


def test_a_model_of_torchvision_by_name_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    model = torchvision.models.VisionTransformer(384, 16, 1, 12, 768, 64)
    randomise(model, 0)
    wanted = []

    def state(self: Any, **arguments: Any) -> dict[str, Tensor]:
        wanted.append((self, arguments))
        return model.state_dict()

    monkeypatch.setattr(type(entry), "get_state_dict", state)
    checkpoint = load_checkpoint("torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1")
    ((asked, arguments),) = wanted
    assert asked is entry
    assert arguments["check_hash"]
    assert arguments["weights_only"]
    images = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        ours = outputs(checkpoint, images)
        assert (torchvision_cls(model, images) - ours["cls"]).abs().max() < 1e-5
        assert (model(images) - ours["logits"]).abs().max() < 1e-4  # sums of 768 products
    assert checkpoint.preprocess == Preprocess((384, 384))
    assert not checkpoint.notes


def test_torchvision_names_that_are_none_and_a_missing_network_are_one_error_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match="unknown ViT of torchvision 'resnet50'"):
        load_checkpoint("torchvision:resnet50")
    with pytest.raises(CheckpointError, match="did you mean 'IMAGENET1K_V1'"):
        load_checkpoint("torchvision:vit_b_32:IMAGENET1K_V2")
    assert resolve("torchvision:vit_b_32").name == "torchvision:vit_b_32:IMAGENET1K_V1"

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(CheckpointError, match=r"no route to host.*download https://download\.pytorch\.org"):
        load_checkpoint("torchvision:vit_b_32")


def test_a_missing_torchvision_prints_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitembed\[torchvision\]'"):
        load_checkpoint("torchvision:vit_b_16")


@pytest.mark.parametrize("dim", [None, 8])
def test_our_own_folder_gives_its_network(tmp_path: Path, dim: int | None) -> None:
    preprocess = Preprocess((16, 16), "L", mean=(0.1,), std=(0.3,))
    model = Embedder.create("N/4", preprocess=preprocess, stem="conv", dim=dim, device="cpu")
    model.save_pretrained(tmp_path / "model")
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config == model.network.vit.config
    assert (checkpoint.preprocess, checkpoint.pooling, checkpoint.family) == (preprocess, "cls", "vitembed")
    expected = model.network.vit.state_dict()
    assert checkpoint.state.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state[name], expected[name]) for name in expected)
    if dim is None:
        assert checkpoint.projection is None
    else:
        assert torch.equal(checkpoint.projection, model.network.projection.weight)


def test_what_contradicts_the_configuration_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path)
    assert load_checkpoint(tmp_path, heads=2, image_size=32).config == ViTConfig(
        image_size=(32, 32), width=64, depth=1, heads=2, mlp_width=64, norm_eps=1e-12
    )
    with pytest.raises(ConfigError, match="says that it has 2 heads; got heads=4"):
        load_checkpoint(tmp_path, heads=4)
    with pytest.raises(ConfigError, match=r"positions are for \(32, 32\) pixels; got image_size=\(64, 64\)"):
        load_checkpoint(tmp_path, image_size=64)


def rewrite(path: Path, **changes: Any) -> None:
    """Change the description of a saved model and keep its tensors."""
    state, header = load_weights(path / "model.safetensors")
    save_weights(path / "model.safetensors", state, {**header, **changes})


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return the folder of a saved model, its weights alone."""
    Embedder.create("N/4", preprocess=Preprocess((16, 16)), dim=8, device="cpu").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "has format 9; this vitembed reads 2"),
        ({"format": None}, "has format None"),
        ({"fingerprint": "sha256:0"}, "do not have the fingerprint"),
        ({"fingerprint": None}, "do not have the fingerprint"),
        ({"pooling": "mean"}, "do not have the fingerprint"),
        ({"pooling": "x"}, "pooling must be 'cls' or 'mean'; got 'x'"),
        ({"pooling": [1]}, "pooling must be"),
        ({"dim": "x"}, "dim must be null or a whole number above 0; got 'x'"),
        ({"dim": True}, "dim must be"),
        ({"dim": 7}, r"expected a projection \(7, 128\); got \(8, 128\)"),
        ({"dim": None}, "do not have the fingerprint"),
        ({"vit": 3}, "makes no sense"),
        ({"vit": {"image_size": 3}}, "makes no sense"),
        ({"vit": {"widht": 3}}, "did you mean 'width'"),
        ({"vit": {"width": 64, "heads": 1, "depth": 1}}, "projection|fingerprint"),
        ({"vit": None}, "another network than a ViT"),
        ({"preprocess": None}, "makes no sense"),
        ({"preprocess": {"size": [0, 0]}}, "size must be"),
    ],
)
def test_our_own_folder_and_file_are_read_as_strictly_as_by_the_embedder(
    own: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(own, **changes)
    for path in (own, own / "model.safetensors"):
        for read in (load_checkpoint, ViT.from_pretrained):
            with pytest.raises(CheckpointError, match=message) as error:
                read(path)
            assert "\n" not in str(error.value)
    if changes != {"vit": None}:
        with pytest.raises(VitembedError):
            Embedder.from_pretrained(own)


@pytest.mark.parametrize("key", ["vit", "backbone", "pooling", "dim", "preprocess", "fingerprint", "provenance"])
def test_a_key_that_our_own_description_lacks_is_named(own: Path, key: str) -> None:
    state, header = load_weights(own / "model.safetensors")
    del header[key]
    save_weights(own / "model.safetensors", state, header)
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        load_checkpoint(own)


def test_a_changed_weight_and_an_edited_config_of_our_own_are_refused(tmp_path: Path) -> None:
    Embedder.create("N/4", preprocess=Preprocess((16, 16)), device="cpu").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"cls"', '"mean"'))
    with pytest.raises(CheckpointError, match="'pooling' differs"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "model.safetensors").pooling == "cls"  # complete by itself
    config.write_text(whole)
    state, header = load_weights(tmp_path / "model.safetensors")
    state["norm.weight"][3] += 1
    save_weights(tmp_path / "model.safetensors", state, header)
    with pytest.raises(CheckpointError, match="do not have the fingerprint"):
        ViT.from_pretrained(tmp_path)


def test_damage_of_our_own_folder_is_called_damage_and_not_another_kind_of_folder(tmp_path: Path) -> None:
    Embedder.create("N/4", preprocess=Preprocess((16, 16)), device="cpu").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        ViT.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*model\.safetensors"):
        ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{"num_classes": 3}, {"registers": 2}, {"distilled": True, "num_classes": 3}])
def test_a_projection_of_our_own_is_told_from_a_head(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = ViTConfig((16, 16), 8, 3, 32, 1, 2, **settings)
    model = Embedder.create(config, preprocess=Preprocess((16, 16)), pooling="mean", dim=3, device="cpu")
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.pooling == "mean"
    assert torch.equal(checkpoint.projection, model.network.projection.weight)
    assert checkpoint.state.keys() == model.network.vit.state_dict().keys()


def test_heads_and_size_that_contradict_our_own_folder_are_refused(own: Path) -> None:
    assert load_checkpoint(own, heads=4, image_size=16).config.heads == 4
    with pytest.raises(ConfigError, match="says that it has 4 heads; got heads=99"):
        load_checkpoint(own, heads=99)
    with pytest.raises(ConfigError, match=r"positions are for \(16, 16\) pixels; got image_size=\(32, 32\)"):
        load_checkpoint(own, image_size=32)


@pytest.mark.parametrize("size", [0, "x", (32,), (32, -1), (32, 1.5), True])
def test_an_image_size_that_is_none_is_refused(own: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="image_size must be a whole number above 0"):
        load_checkpoint(own, image_size=size)


def test_resolve_is_no_public_name() -> None:
    assert "resolve" not in weights.__all__
    assert all(hasattr(weights, name) for name in weights.__all__)


def test_a_model_of_ours_on_the_hub_is_the_one_that_was_saved(hub: Path) -> None:
    preprocess = Preprocess((32, 32))
    model = Embedder.create(ViTConfig((32, 32), 16, width=64, depth=1, heads=4), preprocess=preprocess, device="cpu")
    model.provenance = {"classes": ["a"]}
    model.save_pretrained(cached(hub, "owner/ours"))
    again = Embedder.from_pretrained("owner/ours", device="cpu")
    assert (again.fingerprint, again.provenance) == (model.fingerprint, model.provenance)
