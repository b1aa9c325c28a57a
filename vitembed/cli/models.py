"""Opening a model on the command line: whatever names one, and where an index or a verifier finds its own."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vitembed.cli.output import warn
from vitembed.errors import CheckpointError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder

MODEL = "A model's folder, or a name: ink, which ships with vitembed, torchvision:vit_b_16 and the like, or a hub id."
DEFAULT = "ink"  # the model where none is named


def open_model(name: str, device: str | None = None) -> "Embedder":
    """Load a model, and say what had to be assumed of somebody else's weights.

    Raises:
        CheckpointError: if there is no model under that name.
    """
    from vitembed.embedder import Embedder

    if not name:
        raise CheckpointError("the name of the model is empty")
    with warnings.catch_warnings(record=True) as told:  # one line each, as everything that is said here
        warnings.simplefilter("always", UserWarning)
        model = Embedder.from_pretrained(name, device=device)
    for warning in told:
        warn(str(warning.message))
    for note in model.provenance.get("notes", ()):
        warn(f"{name}: {note}")
    return model


def location_of(name: str) -> str:
    """Return what to record of a model: the absolute path of a folder or file, any other name as it is."""
    from vitembed.weights import SHIPPED

    path = Path(name)
    return str(path.absolute()) if name not in SHIPPED and path.exists() else name


def find_model(owner: Path, recorded: str | None, given: str | None) -> str:
    """Return the name of the model that an index or a verifier belongs to.

    Raises:
        CheckpointError: if none is named, or the recorded one is no longer there.
    """
    if given is not None:
        return given
    if recorded is None:
        raise CheckpointError(f"{owner} does not say where its model is; name it with --model")
    if Path(recorded).is_absolute() and not Path(recorded).exists():
        raise CheckpointError(f"{owner} was made with the model {recorded}, which is not there; name it with --model")
    return recorded
