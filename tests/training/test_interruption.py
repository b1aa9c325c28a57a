"""SIGTERM waits for the end of the block, and then reaches whoever handled it before."""

import os
import signal
import threading
from types import FrameType

import pytest

from vitembed.training.interruption import deferred_termination


def test_the_signal_is_kept_back_and_then_delivered() -> None:
    heard: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with deferred_termination() as termination:
            assert not termination.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.requested
            assert heard == []
        assert heard == [signal.SIGTERM]
        with deferred_termination() as termination:
            pass
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_is_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), deferred_termination():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_kept_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def run() -> None:
        with deferred_termination() as termination:
            inside.append((termination.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [(False, before)]


def test_a_first_ctrl_c_waits_and_a_second_does_not() -> None:
    entered: list[str] = []

    def interrupt_twice() -> None:
        with deferred_termination() as termination:
            os.kill(os.getpid(), signal.SIGINT)
            entered.append(termination.name)
            os.kill(os.getpid(), signal.SIGINT)
            entered.append("never")

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert entered == ["SIGINT"]
