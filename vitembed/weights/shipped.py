"""The models that ship with vitembed: package data under `vitembed/models/NAME`, found by name and without a network.

Beside what `Embedder.save_pretrained` writes (config.json, model.safetensors, README.md, the model card) such a folder
holds `NAME.verifier`, a `Verifier` with a threshold for the model, and `figures.json`, what was measured and how.
`recipes/ink.py` makes one.
"""

import warnings
from pathlib import Path

from vitembed.errors import CheckpointError
from vitembed.weights.store import WEIGHTS, is_ours

SHIPPED = ("ink",)  # of handwritten characters
FIGURES = "figures.json"

_ROOT = Path(__file__).resolve().parent.parent / "models"


def shipped_folder(name: str) -> Path:
    """Return the folder of a model that ships with vitembed.

    Raises:
        CheckpointError: no such model ships, or its files are missing.
    """
    folder = _ROOT / name
    if name not in SHIPPED:
        raise CheckpointError(f"no model {name!r} ships with vitembed; expected {', '.join(SHIPPED)}")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"the model {name!r} is missing from this installation ({folder}); install vitembed anew")
    return folder


def shipped_verifier(name: str) -> Path:
    """Return the file of the verifier that ships beside a model.

    Raises:
        CheckpointError: as for `shipped_folder`.
    """
    file = shipped_folder(name) / f"{name}.verifier"
    if not file.is_file():
        raise CheckpointError(
            f"the verifier of {name!r} is missing from this installation ({file}); install vitembed anew"
        )
    return file


def warn_of_namesake(name: str) -> None:
    """Warn if the current folder holds a model under the name of one that ships, which is taken instead."""
    local = Path(name)
    if (local / "config.json").is_file() or is_ours(local / WEIGHTS):
        warnings.warn(
            f"{name!r} is taken as the model that ships with vitembed; the one here is ./{name}",
            UserWarning,
            stacklevel=4,
        )
