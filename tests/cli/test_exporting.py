"""`vitembed export` writes a checked ONNX file or a model of its own, reports, and fails with one line."""

import shutil
from pathlib import Path

import onnxruntime
import pytest

from tests.conftest import Runner
from vitembed import export
from vitembed.embedder import Embedder


def test_export_writes_a_file_that_onnxruntime_reads_and_says_how_close_it_is(
    cli: Runner, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    options = ["--image-size", 12, "--images", world / "data" / "class0", "--json"]
    outcome = cli("export", world / "model", "--out", out, *options)
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    found = outcome.json
    variant = Embedder.from_pretrained(world / "model", device="cpu").replace(image_size=12)
    assert (found["file"], found["bytes"], found["images"]) == (str(out), out.stat().st_size, 8)
    assert (found["fingerprint"], found["dim"], found["opset"]) == (variant.fingerprint, variant.dim, 18)
    assert 0 <= found["largest distance"] < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert taken.shape[1:] == [1, 12, 12]
    assert session.get_modelmeta().custom_metadata_map["fingerprint"] == variant.fingerprint


def test_a_variant_in_our_own_format_is_a_model_that_an_index_takes(cli: Runner, world: Path, tmp_path: Path) -> None:
    variant = ["--format", "vitembed", "--image-size", 12, "--merge", 1]
    outcome = cli("export", world / "model", "--out", tmp_path / "variant", *variant, "--json")
    assert outcome.status == 0, outcome.err
    model = Embedder.from_pretrained(tmp_path / "variant", device="cpu")
    assert (model.preprocess.size, model.network.vit.config.merge) == ((12, 12), 1)
    assert outcome.json["fingerprint"] == model.fingerprint
    made = cli("index", "create", tmp_path / "photos.index", "--model", tmp_path / "variant", "--json")
    assert made.json["fingerprint"] == model.fingerprint
    # Not the model that it was made of: the embeddings of both do not go together.
    other = cli("index", "sync", tmp_path / "photos.index", world / "data", "--model", world / "model")
    assert other.status == 2


def test_a_plain_copy_keeps_the_fingerprint(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("export", world / "model", "--out", tmp_path / "copy", "--format", "vitembed")
    assert outcome.status == 0, outcome.err
    original = Embedder.from_pretrained(world / "model", device="cpu").fingerprint
    assert Embedder.from_pretrained(tmp_path / "copy", device="cpu").fingerprint == original
    assert original in outcome.out


def test_a_distance_is_printed_with_its_digits_and_a_refusal_is_one_line(
    cli: Runner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_to_onnx", lambda network, opset: None)
    monkeypatch.setattr(export, "_describe", lambda graph, model: None)
    monkeypatch.setattr(export, "_write", lambda graph, path, data: path.write_bytes(b"file"))
    monkeypatch.setattr(export, "_run", lambda path, pixels: None)
    monkeypatch.setattr(export, "_largest_distance", lambda expected, got: 0.00009)
    outcome = cli("export", world / "model", "--out", tmp_path / "model.onnx")
    assert outcome.status == 0, outcome.err
    assert "largest distance  9.0e-05" in outcome.out
    assert "weights in" not in outcome.out
    monkeypatch.setattr(export, "_largest_distance", lambda expected, got: 0.00011)
    outcome = cli("export", world / "model", "--out", tmp_path / "refused.onnx")
    assert (outcome.status, outcome.out) == (2, "")
    assert "cosine distance of up to 1.1e-04" in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image-size", "10"], "multiples of the patch size 4; got (10, 10)"),
        (["--image-size", "0"], "--image-size"),
        (["--merge", "-1"], "--merge"),
        (["--format", "tflite"], "'onnx', 'vitembed'"),
        (["--format", "vitembed", "--images", "."], "leave it out"),
        (["--images", "missing.png"], "missing.png"),
    ],
)
def test_export_fails_with_one_line(cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str) -> None:
    outcome = cli("export", world / "model", "--out", tmp_path / "out", *options)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("vitembed: error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_overwritten_by_its_own_variant(cli: Runner, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    outcome = cli("export", tmp_path / "model", "--out", tmp_path / "model", "--format", "vitembed", "--merge", 1)
    assert outcome.status == 2
    assert "name a new one" in outcome.err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
