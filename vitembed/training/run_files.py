"""The folder of a training: the best model, its history, the suspects, and checkpoints to go on from.

In several processes the first one writes and the others look on.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from vitembed.embedder import Embedder
from vitembed.errors import TrainingError
from vitembed.files import atomic_write
from vitembed.plots import plot_history
from vitembed.training.checkpoints import FOLDER, Checkpoints, is_first, list_checkpoints
from vitembed.training.config import Safeguards
from vitembed.training.distributed import barrier, check_alike, on_main
from vitembed.training.hard_negatives import Mined, write_suspects
from vitembed.training.identity import check_resumable
from vitembed.training.outputs import make_folder
from vitembed.training.run import Run

SUSPECTS = "suspected_label_errors.csv"
UNREADABLE = "unreadable.csv"
HISTORY = "history.json"
CURVE = "curve.png"
SETTINGS = "settings.toml"
LOCK = ".lock"


class RunFiles:
    """What a training leaves in its folder; without a folder nothing.

    Args:
        folder: where; None for nowhere.
        model: what is trained.
        run: the training.
        described: its `identity`.
        safeguards: when checkpoints are due.
    """

    def __init__(
        self, folder: Path | None, model: Embedder, run: Run, described: Mapping[str, Any], safeguards: Safeguards
    ) -> None:
        self.folder = folder
        self._model, self._run, self._described = model, run, dict(described)
        self._held: IO[str] | None = None
        self._checkpoints: Checkpoints | None = None
        if folder is not None:
            self._checkpoints = Checkpoints(
                folder,
                kept=safeguards.checkpoints_kept,
                every_steps=safeguards.checkpoint_steps,
                every_minutes=safeguards.checkpoint_minutes,
            )

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._checkpoints is not None and self._checkpoints.due(self._run.step)

    def begin(self, *, resume: bool, settings: str | None = None) -> None:
        """Go on from the last checkpoint, or make the folder and write the first, before any step.

        Raises:
            CheckpointError: if the folder holds another training, or the checkpoint is damaged.
            TrainingError: if the folder cannot be written.
        """
        if self.folder is None or self._checkpoints is None:
            return
        self._lock()
        state = self._checkpoints.load() if resume else None
        check_alike({"the checkpoint to go on from": None if state is None else _place(state)})
        if state is None:
            barrier()  # until all have seen that there is none
            self._begin_anew(settings)
            return
        check_resumable(state["identity"], self._described, str(self.folder))
        if "finished" in state:
            self._run.load_summary(state["finished"])
        else:
            self._run.load_state_dict(state["run"])

    def _begin_anew(self, settings: str | None) -> None:
        """Write the first checkpoint, and only then remove what an earlier training left."""
        if self.folder is None or self._checkpoints is None:
            return
        earlier = list_checkpoints(self.folder)
        self.save()
        if not on_main():
            return
        stale = [self.folder / name for name in (SUSPECTS, UNREADABLE, HISTORY, CURVE)]
        for path in [*stale, *(path for path in earlier if not is_first(path))]:
            path.unlink(missing_ok=True)
        if settings is not None:
            atomic_write(self.folder / SETTINGS, settings)

    def _lock(self) -> None:
        """Keep other processes out of the folder until this one ends, however it ends.

        Raises:
            TrainingError: if one is in it already, or the folder cannot be made.
        """
        if self.folder is None or not on_main():
            return
        make_folder(self.folder)
        if sys.platform == "win32":  # which has other locks: two trainings in one folder are not told there
            return
        import fcntl

        make_folder(self.folder / FOLDER)
        self._held = (self.folder / FOLDER / LOCK).open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            raise TrainingError(
                f"{self.folder} is being written by another training; wait for it, or choose another folder"
            ) from error

    def close(self) -> None:
        """Let others into the folder again."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            TrainingError: if it cannot be written; those before it are still there.
        """
        if self._checkpoints is None:
            return
        self._run.check_sound()
        state = self._run.state_dict()  # in all processes: each adds its own part
        if on_main():
            self._checkpoints.save(self._run.step, {"identity": self._described, "run": state})

    def write_suspects(self, mined: Mined) -> None:
        """Write the images whose labels a search for hard negatives has put in doubt."""
        if self.folder and on_main():
            write_suspects(self.folder / SUSPECTS, self._run.dataset, mined)

    def _write_unreadable(self, folder: Path) -> None:
        """Write the images that were set aside because they cannot be read, if there are any."""
        if not self._run.unreadable:
            return
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerows([("path", "reason"), *self._run.unreadable.items()])
        atomic_write(folder / UNREADABLE, text.getvalue())

    def end_epoch(self) -> None:
        """Write the model, if it is the best so far, and the history; then a checkpoint."""
        if self.folder and on_main():
            if self._run.best_epoch == len(self._run.history):
                with self._run.averaged():
                    self._model.save_pretrained(self.folder)
            atomic_write(self.folder / HISTORY, json.dumps(self._run.history, indent=1) + "\n")
            self._write_unreadable(self.folder)
            atomic_write(self.folder / CURVE, plot_history(self._run.history, self._run.best_epoch))
        self.save()

    def finish(self) -> None:
        """Put one file in the place of the checkpoints: it says that there is nothing left to do.

        The model is written again: where arithmetic is not repeated to the bit, as on a GPU, a training that was
        killed and resumed may have left one of an epoch that was not the best after all.
        """
        summary = self._run.summary()  # in all processes: each adds its own part
        if self.folder and self._checkpoints and on_main():
            self._model.save_pretrained(self.folder)
            self._checkpoints.finish(self._run.step, {"identity": self._described, "finished": summary})


def _place(state: Mapping[str, Any]) -> int:
    """Return the step that a checkpoint was written after."""
    return int(state["finished" if "finished" in state else "run"]["step"])
