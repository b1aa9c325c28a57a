"""Tensors of other people's files: safetensors, and pickles of tensors that may run no code.

A pickle is a program. It is read by torch's restricted unpickler, which knows tensors and plain containers and stops
at everything else; `argparse.Namespace`, which training scripts leave beside the weights, is let through: it is a bag
of attributes.
"""

import argparse
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitembed.errors import CheckpointError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLES)

# What a folder's weights are called, best first: transformers and timm, whole or an index of several, then OpenCLIP.
FILE_GROUPS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("open_clip_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
)
FILES = tuple(name for group in FILE_GROUPS for name in group)

# Where training scripts put the weights, best first: the averaged ones are those that their authors evaluate.
WRAPPERS = ("teacher", "model_ema", "state_dict_ema", "ema", "state_dict", "model", "module", "student")


def weights_in(folder: Path) -> Path:
    """Return the file of a folder that holds its weights, or the index of several.

    Raises:
        CheckpointError: if there is none.
    """
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(FILES)}")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file of weights, or all that an index names.

    Args:
        path: a safetensors file, a pickle of tensors, or an index of either.

    Returns:
        Tensors by the names of the file, on the processor, and notes on what was chosen.

    Raises:
        CheckpointError: if the file is missing, empty, damaged, would run code, or holds no state dict.
    """
    if path.name.endswith(".index.json"):
        state: dict[str, Tensor] = {}
        for shard in _shards(path):
            state |= read_tensors(shard)[0]
        return state, []
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is no file of weights that is known; expected {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download or save it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), []
    return unwrap(_unpickle(path), str(path))


def unwrap(content: object, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Find the state dict in what a training script saved.

    Args:
        content: what the file holds.
        source: what to call it in errors.

    Returns:
        Tensors by name, and notes on which of several was taken.

    Raises:
        CheckpointError: if there is none, or if something that is no tensor lies in it.
    """
    notes = []
    while isinstance(content, Mapping):
        present = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not present:
            break
        if len(present) > 1:
            notes.append(f"read {present[0]!r} and left out {', '.join(map(repr, present[1:]))}")
        content = content[present[0]]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{source} holds no state dict but {_brief(content)}; save model.state_dict()")
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if odd:
        raise CheckpointError(
            f"{source} mixes tensors with other things ({', '.join(odd[:4])}); save model.state_dict()"
        )
    return dict(content), notes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is missing or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, got {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); download it again") from error


def _unpickle(path: Path) -> object:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickle protocols and archive formats; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors ({_forbidden(error)}), or is damaged; nothing of it was run, because "
            "unpickling can run code; save model.state_dict() as safetensors"
        ) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, a program, which is not run; if it is CLIP as OpenAI publishes it, "
                "load it with the package clip and save model.state_dict()"
            ) from error
        raise CheckpointError(f"{path} is damaged or no file of torch ({_line(error)}); download it again") from error
    except Exception as error:  # damage of a pickle shows as nearly every kind of exception
        raise CheckpointError(f"{path} is damaged or no file of torch ({_line(error)}); download it again") from error


def _forbidden(error: Exception) -> str:
    """Name what the restricted unpickler stopped at, where it says so."""
    words = str(error).replace("`", " ").split()
    return words[words.index("GLOBAL") + 1] if "GLOBAL" in words[:-1] else "no name is given"


def _line(error: Exception) -> str:
    """Return the first sentence of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0][:200]


def _brief(content: object) -> str:
    if isinstance(content, Mapping):
        keys = list(map(str, content))
        return f"a dictionary of {', '.join(keys[:4]) or 'nothing'}{', ...' if len(keys) > 4 else ''}"
    return f"a {type(content).__name__}"


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names; they lie beside it, wherever the names point to."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of file names")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing[:4])}; download them, too")
    return [index.parent / name for name in names]
