"""How far a long job is, with its rate and the time that remains, on standard error."""

import sys
import time
from types import TracebackType
from typing import Any, Self

# How often a line is printed where standard error is no terminal, in seconds.
_LINE_EVERY = 15.0

# How often a note is shown on a terminal, in seconds.
_NOTE_EVERY = 0.2


class Progress:
    """How far a job is.

    On a terminal a bar of tqdm; elsewhere (a log) a line every 15 seconds and one at the end.

    Args:
        title: of the job, such as "sync".
        total: how many images there are to settle; nothing is shown for 0.
        shown: whether to show anything at all.
    """

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self.title, self.total, self.done = title, total, 0
        self._shown = shown and total > 0
        self._bar: Any = None
        self._note = ""
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.title, unit=" images", dynamic_ncols=True, smoothing=0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.close()
        elif self._shown:
            self._say("taken" if error is None else "until it stopped")

    def advance(self, images: int, note: str = "") -> None:
        """Count images as settled.

        Args:
            images: how many more; 0 to say only that something goes on.
            note: what is being done now; shown until the next call.
        """
        self.done += images
        self._note = note
        if not self._shown:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(images)
            if now - self._said >= _NOTE_EVERY:
                self._said = now
                self._bar.refresh()
        elif now - self._said >= _LINE_EVERY:
            self._said = now
            self._say("left")

    def _say(self, what: str) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self.done / elapsed
        seconds = elapsed if what != "left" else (self.total - self.done) / rate if rate else None
        parts = [
            f"{self.title}: {self.done:,} of {self.total:,} images",
            f"{rate:,.1f} a second",
            f"{'?' if seconds is None else clock(seconds)} {what}",
            *([self._note] if self._note and what == "left" else []),
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Return a span of time as hours, minutes and seconds.

    >>> clock(75), clock(7265)
    ('1:15', '2:01:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
