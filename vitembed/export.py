"""Models for elsewhere: an ONNX file that runs without torch, and a folder of a cheaper or larger variant.

An exported file is checked before it gets its name: onnxruntime and torch embed the same photographs, and a file whose
embeddings differ is not left behind. Normalisation is part of the graph; what remains to be done to an image is to
resize and crop it, and the file's metadata says how. With onnxruntime:

```python
import json

import numpy as np
import onnxruntime
from vitembed import Preprocess  # needs no torch

session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map
preprocess = Preprocess.from_dict(json.loads(about["preprocess"]))
pixels = np.stack([preprocess("a.jpg"), preprocess("b.jpg")])  # (2, C, H, W) uint8
(vectors,) = session.run(["embeddings"], {"pixels": pixels})  # (2, dim) float32, rows of length 1
```

The metadata has texts under these keys: `fingerprint` (of the model: an index made for the model takes these vectors),
`preprocess` (JSON, see `Preprocess`), `dim`, `pooling`, `vitembed` (the version that wrote the file) and `usage`.
"""

import contextlib
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitembed import __version__
from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import CheckpointError, ConfigError, MissingExtraError
from vitembed.files import atomic_path
from vitembed.images import ImageSource

TOLERANCE = 1e-4  # largest cosine distance between an embedding of torch and one of the exported file
INPUT, OUTPUT = "pixels", "embeddings"

_OLDEST_OPSET = 18  # the first that torch's exporter writes; onnxruntime has read it since 1.14
_CHECKED = 64  # images of the check: enough to notice a fault, few enough for a large network on a processor
_ONE_FILE = 2_000_000_000  # bytes; protobuf cannot write a message of 2 GiB, so that larger weights go beside it


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Attributes:
        path: the file.
        data_path: a second file that must stay beside it, with the weights, where these have 2 GB or more; else None.
        size: bytes of both.
        opset: the version of ONNX's operators.
        largest_distance: the largest cosine distance between torch's and onnxruntime's embeddings of one image.
        images: how many images that was measured on.
    """

    path: Path
    data_path: Path | None
    size: int
    opset: int
    largest_distance: float
    images: int


def export_onnx(
    model: Embedder,
    path: str | os.PathLike[str],
    *,
    check_images: Sequence[ImageSource] | None = None,
    opset: int = _OLDEST_OPSET,
) -> OnnxExport:
    """Write an ONNX file that gives the model's embeddings.

    Its input "pixels" is (N, C, H, W) uint8, what `model.preprocess` makes of N images; its output "embeddings" is
    (N, dim) float32, rows of length 1. N is free. The weights and the arithmetic are float32, whatever precision the
    model computes in here.

    Args:
        model: an embedder; a foreign backbone is as good, if torch can export it.
        path: the file to write.
        check_images: images of the kind that the model is for, of which up to 64, spread evenly, are embedded with
            both; None for parts of two photographs that come with scikit-learn.
        opset: version of ONNX's operators, at least 18.

    Returns:
        What was written, and how far apart the embeddings are.

    Raises:
        MissingExtraError: without onnx, onnxscript or onnxruntime.
        ConfigError: if torch cannot export the network, or not for that opset.
        CheckpointError: if an embedding differs by a cosine distance above 1e-4; no file is left.
        ImageError: if an image of the check cannot be read.
        VitembedError: if the file cannot be written.
    """
    _require_packages()
    if opset < _OLDEST_OPSET:
        raise ConfigError(f"opset must be at least {_OLDEST_OPSET}; got {opset}")
    # A copy: the model stays on its device, in its mode and precision.
    plain = Embedder(copy.deepcopy(model.network), model.preprocess, device="cpu")
    pixels = _pixels_for_check(plain, check_images)
    expected = plain.embed_pixels(torch.from_numpy(pixels))
    weights = sum(tensor.nbytes for tensor in plain.network.state_dict().values())
    data_path = None if weights < _ONE_FILE else _data_path(path, model.fingerprint)
    with contextlib.ExitStack() as files:  # left in reverse: the data take their name first
        temporary = files.enter_context(atomic_path(path))
        data = None if data_path is None else files.enter_context(atomic_path(data_path))
        graph = _to_onnx(plain.network, opset)
        _describe(graph, model)
        _write(graph, temporary, data)
        distance = _largest_distance(expected, _run(temporary, pixels))
        if not distance <= TOLERANCE:  # NaN is refused, too
            raise CheckpointError(_refusal(plain.network, path, distance))
        if data_path is not None:
            _point_to(graph, temporary, data_path.name)
        size = sum(file.stat().st_size for file in (temporary, data) if file is not None)
    return OnnxExport(Path(path), data_path, size, opset, distance, len(pixels))


def export_folder(model: Embedder, folder: str | os.PathLike[str]) -> None:
    """Save a model as a folder that holds nothing yet; see `Embedder.save_pretrained` and `Embedder.replace`.

    Raises:
        ConfigError: if the folder holds something: it may be the model that this one was made of.
        VitembedError: if the folder cannot be written.
    """
    place = Path(folder)
    if place.is_dir() and any(place.iterdir()):
        raise ConfigError(f"{place} is a folder that holds something already; name a new one")
    model.save_pretrained(place)


def sample_images() -> list[NDArray[np.uint8]]:
    """Return ten photographs, (H, W, 3) uint8: the two that come with scikit-learn, whole and in quarters."""
    from sklearn.datasets import load_sample_images

    images = []
    for picture in load_sample_images().images:
        y, x = picture.shape[0] // 2, picture.shape[1] // 2
        images += [picture, picture[:y, :x], picture[:y, x:], picture[y:, :x], picture[y:, x:]]
    return images


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MissingExtraError("ONNX export", extra="onnx") from error


def _pixels_for_check(model: Embedder, images: Sequence[ImageSource] | None) -> NDArray[np.uint8]:
    """Return (n, C, H, W) pixels of up to 64 of the images, spread evenly over them."""
    given: Sequence[ImageSource] = sample_images() if images is None else images
    if not len(given):
        raise ConfigError("the check of an export needs an image; got none")
    places = np.unique(np.linspace(0, len(given) - 1, _CHECKED).round().astype(int))
    return np.stack([model.preprocess(given[place]) for place in places])


def _data_path(path: str | os.PathLike[str], fingerprint: str) -> Path:
    """Return where large weights go: a name of this model alone, so that an older file never meets newer weights."""
    target = Path(os.path.realpath(path))
    return target.with_name(f"{target.name}-{fingerprint.removeprefix('sha256:')[:8]}.data")


def _to_onnx(network: EmbeddingNet, opset: int) -> Any:
    """Return the network as an `onnx.ModelProto`, with any number of images in a batch."""
    example = torch.zeros(2, *network.input_shape, dtype=torch.uint8)  # 2: of one image torch would make a constant
    # With gradients on, `vitembed.vit.kernels` stays away from oneDNN's operator, which ONNX does not have.
    with torch.enable_grad():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError(f"torch cannot export this network to ONNX: {reason}") from error
    assert program is not None  # it is where `dynamo` is
    graph = program.model_proto
    (written,) = (imported.version for imported in graph.opset_import if not imported.domain)
    if written != opset:
        raise ConfigError(f"torch cannot export this network with opset {opset}, but with {written}")
    return graph


def _describe(graph: Any, model: Embedder) -> None:
    """Put what a user of the file has to know into it, in place of the exporter's notes.

    The notes hold stack traces, with the paths of this machine.
    """
    import onnx

    inner = graph.graph
    for part in (*inner.node, *inner.value_info, *inner.initializer, *inner.input, *inner.output, inner):
        del part.metadata_props[:]
    channels, height, width = model.network.input_shape
    usage = (
        f"{INPUT}: uint8 (N, {channels}, {height}, {width}), values in [0, 255], not normalised: the file does that; "
        f"images prepared as `preprocess` says. {OUTPUT}: float32 (N, {model.dim}), rows of length 1. The score of "
        "two images is the dot product of their rows."
    )
    graph.producer_name, graph.producer_version, graph.doc_string = "vitembed", __version__, usage
    texts = {
        "fingerprint": model.fingerprint,
        "preprocess": json.dumps(model.preprocess.to_dict()),
        "dim": str(model.dim),
        "pooling": model.network.pooling,
        "vitembed": __version__,
        "usage": usage,
    }
    onnx.helper.set_model_props(graph, texts)


def _write(graph: Any, path: Path, data: Path | None) -> None:
    """Write the graph, with its weights in a second file if one is named."""
    import onnx

    if data is None:
        path.write_bytes(graph.SerializeToString())
    else:
        onnx.save_model(graph, path, save_as_external_data=True, location=data.name)


def _point_to(graph: Any, path: Path, name: str) -> None:
    """Write the graph once more, whose weights are about to get another file name."""
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(graph.SerializeToString())


def _run(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return onnxruntime's embeddings of (n, C, H, W) pixels, taken in batches of 1, 3, 1, 3 ...

    Raises:
        CheckpointError: if onnxruntime cannot load or run the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it would print what it also raises
    whole = pixels if len(pixels) >= 4 else np.resize(pixels, (4, *pixels.shape[1:]))  # repeats them
    rows: list[NDArray[np.float32]] = []
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        for start in range(0, len(whole), 4):
            for batch in (whole[start : start + 1], whole[start + 1 : start + 4]):
                rows += session.run([OUTPUT], {INPUT: batch}) if len(batch) else []
    except Exception as error:  # onnxruntime has a class of exception for each of its codes, without a public name
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"onnxruntime cannot run the exported network, no file was left: {reason}") from error
    vectors: NDArray[np.float32] = np.concatenate(rows)[: len(pixels)]
    return vectors


def _largest_distance(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return the largest half squared distance of two rows: of unit rows, that is 1 - cosine.

    It loses no digits where the cosine is almost 1, and a row that is not of length 1 does not go unseen.
    """
    if got.shape != expected.shape:
        return float("inf")
    difference = got.astype(np.float64) - expected.astype(np.float64)
    return float((difference**2).sum(axis=1).max() / 2)


def _refusal(network: EmbeddingNet, path: str | os.PathLike[str], distance: float) -> str:
    merging = getattr(getattr(network.backbone, "config", None), "merge", 0)
    hint = "; which tokens merge can turn on a rounding: merge=0 is exact" if merging else ""
    return (
        f"the exported network's embeddings differ from torch's by a cosine distance of up to {distance:.1e}; at most "
        f"{TOLERANCE:.0e} is accepted, and {os.fspath(path)} was not written{hint}"
    )
