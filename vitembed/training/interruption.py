"""Ending a training from outside at a moment of its own choosing: signals wait for the end of the step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Termination:
    """Whether somebody asked the process to end.

    Attributes:
        signal: that asked, None if none did.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether the process is to end."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """What asked, for a line of text."""
        return self.signal.name if self.signal else "another process"


@contextmanager
def deferred_termination() -> Iterator[Termination]:
    """Keep SIGTERM and Ctrl-C back inside the block, and deliver them at the end to whoever handled them before.

    Cluster managers send SIGTERM some seconds before they kill a process for good: time to save. Where nobody handles
    it the process then dies of the signal, with status 143 in a shell. A second Ctrl-C does not wait. Signals reach the
    main thread alone; in another thread nothing is kept back.

    Yields:
        What tells whether a signal came.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return

    def note(number: int, frame: FrameType | None) -> None:
        """Remember the first signal; the second Ctrl-C is meant at once."""
        if number == signal.SIGINT and termination.signal == signal.SIGINT:
            raise KeyboardInterrupt
        termination.signal = termination.signal or signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield termination
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if termination.signal is not None:
            os.kill(os.getpid(), termination.signal)
