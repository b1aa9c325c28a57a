"""The folder that a training writes into, and the weights it keeps meanwhile."""

import os
from pathlib import Path

from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import TrainingError


def check_out(out: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    """Return the folder as a path; None for none.

    Raises:
        TrainingError: if it holds a model that may not be overwritten.
    """
    if out is None:
        return None
    folder = Path(out)
    if (folder / "model.safetensors").exists() and not overwrite:
        raise TrainingError(f"{folder} already holds a model; choose another folder, or overwrite it on purpose")
    return folder


def make_folder(folder: Path) -> None:
    """Create a folder and those above it.

    Raises:
        TrainingError: if that is not allowed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot create the folder {folder}: {error.strerror}") from error


def snapshot(model: Embedder) -> dict[str, Tensor]:
    """Return a copy of the network's state, on the processor."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
