"""The files that an interrupted training goes on from: `OUT/checkpoints/step-00001234.pt`.

A checkpoint is a dictionary of tensors, numbers, texts, lists and dictionaries, written as one file to a temporary
name and renamed, so that a killed process or a full disk leaves the checkpoint before it. It is read with torch's
`weights_only`, which runs no code of the file.
"""

import pickle
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vitembed.errors import CheckpointError, TrainingError, VitembedError
from vitembed.files import atomic_path

FORMAT = 1
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one training.

    Args:
        out: the training's folder.
        kept: how many of the latest are kept.
        every_steps: a checkpoint is due after so many steps; None for never.
        every_minutes: and after so much time.
    """

    def __init__(self, out: Path, *, kept: int, every_steps: int | None, every_minutes: float) -> None:
        self._folder = out / FOLDER
        self._kept, self._every_steps, self._every_minutes = kept, every_steps, every_minutes
        self._saved_at, self._saved_step = time.monotonic(), 0

    def due(self, step: int) -> bool:
        """Tell whether it is time for the next, after so many steps of the whole training."""
        if self._every_steps is not None and step - self._saved_step >= self._every_steps:
            return True
        return time.monotonic() - self._saved_at >= 60 * self._every_minutes

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint after so many steps, and remove those that are too old.

        Raises:
            TrainingError: if it cannot be written; the checkpoints before it are still there.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            with atomic_path(self._folder / f"step-{step:08d}.pt") as temporary, temporary.open("wb") as file:
                _save({"format": FORMAT, **state}, file)
        except (VitembedError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            earlier = list_checkpoints(self._folder.parent)
            kept = f"{earlier[-1].name} before it is intact" if earlier else "there is none before it"
            raise TrainingError(
                f"cannot save the checkpoint of step {step} in {self._folder}: {reason}; {kept}: when that is mended, "
                "go on with resume"
            ) from error
        self._saved_at, self._saved_step = time.monotonic(), step
        if step:  # at the beginning others may stand here that are later, of another training
            self._prune(self._kept)

    def finish(self, step: int, state: Mapping[str, Any]) -> None:
        """Leave one small checkpoint that says how the training ended, in the place of all others."""
        self.save(step, state)
        self._prune(1)

    def load(self) -> dict[str, Any] | None:
        """Return the latest checkpoint; None if there is none.

        Raises:
            CheckpointError: if it cannot be read, or a newer version of vitembed wrote it.
        """
        found = list_checkpoints(self._folder.parent)
        if not found:
            return None
        state = _read(found[-1], len(found) > 1)
        self._saved_step = int(found[-1].stem.removeprefix("step-"))
        return state

    def _prune(self, kept: int) -> None:
        for old in list_checkpoints(self._folder.parent)[:-kept]:
            old.unlink(missing_ok=True)
        for leftover in self._folder.glob(".step-*.pt"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)


def is_first(path: Path) -> bool:
    """Tell whether a checkpoint was written before any step."""
    return int(path.stem.removeprefix("step-")) == 0


def list_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a training's folder, oldest first."""
    return sorted((out / FOLDER).glob("step-*.pt"))


class _Noting:
    """A file that remembers why a write failed, which torch reports as a position that it did not expect."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write as the file does."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Flush as the file does."""
        self._file.flush()


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a dictionary as torch does.

    Raises:
        OSError: if the disk is full or fails.
    """
    noting = _Noting(file)
    try:
        torch.save(dict(state), noting)  # type: ignore[arg-type]  # it asks for no more than this
    except RuntimeError as error:
        if noting.error is None:
            raise
        raise noting.error from error


def _read(path: Path, has_older: bool) -> dict[str, Any]:
    advice = "remove it to go on from the one before" if has_older else "start again, with overwrite"
    try:
        with zipfile.ZipFile(path) as archive:  # checksums, which torch does not look at for every entry
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged; {advice}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]}); {advice}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {state.get('format')}, and this version of vitembed reads {FORMAT}: update vitembed"
        )
    return state
