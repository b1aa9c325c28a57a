"""Bytes of an index's files are flipped, cut, zeroed, deleted and exchanged; whatever it then answers must be right.

Each time a copy of a filled index is damaged and used by a forked child that has a time limit. Every call may give the
right answer or a `VitembedError`; a wrong answer, another exception, a signal or a hang is a failure. So is an error
from an index that `check` has just called sound.

The write-ahead log is special: SQLite takes a damaged end of it for a commit that a power cut interrupted, and goes on
from the commit before. Answers that are all right for one earlier commit are therefore counted apart, and only where
the log itself was damaged.
"""

import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import changes
from benchmarks.torture.entries import DIM, State, Truth, add, optimise, vector_of, vectors_of
from vitembed.errors import VitembedError
from vitembed.index import Hit, Index, sync

LIMIT = 20.0
"""Seconds that opening and using a damaged index may take."""

GOOD = ("unharmed", "clear error", "repaired", "earlier commit")
"""The outcomes that are allowed."""

_QUERIES = [f"query {number}" for number in range(25)]
_WHERE = {"class": 2}
_SCORE = 0.6
_WRITES = ("sync", "add", "added")

Answers = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """An index to be damaged.

    Attributes:
        path: its folder; never used, only copied.
        photos: the folder that it was synchronised with.
        truths: what it held after each of its commits, the last one first.
        optimised: whether its default search may be approximate.
    """

    path: Path
    photos: Path
    truths: list[Truth]
    optimised: bool


@dataclass
class Report:
    """What a run of damages has come to.

    Attributes:
        outcomes: how many, by (file, outcome).
        problems: what was not allowed, with the damage that led to it.
        seconds: of the whole run.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fill(
    home: Path, name: str, kind: str | None = None, left: str = "closed", rows: int = 2_000, dtype: str = "float32"
) -> Sample:
    """Make an index of some commits: adds, replacements, removals, files, a structure, and rows that came after it.

    Args:
        home: the folder to make it in.
        name: of the index; also part of every key, so that two samples share no vector.
        kind: of the structure; None for none.
        left: how the last process has left it: "closed", "killed" (with its write-ahead log), or "checkpointed" (killed
            after the log was copied into the catalog, and before it was begun anew).
        rows: how many are added.
        dtype: what the vectors are stored as.
    """
    live, photos = home / f"{name} live", home / f"{name} photos"
    photos.mkdir()
    for number in range(10):
        (photos / f"{number}.png").write_text(f"{name} {number}")
    names = [f"{name}/ä {n}" for n in range(rows)]
    state: State = {}
    truths = [Truth({})]
    with Index.create(live, DIM, "sha256:torture", dtype=dtype) as index:
        sync(index, changes.FileModel(lambda content: None), photos, workers=0)
        files = changes.synced(state, photos)
        state = {key: files[key] for key in index.ids()}  # in the order that sync chose
        truths.append(Truth(dict(state)))
        late = [names[start : start + 100] for start in range(rows - 250, rows - 50, 50)]  # beside the structure
        parts = [names[: rows // 2], names[rows // 2 : -200], names[100 : rows // 8], *late]
        for step, part in enumerate(parts):
            if step == len(parts) - len(late):
                gone = names[rows // 8 : rows // 4]
                index.remove(gone)
                state = {key: one for key, one in state.items() if key not in set(gone)}
                truths.append(Truth(dict(state)))
                if kind:
                    optimise(index, kind)
            add(index, state, part, step)
            truths.append(Truth(dict(state)))
        if left == "checkpointed":
            with closing(sqlite3.connect(live / "catalog.sqlite")) as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if left != "closed":
            shutil.copytree(live, home / name)
    if left == "closed":
        shutil.copytree(live, home / name)
    return Sample(home / name, photos, truths[::-1], kind is not None)


def ask(path: Path, name: str, photos: Path, under: Callable[[], object] | None = None) -> Answers:
    """Open an index and use it in every way; return what every call answered, errors too.

    Args:
        path: the index.
        name: of an entry that it should hold.
        photos: the folder that it was synchronised with.
        under: called when the index is open and was searched; damages it.
    """
    answers: Answers = {}
    queries = vectors_of(_QUERIES)

    def call(title: str, function: Callable[[], Any]) -> Any:
        try:
            answers[title] = function()
        except VitembedError as error:
            answers[title] = error
        return answers[title]

    def use(index: Index, title: str) -> None:
        call(f"search{title}", lambda: index.search(queries[0], 10, recall=1.0))
        call(f"batch{title}", lambda: index.search(queries, 10, recall=1.0))
        call(f"default{title}", lambda: index.search(queries[:2], 10))
        call(f"filtered{title}", lambda: index.search(queries[:2], 10, where=_WHERE, recall=1.0))
        call(f"within{title}", lambda: index.search_within(queries[:2], _SCORE))
        call(f"get{title}", lambda: index.get(name))
        call(f"ids{title}", lambda: (index.ids(), len(index)))
        call(f"stream{title}", lambda: list(index.stream()))

    index = call("open", lambda: Index.open(path))
    if isinstance(index, VitembedError):
        return answers
    answers["open"] = None
    with index:
        if under:
            index.search(queries, 10)
            under()
        use(index, "")
        call("check", index.check)
        call("repair", lambda: index.check(repair=True))
        use(index, " after repair")
        # Writes come last: they may be refused, but end in nothing else.
        call("sync", lambda: sync(index, changes.FileModel(lambda content: None), photos, workers=0))
        call("add", lambda: index.add([name], vectors_of(["fresh"])))
        if answers["add"] is None:
            call("added", lambda: index.get(name))
    return answers


def judge(answers: Answers, sample: Sample, name: str, log: bool) -> tuple[str, list[str]]:
    """Return the outcome of a damage, and what was not allowed.

    Args:
        answers: what `ask` has returned.
        sample: the index before the damage.
        name: the entry that was asked for.
        log: whether the write-ahead log was damaged.
    """
    errors = {title: str(answer) for title, answer in answers.items() if isinstance(answer, VitembedError)}
    problems = [f"an error of several lines from {title}" for title, text in errors.items() if "\n" in text]
    truths = sample.truths if log else sample.truths[:1]
    wrong = [_all_wrong(answers, truth, sample.optimised) for truth in truths]
    if all(wrong):
        return "WRONG", problems + wrong[0]
    commit = next(number for number, lines in enumerate(wrong) if not lines)
    if name not in truths[commit].state:  # then that it is missing is the right answer
        errors = {title: text for title, text in errors.items() if not title.startswith("get")}
    problems += _unnoticed(answers, errors)
    if problems:
        return "WRONG", problems
    before = [title for title in errors if "after" not in title and title not in _WRITES]
    if (answers.get("check") or before) and answers.get("repair") == []:
        return "repaired", []
    if before or answers.get("check"):
        return "clear error", []
    return ("earlier commit" if commit else "unharmed"), []


def _unnoticed(answers: Answers, errors: dict[str, str]) -> list[str]:
    """Return the calls that failed though a check had found nothing: `check` before the repair, or after it."""
    own = {"open", "check", "repair", *_WRITES}
    before = [title for title in errors if "after" not in title and title not in own]
    after = [title for title in errors if "after" in title]
    problems = []
    if answers.get("check") == [] and before:
        problems.append(f"check found nothing, but {before[0]} said: {errors[before[0]]}")
    if answers.get("repair") == [] and after:
        problems.append(f"check(repair=True) found nothing, but then {after[0]} said: {errors[after[0]]}")
    return problems


def _all_wrong(answers: Answers, truth: Truth, optimised: bool) -> list[str]:
    """Return what is wrong with the answers if this is the truth; an error is not wrong."""
    problems: list[str] = []
    for title, answer in answers.items():
        what = title.removesuffix(" after repair")
        if isinstance(answer, VitembedError) or what in {"open", "check", "repair", "sync", "add"}:
            continue
        if what in {"get", "ids", "stream", "added"}:
            wrong = _wrong_contents(what, answer, truth)
        else:
            wrong = [
                line
                for query, hits in zip(_QUERIES, answer, strict=False)  # some calls ask for the first queries only
                for line in _wrong_search(what, vector_of(query), hits, truth, optimised)
            ]
        problems += [f"{title}: {line}" for line in wrong[:2]]
    return problems


def _wrong_search(what: str, query: Any, hits: list[Hit], truth: Truth, optimised: bool) -> list[str]:
    if what == "within":
        expected = [found for found, score in truth.ranking(query) if score >= _SCORE]
        others = [] if [hit.id for hit in hits] == expected else ["other hits within the score"]
        return truth.wrong_hits(query, hits) + others
    if what == "default" and optimised:
        count = min(10, len(truth.state))
        return truth.wrong_hits(query, hits) + ([] if len(hits) == count else [f"{len(hits)} hits, not {count}"])
    return truth.wrong_answer(query, hits, 10, _WHERE if what == "filtered" else None)


def _wrong_contents(what: str, answer: Any, truth: Truth) -> list[str]:
    if what == "added":
        return [] if np.array_equal(answer.vector, vector_of("fresh")) else ["another vector than was added"]
    if what == "get":
        return truth.wrong_entry(answer.id, answer.vector, answer.metadata)
    if what == "ids":
        return [] if answer == (list(truth.state), len(truth.state)) else [f"{len(answer[0])} ids, len {answer[1]}"]
    problems = [] if [name for part in answer for name in part.ids] == list(truth.state) else ["other ids"]
    for part in answer:
        sizes = len(part.ids), len(part.vectors), len(part.metadata)
        problems += [] if len(set(sizes)) == 1 else [f"a batch of {sizes} ids, vectors, metadata"]
        for entry in zip(part.ids, part.vectors, part.metadata, strict=False):
            problems += truth.wrong_entry(*entry)
    return problems
