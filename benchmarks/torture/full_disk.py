"""Every kind of write on a disk that is full, or fills while it is written, or cannot be written at all.

The disk is a small one in memory (tmpfs), which only root can mount. A ballast file leaves so many bytes free; where a
write fails moves with that number. The write must then succeed, or raise a `VitembedError` of one line and leave the
index as it was; with the ballast gone it must succeed.
"""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.torture import changes, entries, processes
from benchmarks.torture.damage import Sample, fill
from benchmarks.torture.entries import DIM, State, Truth, add, vector_of
from vitembed.errors import VitembedError
from vitembed.index import Index

FREE_KB = (0, 0, 4, 8, 16, 24, 36, 40, 48, 64, 80, 100, 130, 160, 200, 250, 300, 400, 600, 800, 1_000, 2_000)
"""What the ballast leaves, in KB: from nothing to enough."""

_LIMIT = 30.0  # seconds for one write and what is asked before and after it
_DISK_KB = 8_192
_NEW = [f"new/猫 {n}" for n in range(1_500)]

# What is written: given an open index and what it holds, it returns what the index must hold afterwards.
Write = Callable[[Index, State], State]


@dataclass
class Report:
    """What a run on a full disk has come to.

    Attributes:
        outcomes: how many, by (write, "refused", "done" or what it should not be).
        problems: what was wrong, with the write and the space that was free.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def can_mount() -> bool:
    """Tell whether this process may mount a disk."""
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk of 8 MB in memory at a new folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_KB}k", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def set_writable(disk: Path, writable: bool) -> None:
    """Make a small disk read-only, or writable again."""
    command = ["mount", "-o", f"remount,{'rw' if writable else 'ro'}", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


def fill_up(disk: Path, free: int) -> Path:
    """Write a ballast file that leaves `free` bytes; return it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - free, 1))
    return ballast


def writes(photos: Path) -> dict[str, Write]:
    """Return the kinds of writes to an index of the sample, by name."""

    def plain(operation: changes.Operation) -> Write:
        def write(index: Index, state: State) -> State:
            changes.do(index, operation, changes.FileModel(lambda content: None), photos)
            return changes.applied(state, operation, photos)

        return write

    def removal(index: Index, state: State) -> State:
        names = [name for name, one in state.items() if one.content is None][:1_000]
        return plain({"kind": "remove", "names": names})(index, state)

    def transaction(index: Index, state: State) -> State:
        with index.transaction():
            return plain({"kind": "add", "names": _NEW, "step": 99})(index, removal(index, state))

    table = {
        "add": plain({"kind": "add", "names": _NEW, "step": 99}),
        "remove": removal,
        "transaction": transaction,
        "sync": plain({"kind": "sync"}),
    }
    table |= {kind: plain({"kind": kind, "step": 99}) for kind in ("compact", "rewrite")}
    return table | {f"optimize {kind}": plain({"kind": "optimize", "structure": kind}) for kind in entries.KINDS}


def run(home: Path, sizes: Sequence[int] = FREE_KB) -> Report:
    """Do every kind of write with every size of free space; for every second one the disk is full from the start.

    Args:
        home: an empty folder to work in.
        sizes: what is free, in KB, when the write begins.
    """
    report = Report()
    sample = processes.run(partial(fill, home, "full", rows=2_000), _LIMIT).value
    photos = home / "full photos"
    for number in range(300):  # enough records of files for the catalog to grow
        (photos / f"more {number}.png").write_text(f"more {number}")
    with small_disk(home / "disk") as disk:
        for name, write in writes(photos).items():
            for number, size in enumerate(sizes):
                trial = partial(_try, disk, sample, write, size, late=number % 2 == 0)
                _note(report, name, size, processes.run(trial, _LIMIT))
        for size in sizes:
            _note(report, "create", size, processes.run(partial(_try_create, disk, size), _LIMIT))
    return report


def _note(report: Report, name: str, size: int, ended: processes.Ended) -> None:
    done, problems = ended.value if ended.how == "returned" else (False, [f"{ended.how}: {ended.value or ''}"[-300:]])
    outcome = "WRONG" if problems else "done" if done else "refused"
    report.outcomes[name, outcome] += 1
    report.problems += [f"{name} with {size} KB free: {problem}" for problem in problems]


def _try(disk: Path, sample: Sample, write: Write, size: int, late: bool) -> tuple[bool, list[str]]:
    """Write with so many KB free; return whether it was done, and what was wrong.

    With `late` the disk fills only after the index was opened and used.
    """
    path, state = disk / "x.index", sample.truths[0].state
    _empty(disk)
    shutil.copytree(sample.path, path)
    ballast = None if late else fill_up(disk, size << 10)
    try:
        index = Index.open(path)
    except VitembedError as error:
        fill_up(disk, _DISK_KB << 10)
        with Index.open(path) as index:
            return False, [*_one_line(error), *_again(index, state, write)]
    with index:
        problems = _compare(index, state, "before") if late else []
        ballast = ballast or fill_up(disk, size << 10)
        files = _files(path)
        try:
            after = write(index, state)
        except VitembedError as error:
            problems += _one_line(error) + _compare(index, state, "on the full disk")
            ballast.unlink()
            problems += [f"left behind: {name}" for name in _files(path) - files]
            return False, problems + _again(index, state, write)
        ballast.unlink()
        problems += _compare(index, after, "afterwards", whole=True)
    with Index.open(path) as index:
        return True, problems + _compare(index, after, "opened again", whole=True)


def _again(index: Index, state: State, write: Write) -> list[str]:
    """Write with space enough, after a refusal; return what is wrong then, and in another process's eyes."""
    problems = _compare(index, state, "with space again")
    after = write(index, state)
    problems += _compare(index, after, "after the second try", whole=True)
    with Index.open(index.path) as other:
        return problems + _compare(other, after, "opened again", whole=True)


def _try_create(disk: Path, size: int) -> tuple[bool, list[str]]:
    """Create an index with so many KB free; return whether it was done, and what was wrong."""
    _empty(disk)
    ballast = fill_up(disk, size << 10)
    problems: list[str] = []
    try:
        Index.create(disk / "x.index", DIM).close()
        done = True
    except VitembedError as error:
        done = False
        problems += _one_line(error)
        problems += [f"left behind: {entry.name}" for entry in disk.iterdir() if entry != ballast]
    ballast.unlink()
    with Index.open(disk / "x.index") if done else Index.create(disk / "x.index", DIM) as index:
        state: State = {}
        add(index, state, ["a", "b"], 1)
        return done, problems + _compare(index, state, "afterwards", whole=True)


def _compare(index: Index, state: State, moment: str, whole: bool = False) -> list[str]:
    """Return what is wrong with an index; of the files that `sync` brought only when it is to be `whole`."""
    truth = Truth(state)
    problems: list[str] = []
    try:
        problems += [f"check: {line}" for line in index.check()]
        found: set[str] = set()
        for part in index.stream():
            for name, vector, metadata in zip(part.ids, part.vectors, part.metadata, strict=True):
                if whole or not name.endswith(".png") or "/" in name:
                    found.add(name)
                    problems += truth.wrong_entry(name, vector, metadata)
        missing = {name for name, one in state.items() if whole or one.content is None} - found
        problems += [f"{len(missing)} entries are missing"] if missing else []
        if whole:
            query = vector_of("query")
            problems += truth.wrong_answer(query, index.search(query, 10, recall=1.0)[0], 10)
    except VitembedError as error:
        problems.append(str(error))
    return [f"{moment}: {problem}" for problem in problems[:3]]


def _one_line(error: VitembedError) -> list[str]:
    return [f"an error of several lines: {error}"] if "\n" in str(error) else []


def _files(path: Path) -> set[str]:
    """Return the names of an index's files, and those that SQLite and `sync` make for themselves."""
    own = {"catalog.sqlite-wal", "catalog.sqlite-shm", "sync.lock"}
    return {str(entry.relative_to(path)) for entry in path.rglob("*")} | own


def _empty(disk: Path) -> None:
    for entry in disk.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
