"""Ways to break a file, and a run that breaks copies of filled indexes at random and judges what they then answer."""

import os
import random
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.torture import entries, processes
from benchmarks.torture.damage import GOOD, LIMIT, Report, Sample, ask, fill, judge

_PAGE = 4_096

LEFT = ("closed", "killed", "checkpointed")
"""How an index may have been left by its last process, see `fill`."""


def flip(path: Path, chance: random.Random) -> str:
    """Flip one bit, or up to 64 bytes in a row."""
    content = bytearray(path.read_bytes())
    start, size = chance.randrange(len(content)), chance.choice([1, 1, 1, chance.randint(2, 64)])
    for position in range(start, min(start + size, len(content))):
        content[position] ^= 1 << chance.randrange(8) if size == 1 else chance.randint(1, 255)
    path.write_bytes(content)
    return f"{size} bytes from {start} flipped"


def cut(path: Path, chance: random.Random) -> str:
    """Cut the file at a random place, sometimes at the beginning or shortly before the end."""
    size = path.stat().st_size
    length = chance.choice([0, size - 1, chance.randrange(size), chance.randrange(size) // _PAGE * _PAGE])
    with path.open("r+b") as file:
        file.truncate(length)
    return f"cut from {size} to {length} bytes"


def zero(path: Path, chance: random.Random) -> str:
    """Fill a page with zeros, as a disk does that lost a sector."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content)) // _PAGE * _PAGE
    size = min(_PAGE, len(content) - start)
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return f"page from {start} zeroed"


def grow(path: Path, chance: random.Random) -> str:
    """Append random bytes."""
    size = chance.randint(1, 3 * _PAGE)
    with path.open("ab") as file:
        file.write(chance.randbytes(size))
    return f"{size} bytes appended"


def move(path: Path, chance: random.Random) -> str:
    """Write one page of the file over another."""
    content = bytearray(path.read_bytes())
    pages = range(0, max(len(content) - _PAGE, 1), _PAGE)
    source, target = chance.choice(pages), chance.choice(pages)
    content[target : target + _PAGE] = content[source : source + _PAGE]
    path.write_bytes(content)
    return f"page from {source} written over that from {target}"


def delete(path: Path, chance: random.Random) -> str:
    """Delete the file."""
    path.unlink()
    return "deleted"


def swap(path: Path, chance: random.Random) -> str:
    """Exchange the file with another of the index."""
    other = chance.choice([file for file in sorted(path.parent.rglob("*")) if file.is_file() and file != path])
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"exchanged with {other.name}"


def replace(path: Path, chance: random.Random, stranger: Callable[[], Path]) -> str:
    """Put the file of the same name of another index in its place."""
    theirs = stranger() / path.name
    if not theirs.exists():
        return delete(path, chance)
    shutil.copyfile(theirs, path)
    return "replaced by that of another index"


def break_one(folder: Path, stranger: Callable[[], Path], chance: random.Random) -> tuple[Path, str]:
    """Break one file of an index; return which, and how.

    Args:
        folder: the index.
        stranger: makes another index of the same shape.
        chance: chooses.
    """
    path = chance.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    ways = [flip, flip, flip, flip, cut, cut, zero, move] if path.stat().st_size else []
    ways += [grow, delete, swap, partial(replace, stranger=stranger)]
    return path, chance.choice(ways)(path, chance)


def cut_under(folder: Path, chance: random.Random) -> tuple[str, Callable[[], object]]:
    """Choose a file that is read through a memory map; return its name, and what cuts it or deletes it.

    SQLite's own files are left out: it maps the -shm file itself, and dies of a cut one.
    """
    path = chance.choice(
        sorted(file for file in folder.glob("*.*") if "sqlite" not in file.name and file.stat().st_size)
    )
    length = chance.choice([0, chance.randrange(path.stat().st_size)])

    def cut_it() -> None:
        os.truncate(path, length)

    return f"{shown(path.name)}, cut when open", cut_it


class Samples:
    """The filled indexes that copies are made of, each filled when it is first wanted.

    Args:
        home: the folder to make them in.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._filled: dict[str, Sample] = {}

    def __call__(self, kind: str | None, left: str, stranger: bool = False) -> Sample:
        """Return the sample with a structure, left in a way; a stranger is another one of the same shape."""
        name = f"{'stranger' if stranger else 'sample'} {kind} {left}"
        if name not in self._filled:
            dtype = "float16" if left == "killed" else "float32"
            ended = processes.run(partial(fill, self._home, name, kind, left, dtype=dtype), LIMIT)
            if ended.how != "returned":
                raise RuntimeError(f"cannot fill an index: {ended.how} {ended.value or ''}")
            self._filled[name] = ended.value
        return self._filled[name]


def run(home: Path, times: int, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Report:
    """Break copies of filled indexes so many times: one without a structure, one of each kind, each left in three ways.

    Args:
        home: an empty folder to work in.
        times: how many damages.
        seed: of everything.
        say: called with a line now and then.
    """
    began = time.perf_counter()
    chance, report, samples = random.Random(seed), Report(), Samples(home)
    cases = [(kind, left) for left in LEFT for kind in (None, *entries.KINDS)]
    for number in range(times):
        case = cases[number % len(cases)]
        sample, copy = samples(*case), home / "copy"
        shutil.copytree(sample.path, copy)
        name = chance.choice(list(sample.truths[0].state))
        if number % 25 == 24:
            file, cut_it = cut_under(copy, chance)
            how = "under an open index"
            outcome, problems = outcome_of(copy, sample, name, log=False, under=cut_it)
        else:
            path, how = break_one(copy, lambda: samples(*case, stranger=True).path, chance)  # noqa: B023
            outcome, problems = outcome_of(copy, sample, name, log="-wal" in f"{path.name} {how}")
            file = "two exchanged" if how.startswith("exchanged") else shown(path.name)
        report.outcomes[file, outcome] += 1
        report.problems += [f"damage {number}, {case}, {file} {how}: {line:.200}" for line in problems[:3]]
        shutil.rmtree(copy)
        report.seconds = time.perf_counter() - began
        if (number + 1) % 200 == 0:
            say(f"{number + 1} damages, {len(report.problems)} problems, {report.seconds:.0f} s")
    return report


def outcome_of(
    path: Path, sample: Sample, name: str, log: bool, under: Callable[[], object] | None = None
) -> tuple[str, list[str]]:
    """Use a damaged index in a child; return the outcome and what was not allowed.

    Args:
        path: the damaged copy.
        sample: what it is a copy of.
        name: of an entry to ask for.
        log: whether the write-ahead log was damaged.
        under: damages the index when the child has it open.
    """
    ended = processes.run(partial(ask, path, name, sample.photos, under), LIMIT)
    if ended.how == "returned":
        return judge(ended.value, sample, name, log)
    detail = str(ended.value or "").strip().splitlines()[-1:]
    return ended.how, [" ".join([ended.how, *detail])]


def table(report: Report) -> list[str]:
    """Return the outcomes as the lines of a Markdown table, a row a file."""
    outcomes = [*GOOD, *sorted({outcome for _, outcome in report.outcomes} - set(GOOD))]
    files = sorted({file for file, _ in report.outcomes})
    lines = [f"| damaged file | {' | '.join(outcomes)} |", "|---" * (len(outcomes) + 1) + "|"]
    rows = [[report.outcomes[file, outcome] for outcome in outcomes] for file in files]
    rows.append([sum(column) for column in zip(*rows, strict=True)])
    return lines + [
        f"| {file} | {' | '.join(map(str, row))} |" for file, row in zip([*files, "all"], rows, strict=True)
    ]


def shown(name: str) -> str:
    """Return a file's name without the part that differs from index to index."""
    return re.sub(r"(?<=[-._])[0-9a-f]{4,}(?=[-._]|$)|(?<=[-.])\d+(?=[-.])", "*", name)
