"""Exported models: the same embeddings without torch, or no file at all."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitembed
from vitembed import export
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, ImageError, MissingExtraError, VitembedError
from vitembed.export import export_folder, export_onnx, sample_images
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig, conv_stem

SMALL = {"image_size": (16, 16), "patch_size": 4, "width": 16, "depth": 2, "heads": 2}


def shaken(model: Embedder) -> Embedder:
    """Give every parameter a random value of its own: zeros and tiny factors would hide what is left out."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def vit(pooling: str = "cls", dim: int | None = None, **changes: Any) -> Embedder:
    config = ViTConfig(**{**SMALL, **changes})
    preprocess = Preprocess(config.image_size) if config.channels == 3 else Preprocess.grey(config.image_size)
    return shaken(Embedder.create(config, preprocess=preprocess, pooling=pooling, dim=dim, device="cpu"))  # type: ignore[arg-type]


class Convolutions(nn.Module):
    """A foreign backbone, with a BatchNorm that must be exported in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class Branching(nn.Module):
    """What no exporter can follow: the numbers decide which way the code goes."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3))
        return 2 * means if means.sum() > 0 else means


MODELS: dict[str, Callable[[], Embedder]] = {
    "convolutional stem, grey": lambda: vit(stem=conv_stem(16, 4), channels=1),
    "mean of the patches, projection": lambda: vit("mean", 6),
    "registers, LayerScale, SwiGLU": lambda: vit(registers=2, layer_scale=True, mlp="swiglu"),
    "as CLIP": lambda: vit(dim=6, norm_pre=True, mlp="quick_gelu", norm_eps=1e-5),
    "foreign": lambda: shaken(Embedder.from_module(Convolutions(), Preprocess((16, 16)), device="cpu")),
}


def random_pixels(model: Embedder, count: int) -> np.ndarray:
    shape = (count, *model.network.input_shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def parity(model: Embedder, folder: Path) -> Path:
    """Export a model, compare the file with torch at three batch sizes, and return it."""
    written = export_onnx(model, folder / "model.onnx")
    assert (written.opset, written.images, written.data_path) == (18, 10, None)
    assert written.largest_distance < 1e-9
    assert written.size == written.path.stat().st_size
    session = session_of(written.path)
    for count in (1, 2, 5):
        pixels = random_pixels(model, count)
        (vectors,) = session.run(None, {"pixels": pixels})
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, model.embed_pixels(torch.from_numpy(pixels)), atol=2e-6)
    assert np.ptp(vectors, axis=0).max() > 0.01, "equal embeddings of unequal images would show nothing"
    return written.path


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_gives_torchs_embeddings_at_every_batch_size(name: str, tmp_path: Path) -> None:
    parity(MODELS[name](), tmp_path)


def test_onnxruntime_merges_the_tokens_that_torch_merges(tmp_path: Path) -> None:
    model = vit("mean").replace(image_size=(20, 12), merge=3)
    path = parity(model, tmp_path)
    pixels = random_pixels(model, 3)
    (vectors,) = session_of(path).run(None, {"pixels": pixels})
    exact = model.replace(merge=0).embed_pixels(torch.from_numpy(pixels))
    assert np.abs(vectors - exact).max() > 1e-3, "the file merges nothing"


@pytest.fixture(scope="module")
def plain() -> Embedder:
    return vit(num_classes=3)  # whose head the file does without


@pytest.fixture(scope="module")
def exported(plain: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported file of `plain`, to be read only."""
    return parity(plain, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def exporter(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes torch's exporter give `exported` after something was done to it; it also saves the time."""

    def use(change: Callable[[Any], None] = lambda graph: None) -> None:
        graph = onnx.load(exported)
        change(graph)
        monkeypatch.setattr(export, "_to_onnx", lambda network, opset: graph)

    return use


def test_the_metadata_says_whose_embeddings_and_how_images_are_prepared(plain: Embedder, exported: Path) -> None:
    about = session_of(exported).get_modelmeta().custom_metadata_map
    assert about.keys() == {"fingerprint", "preprocess", "dim", "pooling", "vitembed", "usage"}
    assert about["fingerprint"] == plain.fingerprint
    assert Preprocess.from_dict(json.loads(about["preprocess"])) == plain.preprocess
    assert (about["dim"], about["pooling"], about["vitembed"]) == ("16", "cls", vitembed.__version__)
    assert "uint8 (N, 3, 16, 16)" in about["usage"]


def test_the_files_carry_no_paths_of_the_machine_that_wrote_them(exported: Path) -> None:
    content = exported.read_bytes()
    for path in (Path(vitembed.__file__).parent, Path(torch.__file__).parent, Path.cwd()):
        assert str(path).encode() not in content
    assert not any(node.metadata_props for node in onnx.load(exported).graph.node)


def test_the_code_in_the_docstring_runs_without_torch(plain: Embedder, exported: Path, tmp_path: Path) -> None:
    for name, picture in zip(("a.jpg", "b.jpg"), sample_images(), strict=False):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    code = str(export.__doc__).split("```")[1].removeprefix("python")
    code = f"import sys\nsys.modules['torch'] = None\n{code}\nprint(vectors.tolist())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = plain.encode([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    np.testing.assert_allclose(ast.literal_eval(run.stdout), expected, atol=2e-6)


def scaled(graph: Any, name: str, factor: float) -> None:
    (tensor,) = (tensor for tensor in graph.graph.initializer if tensor.name.endswith(name))
    values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def lengthened(graph: Any) -> None:
    """Double the embeddings: their cosine stays what it was."""
    last = graph.graph.node[-1]
    last.output[0] = "unit"
    two = onnx.numpy_helper.from_array(np.float32(2), "two")
    graph.graph.initializer.append(two)
    graph.graph.node.append(onnx.helper.make_node("Mul", ["unit", "two"], ["embeddings"]))


def fixed_batch(graph: Any) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "other weights": (lambda graph: scaled(graph, "0.mlp.fc1.bias", 2), "differ from torch's by a cosine distance"),
    "no number": (lambda graph: scaled(graph, "0.mlp.fc1.bias", np.nan), "cosine distance of up to nan"),
    "another length": (lengthened, "cosine distance of up to 5.0e-01"),
    "one image only": (fixed_batch, "onnxruntime cannot run"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("beside", [False, True])
def test_a_file_that_differs_is_refused_and_leaves_what_was_there(
    fault: str,
    beside: bool,
    plain: Embedder,
    exporter: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, words = FAULTS[fault]
    exporter(change)
    if beside:
        monkeypatch.setattr(export, "_ONE_FILE", 0)
    with pytest.raises(CheckpointError, match=words) as caught:
        export_onnx(plain, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.onnx").write_text("an older one")
    with pytest.raises(CheckpointError):
        export_onnx(plain, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older one"


def test_the_distance_reported_is_that_of_the_cosine(
    plain: Embedder, exporter: Callable[..., None], tmp_path: Path
) -> None:
    exporter(lambda graph: scaled(graph, "0.mlp.fc1.bias", 1.01))
    written = export_onnx(plain, tmp_path / "model.onnx", check_images=sample_images()[:3])
    pixels = np.stack([plain.preprocess(image) for image in sample_images()[:3]])
    (got,) = session_of(written.path).run(None, {"pixels": pixels})
    expected = plain.embed_pixels(torch.from_numpy(pixels))
    a, b = got.astype(float), expected.astype(float)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 1e-8 < written.largest_distance <= 1e-4
    assert written.largest_distance == pytest.approx(1 - cosines.min(), rel=1e-2)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_limit_is_a_cosine_distance_of_one_in_ten_thousand(factor: float) -> None:
    angle = np.arccos(1 - factor * 1e-4)
    rows = np.array([[1, 0], [1, 0]]), np.array([[1, 0], [np.cos(angle), np.sin(angle)]])
    distance = export._largest_distance(*rows)
    assert distance == pytest.approx(factor * 1e-4)
    assert (distance <= export.TOLERANCE) == (factor < 1)


def test_large_weights_go_beside_the_file(
    plain: Embedder, exporter: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_ONE_FILE", 0)
    exporter()
    written = export_onnx(plain, tmp_path / "model.onnx")
    assert written.data_path is not None
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", written.data_path.name}
    assert written.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written.data_path.stat().st_size > sum(p.nbytes for p in plain.network.parameters()) / 2
    pixels = random_pixels(plain, 2)
    (vectors,) = session_of(written.path).run(None, {"pixels": pixels})
    np.testing.assert_allclose(vectors, plain.embed_pixels(torch.from_numpy(pixels)), atol=2e-6)


def test_the_model_stays_in_its_mode_and_precision(exporter: Callable[..., None], tmp_path: Path) -> None:
    network = vit(num_classes=3).network
    model = Embedder(network, Preprocess((16, 16)), device="cpu", precision="bf16")
    model.network.train()
    exporter()
    assert export_onnx(model, tmp_path / "model.onnx").largest_distance < 1e-9  # of float32, not of bfloat16
    assert model.network.training
    assert model.precision == "bf16"
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_given_images_are_checked_64_at_most_from_first_to_last(
    plain: Embedder, exporter: Callable[..., None], tmp_path: Path
) -> None:
    exporter()
    for count, checked in ((1, 1), (3, 3), (64, 64), (130, 64)):
        images = [np.full((9, 9, 3), i, np.uint8) for i in range(count)]
        assert export_onnx(plain, tmp_path / "model.onnx", check_images=images).images == checked
    values = export._pixels_for_check(plain, images)[:, 0, 0, 0]
    assert (values[0], values[-1]) == (0, 129)
    assert set(np.diff(values.astype(int))) == {2, 3}
    with pytest.raises(ConfigError, match="got none"):
        export_onnx(plain, tmp_path / "model.onnx", check_images=[])
    with pytest.raises(ImageError, match=r"missing\.png"):
        export_onnx(plain, tmp_path / "model.onnx", check_images=["missing.png"])


def test_what_torch_cannot_export_is_one_line(tmp_path: Path) -> None:
    model = Embedder.from_module(Branching(), Preprocess((8, 8)), device="cpu")
    with pytest.raises(ConfigError, match="torch cannot export this network to ONNX: Could not guard") as caught:
        export_onnx(model, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_opset_is_what_was_asked_for_or_an_error(plain: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 18; got 17"):
        export_onnx(plain, tmp_path / "model.onnx", opset=17)
    written = export_onnx(plain, tmp_path / "model.onnx", opset=20)
    imported = {entry.domain: entry.version for entry in onnx.load(written.path).opset_import}
    assert (written.opset, imported[""]) == (20, 20)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_the_pip_line_is_printed(
    package: str, plain: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"vitembed\[onnx\]"):
        export_onnx(plain, tmp_path / "model.onnx")


def test_a_folder_that_is_not_there_is_an_error(plain: Embedder, exporter: Callable[..., None], tmp_path: Path) -> None:
    exporter()
    with pytest.raises(VitembedError, match="there is no folder"):
        export_onnx(plain, tmp_path / "missing" / "model.onnx")


def test_a_variant_is_a_model_of_its_own(plain: Embedder, tmp_path: Path) -> None:
    variant = plain.replace(image_size=24, merge=2)
    export_folder(variant, tmp_path / "variant")
    loaded = Embedder.from_pretrained(tmp_path / "variant", device="cpu")
    assert loaded.fingerprint == variant.fingerprint != plain.fingerprint
    assert (loaded.preprocess.size, loaded.network.vit.config.merge) == ((24, 24), 2)
    np.testing.assert_array_equal(loaded.encode(sample_images()[:2]), variant.encode(sample_images()[:2]))
    with pytest.raises(ConfigError, match="holds something already"):
        export_folder(plain, tmp_path / "variant")
    assert Embedder.from_pretrained(tmp_path / "variant", device="cpu").fingerprint == variant.fingerprint
