"""Our own weights on disk: safetensors files in and out, their fingerprint, and what does not fit a network.

Our files are safetensors, which hold tensors and text and can run no code. The JSON that describes the network travels
in the file's own header, so that weights and description cannot drift apart.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitembed.errors import CheckpointError
from vitembed.files import atomic_path

FORMAT = 2  # of the folder of a saved embedder; a reader refuses any other
WEIGHTS = "model.safetensors"
DESCRIBED = ("vit", "backbone", "pooling", "dim", "preprocess")  # what a fingerprint covers beside the weights
PROJECTION, BACKBONE = "projection.weight", "backbone."  # what a fingerprint calls them

_HEADER_KEY = "vitembed"  # safetensors headers map text to text: ours is one JSON document under this key


def fingerprint(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Return "sha256:..." of weights and a JSON description: equal if and only if both are equal.

    Args:
        state: tensors by name; names, types, shapes and bytes count, their order and device do not.
        description: JSON types; the order of keys does not count.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def save_weights(path: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and their JSON description as one safetensors file, wholly or not at all.

    Raises:
        VitembedError: if the folder cannot be written or the disk is full; an older file is then unchanged.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    places = Counter(tensor.data_ptr() for tensor in tensors.values())
    # The format knows no tied weights: each name gets a copy of its own.
    tensors = {n: tensor.clone() if places[tensor.data_ptr()] > 1 else tensor for n, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_HEADER_KEY: json.dumps(description, sort_keys=True)})
        except SafetensorError as error:  # it wraps what the operating system said
            raise CheckpointError(f"cannot write {path}: {error}") from error


def is_ours(path: Path) -> bool:
    """Tell whether a file is one that `save_weights` wrote; a damaged or unreadable one is not."""
    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Returns:
        The tensors by name, on the processor, and the description.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}; expected a file that save_pretrained wrote")
    try:
        with path.open("rb"):  # the library calls a file that may not be read missing
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); save the model again") from error
    if _HEADER_KEY not in header:
        raise CheckpointError(f"{path} holds tensors but no description of a vitembed model in its header")
    try:
        description = json.loads(header[_HEADER_KEY])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its description is no JSON ({error})") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is damaged: its description is no JSON object")
    return state, description


def is_saved_model(folder: Path) -> bool:
    """Tell whether a folder holds an embedder of ours, whole or damaged: its weights or its config.json say so."""
    if is_ours(folder / WEIGHTS):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"fingerprint", *DESCRIBED} <= config.keys()


def read_saved_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description of a saved embedder, whose values are still to be judged.

    Args:
        path: the folder, or its file of weights, which is complete by itself.

    Raises:
        CheckpointError: if it is missing, damaged, of another format, lacks a key, or if the folder's config.json
            was edited.
    """
    file = path / WEIGHTS if path.is_dir() else path
    state, header = load_weights(file)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {header.get('format')!r}; this vitembed reads {FORMAT}: "
            "load it with the vitembed that wrote it, or train it again"
        )
    missing = {*DESCRIBED, "provenance", "fingerprint"} - header.keys()
    if missing:
        raise CheckpointError(f"{file} is damaged: its description lacks {', '.join(sorted(missing))}")
    if path.is_dir():
        _check_readable_copy(path / "config.json", header)
    return state, header


def split_projection(
    state: Mapping[str, Tensor], *, projects: bool, has_head: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Part the tensors of a saved ViT from the projection after it.

    The file has the projection as a head whose bias is zero, as timm has it for CLIP, unless the ViT has a head.

    Args:
        state: tensors by the names of the file.
        projects: whether the description says that there is a projection.
        has_head: whether the ViT has a classification head of its own.

    Returns:
        The tensors of the ViT, and the (D, W) projection; None where the file has none.
    """
    rest = dict(state)
    if not projects:
        return rest, None
    if not has_head and {"head.weight", "head.bias"} <= rest.keys():
        del rest["head.bias"]
        return rest, rest.pop("head.weight")
    return rest, rest.pop(PROJECTION, None)


def _check_readable_copy(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse a config.json that somebody edited: the change would have no effect, which must not pass unsaid.

    A copy with another fingerprint is that of an earlier model: saving was interrupted between the two files.
    """
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it: the weights' file carries a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); delete it: the weights' file carries a copy")
    if config.get("fingerprint") != header["fingerprint"]:
        return
    for key in DESCRIBED:
        if config.get(key) != header[key]:
            raise CheckpointError(
                f"{path} and {WEIGHTS} describe different models ({key!r} differs); "
                "delete config.json to load the model as it was saved"
            )


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into a network whose names and shapes must all fit.

    Raises:
        CheckpointError: naming what only the network has (-) and what only the file has (+), with the shapes; a name
            that both have with different shapes stands with both.
    """
    check_fit({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, state, source)
    module.load_state_dict(dict(state))


def check_fit(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare a state with the names and shapes that a network has.

    Raises:
        CheckpointError: as for `load_state`.
    """
    differences = _differences(expected, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if differences:
        shown = ", ".join(differences[:8]) + (f" and {len(differences) - 8} more" if len(differences) > 8 else "")
        raise CheckpointError(
            f"the weights of {source} do not fit the network it describes (- network, + file): {shown}"
        )


def _differences(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List names with their shapes: first what both have in other shapes, then in turns what one side alone has.

    Turns put a parameter next to the one that stands in its place under another name, and none of the two sides fills
    the part of a long list that is shown.
    """
    other_shape = [f"-{n} {s} +{n} {theirs[n]}" for n, s in ours.items() if n in theirs and theirs[n] != s]
    missing = [f"-{name} {shape}" for name, shape in ours.items() if name not in theirs]
    unexpected = [f"+{name} {shape}" for name, shape in theirs.items() if name not in ours]
    turns = [entry for pair in itertools.zip_longest(missing, unexpected) for entry in pair if entry is not None]
    return other_shape + turns
