"""The embedder: images in, unit rows out, saved and loaded without a difference."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, ImageError, ModelMismatchError, VectorError, VitembedError
from vitembed.images import Preprocess
from vitembed.vit import ViTConfig
from vitembed.weights import load_state


def tiny(seed: int = 0, **changes: object) -> Embedder:
    settings = {"preprocess": Preprocess((16, 16)), "device": "cpu", "stem": "conv", "dim": 24, **changes}
    return Embedder.create("N/4", seed=seed, **settings)  # type: ignore[arg-type]


def picture(seed: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i)).save(path)
    return paths


def test_rows_have_length_one_and_the_order_of_the_images(photos: list[Path]) -> None:
    model = tiny()
    vectors = model.encode(photos)
    assert vectors.shape == (7, 24)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors[4], model.encode([photos[4]])[0], atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_batch_size_and_workers_do_not_change_the_result(photos: list[Path], batch_size: int, pooling: str) -> None:
    model = tiny(pooling=pooling)
    expected = model.encode(photos, workers=0)
    np.testing.assert_allclose(model.encode(photos, batch_size=batch_size, workers=0), expected, atol=1e-6)
    if batch_size == 2:
        np.testing.assert_allclose(model.encode(photos, batch_size=2, workers=2), expected, atol=1e-6)
        np.testing.assert_allclose(model.encode(photos, batch_size=2), expected, atol=1e-6)  # decides by itself


def test_paths_pil_images_and_arrays_are_one_picture(photos: list[Path]) -> None:
    model = tiny()
    with Image.open(photos[0]) as image:
        mixed = model.encode([photos[0], str(photos[0]), image, picture(0)])
    np.testing.assert_allclose(mixed, np.tile(mixed[:1], (4, 1)), atol=1e-6)


def test_one_image_alone_and_an_array_of_images(photos: list[Path]) -> None:
    model = tiny()
    assert model.encode(photos[0]).shape == (1, 24)
    assert model.encode(picture(0)).shape == (1, 24)
    assert model.encode(np.stack([picture(0), picture(1)])).shape == (2, 24)
    assert model.encode([]).shape == (0, 24)
    assert model.encode(path for path in photos).shape == (7, 24)
    np.testing.assert_allclose(model.encode(np.array([str(p) for p in photos])), model.encode(photos), atol=1e-6)
    for nothing in (None, 3, b"x.png"):
        with pytest.raises(ConfigError, match="expected images"):
            model.encode(nothing)  # type: ignore[arg-type]


def test_a_broken_image_is_an_error_of_encode_and_a_value_of_stream(photos: list[Path]) -> None:
    photos[3].write_bytes(photos[3].read_bytes()[:60])
    model = tiny()
    with pytest.raises(ImageError, match=r"3\.png"):
        model.encode(photos)
    for workers in (0, 1):
        batches = list(model.stream(photos, batch_size=2, workers=workers))
        positions = np.concatenate([batch.positions for batch in batches])
        assert positions.tolist() == [0, 1, 2, 4, 5, 6]
        [(position, error)] = [failure for batch in batches for failure in batch.failures]
        assert (position, error.source) == (3, str(photos[3]))
        vectors = np.concatenate([batch.vectors for batch in batches])
        np.testing.assert_allclose(vectors, model.encode([photos[i] for i in positions]), atol=1e-6)


def test_a_batch_of_broken_images_alone(photos: list[Path]) -> None:
    photos[0].write_bytes(b"")
    [batch] = tiny().stream(photos[:1])
    assert batch.vectors.shape == (0, 24)
    assert [position for position, _ in batch.failures] == [0]


def test_stream_reads_nothing_before_it_is_needed(photos: list[Path]) -> None:
    stream = tiny().stream([photos[0], photos[1], "missing.png"], batch_size=2, workers=0)
    assert next(stream).positions.tolist() == [0, 1]
    [(position, _)] = next(stream).failures
    assert position == 2


def test_encode_leaves_training_mode_and_weights_as_they_were() -> None:
    model = tiny()
    model.network.train()
    before = model.fingerprint
    model.encode([picture(0)])
    assert model.network.training
    assert model.fingerprint == before


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dim", [None, 24])
def test_a_saved_model_gives_equal_embeddings_to_the_bit(tmp_path: Path, pooling: str, dim: int | None) -> None:
    model = tiny(pooling=pooling, dim=dim, preprocess=Preprocess.grey((16, 16)))
    model.provenance = {"date": "2026-01-01", "held-out classes": [str(i) for i in range(9)]}
    model.save_pretrained(tmp_path / "model")
    loaded = Embedder.from_pretrained(tmp_path / "model", device="cpu")
    images = [picture(i) for i in range(5)]
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))
    assert loaded.fingerprint == model.fingerprint
    assert loaded.provenance == model.provenance
    assert loaded.preprocess == model.preprocess
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "model" / "README.md").read_text()
    assert model.fingerprint in card
    assert "and 4 more" in card


def test_a_saved_model_is_the_same_in_another_process(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, numpy as np\nfrom vitembed import Embedder\n"
        "model = Embedder.from_pretrained(sys.argv[1], device='cpu')\n"
        "z = model.encode([np.full((20, 30, 3), 99, np.uint8)])\nprint(model.fingerprint, z.tobytes().hex())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    expected = model.encode([np.full((20, 30, 3), 99, np.uint8)])
    assert run.stdout.split() == [model.fingerprint, expected.tobytes().hex()]


def test_the_fingerprint_tells_weights_pooling_and_preprocessing_apart() -> None:
    models = [
        tiny(),
        tiny(seed=1),
        tiny(pooling="mean"),
        tiny(preprocess=Preprocess((16, 16), resize="pad")),
        tiny(preprocess=Preprocess((16, 16), std=(0.5, 0.5, 0.5))),
    ]
    assert len({model.fingerprint for model in models}) == len(models)
    assert tiny().fingerprint == models[0].fingerprint
    with torch.no_grad():
        models[0].network.vit.cls_token[0, 0, 0] += 1e-6
    assert models[0].fingerprint != tiny().fingerprint


def test_creating_a_model_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny()
    assert torch.equal(torch.rand(1), expected)


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


def test_files_of_others_and_newer_formats_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no description"):
        Embedder.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"vitembed": '{"format": 2}'})
    with pytest.raises(CheckpointError, match="format 2"):
        Embedder.from_pretrained(tmp_path)
    for header, words in (("{", "no JSON"), ("[]", "no JSON object"), ('{"format": 1}', "lacks dim, fingerprint")):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"vitembed": header})
        with pytest.raises(CheckpointError, match=words):
            Embedder.from_pretrained(tmp_path)


def test_a_mismatch_names_both_sides(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"-weight \(3, 2\).*\+weight \(4, 2\), \+extra \(1,\)"):
        load_state(module, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)}, tmp_path)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="pre-processing gives 3 channels"):
        Embedder.create(ViTConfig((16, 16), 4, 1, 32, 1, 2), preprocess=Preprocess((16, 16)))
    with pytest.raises(ConfigError, match="did you mean 'cls'"):
        tiny(pooling="clss")
    with pytest.raises(ConfigError, match="dim"):
        tiny(dim=0)
    with pytest.raises(ConfigError, match="cannot be used here"):
        tiny(device="gpu")
    with pytest.raises(ConfigError, match="cannot be used here"):
        tiny(device="meta")
    with pytest.raises(ConfigError, match="batch_size"):
        tiny().encode([picture(0)], batch_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size"):
        tiny().encode([picture(0)], batch_size=0)
    with pytest.raises(ConfigError, match="workers"):
        tiny().encode([picture(0)], workers=-1)


def test_nan_weights_are_an_error_not_embeddings() -> None:
    model = tiny()
    with torch.no_grad():
        model.network.vit.norm.bias[0] = float("nan")
    with pytest.raises(VectorError, match="NaN"):
        model.encode([picture(0)])


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create the folder"):
        tiny().save_pretrained(tmp_path / "file" / "model")


def test_an_index_refuses_another_models_embeddings(tmp_path: Path) -> None:
    from vitembed.index import Index

    model, other = tiny(), tiny(seed=1)
    with Index.create(tmp_path / "i", model.dim, model.fingerprint) as index:
        index.require_model(model.fingerprint)
        with pytest.raises(ModelMismatchError):
            index.require_model(other.fingerprint)


def test_the_progress_bar_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    tiny().encode([picture(0)], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "1/1" in err
