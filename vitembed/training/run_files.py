"""The folder of a training: the best model, its history, the suspects, and checkpoints to go on from.

In several processes the first one writes and the others look on.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitembed.embedder import Embedder
from vitembed.files import atomic_write
from vitembed.plots import plot_history
from vitembed.training.checkpoints import Checkpoints
from vitembed.training.config import Safeguards
from vitembed.training.distributed import barrier, on_main
from vitembed.training.hard_negatives import Mined, write_suspects
from vitembed.training.identity import check_same
from vitembed.training.outputs import make_folder
from vitembed.training.run import Run

SUSPECTS = "suspected_label_errors.csv"
UNREADABLE = "unreadable.csv"


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

    def begin(self, *, resume: bool) -> None:
        """Go on from the last checkpoint, or make the folder and write the first, before any step.

        Raises:
            CheckpointError: if the folder holds another training, or the checkpoint is damaged.
            TrainingError: if the folder cannot be written.
        """
        if self.folder is None or self._checkpoints is None:
            return
        state = self._checkpoints.load() if resume else None
        if state is None:
            barrier()  # until all have seen that there is none
            if on_main():
                make_folder(self.folder)
                self._checkpoints.start()
            self.save()
            return
        check_same(state["identity"], self._described, str(self.folder))
        if "finished" in state:
            self._run.load_summary(state["finished"], Embedder.from_pretrained(self.folder, device=self._model.device))
        else:
            self._run.load_state_dict(state["run"])

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            TrainingError: if it cannot be written; those before it are still there.
        """
        if self._checkpoints is None:
            return
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
                self._run.save_best(self.folder)
            atomic_write(self.folder / "history.json", json.dumps(self._run.history, indent=1) + "\n")
            self._write_unreadable(self.folder)
            atomic_write(self.folder / "curve.png", plot_history(self._run.history, self._run.best_epoch))
        self.save()

    def finish(self) -> None:
        """Put one small file in the place of the checkpoints: it says that there is nothing left to do."""
        if self._checkpoints and on_main():
            state = {"identity": self._described, "finished": self._run.summary()}
            self._checkpoints.finish(self._run.step, state)
