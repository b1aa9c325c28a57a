"""The folder that a training writes into, and the weights it keeps meanwhile."""

import os
from pathlib import Path

from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, TrainingError
from vitembed.training.checkpoints import list_checkpoints


def check_out(out: str | os.PathLike[str] | None, overwrite: bool, *, resume: bool = False) -> Path | None:
    """Return the folder as a path; None for none.

    Args:
        out: the folder.
        overwrite: whether it may hold a model, or a training that was interrupted.
        resume: whether the training in it goes on.

    Raises:
        ConfigError: if there is no folder to resume from, or it is to be kept and overwritten at once.
        TrainingError: if it holds what may not be overwritten, or a model whose training left nothing to resume from.
    """
    if resume and overwrite:
        raise ConfigError("resume goes on with what a folder holds and overwrite discards it; choose one of them")
    if out is None:
        if resume:
            raise ConfigError("resume needs the folder of the training that is to go on")
        return None
    folder = Path(out)
    has_model, has_checkpoints = (folder / "model.safetensors").exists(), bool(list_checkpoints(folder))
    if resume and has_model and not has_checkpoints:
        raise TrainingError(f"{folder} holds a model, but no checkpoint to resume from; overwrite it to start again")
    if has_checkpoints and not (resume or overwrite or has_model):
        raise TrainingError(
            f"{folder} holds a training that was interrupted; resume it, choose another folder, or overwrite it on "
            "purpose"
        )
    if has_model and not (resume or overwrite):
        of_training = (
            ", and the checkpoints of its training: resume it if it was interrupted," if has_checkpoints else ";"
        )
        raise TrainingError(
            f"{folder} already holds a model{of_training} choose another folder, or overwrite it on purpose"
        )
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
