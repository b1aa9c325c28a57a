"""A writer is killed at a random moment, again and again; the index is opened after each kill and compared.

The writer is forked from this process and says in a log of its own, before a change, what it begins and, after the
call has returned, that it is done. So this process knows every acknowledged change, and at most one that was under way
when SIGKILL came. What it finds afterwards must be the state before that one or the state after it, to the bit; only
`sync` commits in batches, and of its files each may be old or new.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import changes, processes
from benchmarks.torture.entries import DIM, Entry, State, Truth, vector_of
from vitembed.errors import VitembedError
from vitembed.index import Index

# Added to the time that the slowest operation of a kind has taken, so that some kills come after its end.
_MARGIN = 1.15

# Seconds that opening and comparing an index may take.
_LIMIT = 60.0


@dataclass
class Life:
    """What a writer's log says: the states that the index may be in, what was under way, what was embedded."""

    states: list[State]
    done: int = 0
    pending: changes.Operation | None = None
    embedded: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """What a run of kills has come to.

    Attributes:
        kills: how many writers were killed.
        acknowledged: how many changes they had acknowledged; all of them were found.
        under_way: kills by the kind of change that was under way ("none" between two, "opening" before the first).
        kept: how many of those changes were found whole, by kind.
        problems: what was wrong, with the number of the kill.
        seconds: of the whole run.
    """

    kills: int = 0
    acknowledged: int = 0
    under_way: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def write(path: Path, folder: Path, log: Path, state: State, seed: int, first: str, last: int | None = None) -> None:
    """Change an index at random, and log it, until killed or `last` changes are made; the first is of a kind."""
    random = np.random.default_rng(seed)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(word: str, value: Any) -> None:
        os.write(descriptor, json.dumps({word: value}).encode() + b"\n")

    model = changes.FileModel(lambda content: say("embedded", content))
    with Index.open(path) as index:
        say("open", True)
        step = 0
        while last is None or step < last:
            operation = changes.draw(random, state, seed * 1_000 + step, first if step == 0 else None)
            say("begin", operation)
            began = time.perf_counter()
            changes.do(index, operation, model, folder)
            say("done", time.perf_counter() - began)
            state = changes.applied(state, operation, folder)
            step += 1


def replay(log: str, state: State, folder: Path) -> Life:
    """Read a writer's log, given what the index held when the writer began."""
    life = Life([state], pending={"kind": "opening"})
    for line in log.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # cut by the kill: what it would have said had not happened
        [(word, value)] = json.loads(line).items()
        if word == "open":
            life.pending = None
        elif word == "begin":
            life.pending = value
        elif word == "embedded":
            life.embedded.append(value)
        elif life.pending:
            life.seconds[life.pending["kind"]] = value
            life.done += 1
            life.states = [changes.applied(life.states[0], life.pending, folder)]
            life.pending = None
    if life.pending:
        life.states.append(changes.applied(life.states[0], life.pending, folder))
    return life


def compare(path: Path, life: Life, random: np.random.Generator) -> tuple[list[str], State]:
    """Open an index after a kill; return what is wrong, and what it holds."""
    before, after = life.states[0], life.states[-1]
    try:
        with Index.open(path) as index:
            problems = [f"check: {line}" for line in index.check()[:5]]
            found: State = {}
            for batch in index.stream():
                for name, vector, metadata in zip(batch.ids, batch.vectors, batch.metadata, strict=True):
                    found[name] = _recognised(name, vector, metadata, before, after)
            problems += _difference(found, life)
            if not problems:
                problems += _searches(index, found, random)
            if index.ids() != list(found) or len(index) != len(found):
                problems.append("ids, len and stream differ")
    except VitembedError as error:
        return [f"{type(error).__name__}: {error}"], before
    return problems, found


def _recognised(name: str, vector: Any, metadata: dict[str, Any], before: State, after: State) -> Entry:
    """Return which of an entry's two versions is found under its name."""
    for state in (after, before):
        one = state.get(name)
        if one and one.metadata == metadata and np.array_equal(vector_of(one.key), vector):
            return one
    return Entry("of neither state", metadata)


def _difference(found: State, life: Life) -> list[str]:
    """Return what is wrong with the entries that were found."""
    if life.pending and life.pending["kind"] == "sync":
        return _half_synced(found, *life.states)
    for state in life.states:
        # `sync` adds files in an order of its own.
        plain = [[name for name, one in entries.items() if one.content is None] for entries in (state, found)]
        if state == found and plain[0] == plain[1]:
            return []
    kind = life.pending["kind"] if life.pending else "nothing"
    wrong = [name for name in {**life.states[0], **found} if life.states[0].get(name) != found.get(name)]
    return [f"{len(found)} entries are of no state; {kind} was under way; differ from before: {wrong[:5]}"]


def _half_synced(found: State, before: State, after: State) -> list[str]:
    names = {**before, **after, **found}
    wrong = [name for name in names if found.get(name) not in (before.get(name), after.get(name))]
    return [f"files that are neither old nor new after a sync: {wrong[:5]}"] if wrong else []


def _searches(index: Index, state: State, random: np.random.Generator) -> list[str]:
    problems, truth = [], Truth(state)
    for number, where in enumerate([None, None, {"class": 2}]):
        query = vector_of(f"query {random.integers(10**6)}")
        [hits] = index.search(query, 10, where=where, recall=1.0)
        problems += truth.wrong_answer(query, hits, 10, where)
        if number == 0:
            problems += truth.wrong_hits(query, index.search(query, 10)[0])
    return [f"search: {problem}" for problem in problems]


class Torture:
    """An index, a folder of pictures, and one writer after another.

    Args:
        home: an empty folder to work in.
        seed: of everything but the effects of the moments; an odd one makes an index of float16.
    """

    def __init__(self, home: Path, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.path, self.photos, self.log = home / "x.index", home / "photos", home / "log"
        self.state: State = {}
        self.slowest: dict[str, float] = {}  # by kind, seconds; "opening" for all that comes before the first change
        self.report = Report()
        self.lives = 0
        Index.create(self.path, DIM, dtype="float16" if seed % 2 else "float32").close()
        changes.change_photos(self.random, self.photos, 0)

    def time(self, kind: str) -> None:
        """Let a writer make one change of a kind and live, to learn how long that takes."""
        began = time.perf_counter()
        lived = os.waitpid(self._start(kind, last=1), 0)[1] == 0
        whole = time.perf_counter() - began
        life = self._compare([] if lived else [f"a writer failed to {kind}"])
        opening = whole - sum(life.seconds.values())
        self.slowest["opening"] = max(opening, self.slowest.get("opening", 0.0))

    def kill(self, kind: str) -> None:
        """Kill a writer that begins with a change of a kind and goes on with others."""
        moment = self.random.uniform(0, self.slowest["opening"] + _MARGIN * self.slowest[kind])
        child = self._start(kind)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        life = self._compare([] if killed else ["the writer ended by itself"])
        pending = life.pending["kind"] if life.pending else "none"
        self.report.kills += 1
        self.report.under_way[pending] += 1
        self.report.kept[pending] += int(len(life.states) > 1 and life.states[0] != life.states[1] == self.state)

    def _start(self, kind: str, last: int | None = None) -> int:
        self.lives += 1
        self.log.unlink(missing_ok=True)
        if kind == "sync":
            changes.change_photos(self.random, self.photos, self.lives)
        return processes.start(lambda: write(self.path, self.photos, self.log, self.state, self.lives, kind, last))

    def _compare(self, problems: list[str]) -> Life:
        """Compare the index with the log of the writer that is dead now, and take over what it holds."""
        life = replay(self.log.read_text() if self.log.exists() else "", self.state, self.photos)
        held = {one.content for one in self.state.values()}
        problems += [f"embedded again: {content!r}" for content in life.embedded if content in held]
        ended = processes.run(lambda: compare(self.path, life, np.random.default_rng(self.lives)), _LIMIT)
        wrong, self.state = ended.value if ended.how == "returned" else ([f"{ended.how}: {ended.value}"], self.state)
        for kind, seconds in life.seconds.items():
            self.slowest[kind] = max(seconds, self.slowest.get(kind, 0.0))
        self.report.acknowledged += life.done
        self.report.problems += [f"life {self.lives}: {problem}" for problem in problems + wrong]
        return life


def run(home: Path, times: int, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Report:
    """Kill a writer so many times, each kind of change in its turn; stop at the first problem.

    Args:
        home: an empty folder to work in.
        times: how many kills.
        seed: of everything but the effects of the moments.
        say: called with a line now and then.
    """
    began = time.perf_counter()
    torture = Torture(home, seed)
    report = torture.report
    kinds = changes.KINDS
    for kind in ("add", *kinds, *kinds):
        torture.time(kind)
    for number in range(times):
        if report.problems:
            break  # what follows a broken index says nothing new
        torture.kill(kinds[number % len(kinds)])
        report.seconds = time.perf_counter() - began
        if report.kills % 100 == 0:
            say(f"{report.kills} kills, {len(torture.state)} entries, {report.seconds:.0f} s")
    return report
