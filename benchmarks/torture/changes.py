"""The changes that a writer makes at random, what each does to an index, and what it must do to its entries.

An operation is a small mapping that JSON can hold, so that it can stand in a log: `{"kind": "add", "names": [...],
"step": 7}`. A folder of pictures (files of text: the model embeds their bytes) is kept in step by `sync`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.torture import entries
from benchmarks.torture.entries import DIM, Entry, State, add, put, vector_of, vectors_of
from vitembed.index import Index, Records, sync

Operation = dict[str, Any]

# Names are drawn from these, so that many an add replaces and the index stays small.
NAMES = [f"name {n}" if n % 3 else f"ä/猫 😀 {n}.png" for n in range(2_400)]

PHOTOS = 120

# Each kind with how often it comes: cheap ones more often, so that most lives of a writer hold several done ones.
_WEIGHTS = {"add": 4, "remove": 4, "transaction": 4, "compact": 4, "sync": 1, "optimize": 1, "rewrite": 1}
KINDS = tuple(_WEIGHTS)


def draw(random: np.random.Generator, state: State, step: int, kind: str | None = None) -> Operation:
    """Draw an operation on an index that holds these entries."""
    kind = kind or str(random.choice(KINDS, p=np.array(list(_WEIGHTS.values())) / sum(_WEIGHTS.values())))
    match kind:
        case "add":
            return {"kind": kind, "names": _some(random, NAMES, 300), "step": step}
        case "remove":
            return {"kind": kind, "names": _some(random, _named(state), 60)}
        case "transaction":
            parts = [draw(random, state, step, part) for part in ("add", "remove")]
            removed = set(parts[0]["names"])
            parts[1]["names"] = [name for name in parts[1]["names"] if name not in removed]
            return {"kind": kind, "parts": parts}
        case "optimize":
            return {"kind": kind, "structure": str(random.choice(entries.KINDS))}
        case _:
            return {"kind": kind, "step": step}


def do(index: Index, operation: Operation, model: "FileModel", folder: Path) -> None:
    """Do an operation to an index."""
    match operation["kind"]:
        case "add":
            add(index, {}, operation["names"], operation["step"])
        case "remove":
            index.remove(operation["names"])
        case "transaction":
            with index.transaction():
                for part in operation["parts"]:
                    do(index, part, model, folder)
        case "sync":
            sync(index, model, folder, batch_size=32, workers=0)
        case "compact":
            index.compact()
        case "optimize":
            entries.optimise(index, operation["structure"])
        case "rewrite":
            # All of them are read before the first is replaced.
            index.rewrite(list(_rewritten(index, operation["step"])), DIM, index.fingerprint, index.location)


def applied(state: State, operation: Operation, folder: Path) -> State:
    """Return what an index holds after an operation, given what it held before."""
    after = dict(state)
    match operation["kind"]:
        case "add":
            add(SimpleNamespace(add=lambda *_: None), after, operation["names"], operation["step"])  # type: ignore[arg-type]
        case "remove":
            for name in operation["names"]:
                del after[name]
        case "transaction":
            for part in operation["parts"]:
                after = applied(after, part, folder)
        case "sync":
            after = synced(after, folder)
        case "rewrite":
            step = operation["step"]
            after = {name: Entry(f"{name}@{step}", one.metadata, one.content) for name, one in after.items()}
    return after


def synced(state: State, folder: Path) -> State:
    """Return what an index holds after `sync` with a folder: an unchanged file keeps its entry."""
    after = dict(state)
    files = {path.name: path.read_text() for path in folder.iterdir()}
    for name, one in state.items():
        if one.content is not None and name not in files:
            del after[name]
    for name, content in sorted(files.items()):
        if name not in state or state[name].content != content:
            put(after, {name: Entry(f"photo {content}", {"path": str(folder / name)}, content)})
    return after


def change_photos(random: np.random.Generator, folder: Path, step: int) -> None:
    """Add, change and delete some files of a folder, each content new."""
    folder.mkdir(exist_ok=True)
    present = sorted(folder.iterdir())
    for path in present:
        if random.random() < 0.15:
            path.unlink()
    while len(list(folder.iterdir())) < PHOTOS:
        name = f"photo {random.integers(10**9)}.png"
        (folder / name).write_text(f"{name} at {step}")
    for path in sorted(folder.iterdir()):
        if random.random() < 0.15:
            path.write_text(f"{path.name} again at {step}")


@dataclass(frozen=True)
class Embedded:
    """A batch of embedded files, as `sync` wants it."""

    positions: "np.typing.NDArray[np.int64]"
    vectors: "np.typing.NDArray[np.float32]"
    failures: list[Any]


@dataclass(frozen=True)
class FileModel:
    """Embeds files by their content, and says which.

    Attributes:
        say: called with the content of every file that is embedded.
    """

    say: Callable[[str], None]
    dim: int = DIM
    fingerprint: str = "sha256:torture"

    def stream(self, images: Sequence[Any], *, batch_size: int = 64, workers: int | None = None) -> Iterator[Embedded]:
        """Embed files lazily, in order."""
        for start in range(0, len(images), batch_size):
            contents = [Path(os.fspath(image)).read_text() for image in images[start : start + batch_size]]
            for content in contents:
                self.say(content)
            vectors = vectors_of([f"photo {content}" for content in contents])
            yield Embedded(np.arange(start, start + len(contents)), vectors, [])


def _rewritten(index: Index, step: int) -> Iterator[Records]:
    for records in index.stream(500):
        vectors = np.stack([vector_of(f"{name}@{step}") for name in records.ids])
        yield Records(records.ids, vectors, records.metadata)


def _named(state: State) -> list[str]:
    return [name for name, one in state.items() if one.content is None]


def _some(random: np.random.Generator, names: list[str], most: int) -> list[str]:
    size = min(int(random.integers(1, most + 1)), len(names))
    return [names[n] for n in random.choice(len(names), size, replace=False)]
