"""Children of this process: forked, so that they start in a millisecond with every library loaded.

The tortures' own process must have one thread only, and no index open while it forks.
"""

import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a child ended: `how` is "returned", "raised", "hung" or the name of a signal; `value` what it returned."""

    how: str
    value: Any = None


def start(work: Callable[[], object]) -> int:
    """Run a function in a child and return its process id; the child's status is 1 when the function raises."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(work: Callable[[], Any], seconds: float) -> Ended:
    """Run a function in a child, for so many seconds at most, and return how it ended."""
    return run_all([work], seconds)[0]


def run_all(works: Sequence[Callable[[], Any]], seconds: float) -> list[Ended]:
    """Run functions in children at the same time, for so many seconds at most, and return how each ended."""
    children = [_started(work) for work in works]
    deadline = time.monotonic() + seconds
    return [_ended(child, descriptor, deadline) for child, descriptor in children]


def _started(work: Callable[[], Any]) -> tuple[int, int]:
    """Start a child; return its process id and where to read how it ended."""
    reader, writer = os.pipe()

    def report() -> None:
        os.close(reader)
        try:
            result = Ended("returned", work())
        except BaseException:
            result = Ended("raised", traceback.format_exc())
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(result, stream)

    child = start(report)
    os.close(writer)
    return child, reader


def _ended(child: int, descriptor: int, deadline: float) -> Ended:
    content = _read(descriptor, deadline)
    os.close(descriptor)
    if content is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if content is None:
        return Ended("hung")
    if os.WIFSIGNALED(status):
        return Ended(signal.Signals(os.WTERMSIG(status)).name)
    result: Ended = pickle.loads(content)  # written by our own child
    return result


def _read(descriptor: int, deadline: float) -> bytes | None:
    """Return all that comes until the other end closes, or None when the time is over first."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return None
        part = os.read(descriptor, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
