"""Ending a training from outside at a moment of its own choosing: SIGTERM waits for the end of the step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Termination:
    """Whether somebody asked the process to end.

    Attributes:
        requested: set by the signal.
    """

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def deferred_termination() -> Iterator[Termination]:
    """Keep SIGTERM back inside the block, and deliver it at the end to whoever handled it before.

    Cluster managers send it some seconds before they kill a process for good: time to save. Where nobody handles it
    the process then dies of the signal, with status 143 in a shell. Signals reach the main thread alone; in another
    thread nothing is kept back.

    Yields:
        What tells whether the signal came.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return

    def note(number: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        termination.requested = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
        if termination.requested:
            os.kill(os.getpid(), signal.SIGTERM)
