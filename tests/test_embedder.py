"""The embedder: images in, unit rows out, saved and loaded without a difference."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, ImageError, ModelMismatchError, VectorError
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig


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


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="pre-processing gives 3 channels"):
        Embedder.create(ViTConfig((16, 16), 4, 1, 32, 1, 2), preprocess=Preprocess((16, 16)))
    for arch in (ViTConfig((16, 16), 4, 3, 32, 1, 2), "timm:test_resnet"):
        with pytest.raises(ConfigError, match="stem='conv' is for a named size"):
            Embedder.create(arch, preprocess=Preprocess((16, 16)), stem="conv")
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        Embedder(tiny().network, tiny().preprocess, precision="bf61")  # type: ignore[arg-type]
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


# The same weights, used otherwise.


def plain(**changes: Any) -> Embedder:
    """Return a small model with linear patches, whose random weights are large enough to matter."""
    config = ViTConfig((16, 24), 4, 3, 32, 3, 4, **changes)
    model = Embedder.create(config, preprocess=Preprocess((16, 24)), device="cpu", dim=12)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(count: int = 4) -> list[np.ndarray]:
    return [picture(i) for i in range(count)]


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_model_for_another_image_size_has_the_same_weights(tmp_path: Path, stem: str) -> None:
    model = Embedder.create("N/4", preprocess=Preprocess((16, 16)), stem=stem, dim=24, device="cpu")  # type: ignore[arg-type]
    before = model.encode(images())
    other = model.replace(image_size=(24, 32))
    assert other.preprocess == dataclasses.replace(model.preprocess, size=(24, 32))
    assert other.network.input_shape == (3, 24, 32)
    ours, theirs = model.network.state_dict(), other.network.state_dict()
    different = (
        [name for name in ours if not torch.equal(ours[name], theirs[name])] if ours.keys() == theirs.keys() else None
    )
    assert different == ["backbone.pos_embed"]
    assert other.fingerprint != model.fingerprint
    other.save_pretrained(tmp_path)
    loaded = Embedder.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_array_equal(loaded.encode(images()), other.encode(images()))
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(model.encode(images()), before)
    assert model.replace(image_size=32).preprocess.size == (32, 32)


def test_a_merging_model_is_near_and_has_its_own_fingerprint(tmp_path: Path) -> None:
    model = plain()
    fingerprint, exact = model.fingerprint, model.encode(images())
    merging = model.replace(merge=3)
    assert merging.fingerprint != fingerprint == model.fingerprint
    near = merging.encode(images())
    assert np.abs(near - exact).max() > 1e-6
    assert (near * exact).sum(axis=1).min() > 0.9
    merging.save_pretrained(tmp_path)
    np.testing.assert_array_equal(Embedder.from_pretrained(tmp_path, device="cpu").encode(images()), near)
    again = merging.replace(merge=0)
    assert again.fingerprint == fingerprint
    np.testing.assert_array_equal(again.encode(images()), exact)


def test_replacing_keeps_settings_and_provenance_and_draws_no_random_numbers() -> None:
    model = plain()
    model = Embedder(model.network, model.preprocess, device="cpu", precision="bf16", provenance={"data": "birds"})
    state = torch.get_rng_state()
    same = model.replace()
    assert torch.equal(torch.get_rng_state(), state)
    assert (same.precision, same.provenance, same.fingerprint) == ("bf16", {"data": "birds"}, model.fingerprint)


def test_a_replacement_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of the patch size 4"):
        plain().replace(image_size=18)
    with pytest.raises(ConfigError, match="merge must be"):
        plain().replace(merge=-1)
    with pytest.raises(ConfigError, match="this needs a ViT of vitembed"):
        Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32))).replace(merge=2)


@pytest.mark.parametrize("merge", [0, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near_and_gives_float32_rows_of_length_one(precision: Any, merge: int) -> None:
    exact = plain(merge=merge)
    coarse = Embedder(exact.network, exact.preprocess, device="cpu", precision=precision)
    near, rows = coarse.encode(images()), exact.encode(images())
    assert near.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-6)
    assert 1e-6 < np.abs(near - rows).max() < (0.02 if merge == 0 else 0.2)  # merging may choose another pair
    assert coarse.fingerprint == exact.fingerprint


@pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("clang") is None, reason="torch.compile needs a compiler"
)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own deprecated parts
def test_a_compiled_model_gives_the_same_embeddings() -> None:
    config = ViTConfig((16, 16), 8, 3, 32, 1, 4)  # the compiler takes seconds for each kind of layer
    model = Embedder.create(config, preprocess=Preprocess((16, 16)), device="cpu")
    compiled = Embedder(model.network, model.preprocess, device="cpu", compile=True)
    np.testing.assert_allclose(compiled.encode(images()), model.encode(images()), rtol=0, atol=1e-5)
    assert compiled.fingerprint == model.fingerprint


# Networks of others, and classification.


def test_a_network_of_timm_is_an_embedder_by_its_name() -> None:
    model = Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32)), dim=6, device="cpu")
    rows = model.encode(images())
    assert rows.shape == (4, 6)
    again = Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32)), dim=6, device="cpu")
    assert again.fingerprint == model.fingerprint, "the same for the same seed"
    with pytest.raises(ConfigError, match=r"has no model 'test_resnets'; did you mean 'test_resnet'\?"):
        Embedder.create("timm:test_resnets")


def test_a_module_of_ones_own_is_an_embedder() -> None:
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    preprocess = Preprocess((16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    model = Embedder.from_module(module, preprocess, device="cpu")
    pixels = np.stack([preprocess(image) for image in images()]).astype(np.float64)
    means = pixels.mean(axis=(2, 3))
    np.testing.assert_allclose(model.encode(images()), means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ConfigError, match=r"must give features of shape"):
        Embedder.from_module(torch.nn.Flatten(start_dim=0), preprocess)


def test_probabilities_of_the_classes_sum_to_one() -> None:
    model = plain(num_classes=5)
    model.provenance["classes"] = list("abcde")
    rows = model.classify(images(), batch_size=3)
    assert rows.shape == (4, 5)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    pixels = torch.from_numpy(np.stack([model.preprocess(image) for image in images()]))
    vit = model.network.vit
    expected = vit(model.network.normalise(pixels)).logits.softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert model.classes == list("abcde")
    assert model.classify([]).shape == (0, 5)
    with pytest.raises(ImageError, match="missing"):
        model.classify(["missing.png"])
    with torch.no_grad():
        vit.head.bias[0] = float("nan")
    with pytest.raises(VectorError, match="NaN"):
        model.classify(images())


def test_without_a_head_there_are_no_classes() -> None:
    foreign = Embedder.create("timm:test_resnet", preprocess=Preprocess((32, 32)), device="cpu")
    for model in (plain(), foreign):
        assert model.classes == []
        with pytest.raises(ConfigError, match="no classification head; train one with"):
            model.classify(images())


def test_a_frozen_part_stays_frozen_through_encode() -> None:
    config = ViTConfig((16, 16), 8, 3, width=16, depth=1, heads=2, stem=((8, 2), (8, 2), (16, 2)))
    model = Embedder.create(config, preprocess=Preprocess((16, 16)), device="cpu")
    model.network.train()
    frozen = next(part for part in model.network.modules() if isinstance(part, torch.nn.BatchNorm2d))
    frozen.eval()
    model.encode([picture(0)])
    assert not frozen.training
    assert model.network.training
    assert model.network.vit.blocks.training


def test_one_opened_picture_at_many_places_is_read_by_one_thread(photos: list[Path]) -> None:
    with Image.open(photos[0]) as opened:
        images = [photos[0], *[opened] * 6]
        for _ in range(5):
            for batch in tiny().stream(images, batch_size=7, workers=4):
                assert batch.failures == []


def test_the_weights_file_of_a_model_is_the_model(tmp_path: Path) -> None:
    model = tiny()
    model.provenance = {"classes": ["a", "b"]}
    model.save_pretrained(tmp_path)
    again = Embedder.from_pretrained(tmp_path / "model.safetensors")
    assert again.fingerprint == model.fingerprint
    assert again.classes == ["a", "b"]
    size = (model.preprocess.size[0], model.preprocess.size[1])
    assert Embedder.from_pretrained(tmp_path, image_size=size).fingerprint == model.fingerprint
    with pytest.raises(ConfigError, match="replace"):
        Embedder.from_pretrained(tmp_path, image_size=(size[0] + 8, size[1]))


def test_a_projection_can_be_taken_off() -> None:
    config = ViTConfig((16, 16), 8, 3, width=16, depth=1, heads=2)
    model = Embedder.create(config, preprocess=Preprocess((16, 16)), dim=4, device="cpu")
    bare = model.replace(projection=False)
    assert (model.dim, bare.dim) == (4, 16)
    assert bare.fingerprint != model.fingerprint
    with torch.no_grad():
        pixels = torch.from_numpy(bare.preprocess(picture(0)))[None]
        expected = torch.nn.functional.normalize(model.network.vit(model.network.normalise(pixels)).cls, dim=-1)
    np.testing.assert_allclose(bare.encode([picture(0)]), expected.numpy(), atol=1e-6)


def test_creating_a_model_seeds_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[object] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    tiny()
    assert seeded == []


def test_a_model_made_in_inference_mode_can_be_trained() -> None:
    config = ViTConfig((16, 16), 8, 3, width=16, depth=1, heads=2)
    with torch.inference_mode():
        model = Embedder.create(config, preprocess=Preprocess((16, 16)), device="cpu")
        models = [model, model.replace(image_size=32)]
    for each in models:
        each.network(torch.zeros(1, 3, *each.preprocess.size))[0, 0].backward()
        assert each.network.vit.pos_embed.grad is not None


def test_no_pixels_give_no_rows() -> None:
    model = tiny()
    assert model.embed_pixels(torch.zeros(0, 3, 16, 16, dtype=torch.uint8)).shape == (0, model.dim)
