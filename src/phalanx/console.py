"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_SECONDS = 2.0
"""Work that is done sooner shows no progress."""

LINE_SECONDS = 10.0
"""Between two plain lines."""


class ConsoleReporter:
    """Shows how one piece of work goes on standard error; a context manager."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._started = time.monotonic()
        self._offset: int | None = None
        self._total = 0
        self._line_at = self._started
        self._bar: _Bar | None = None

    def progress(self, done: int, total: int, note: str) -> None:
        """`done` of `total` units are finished. Takes a few microseconds while there is nothing to show."""
        now = time.monotonic()
        if self._offset is None or total != self._total:
            # a resumed run does not start at 0: its rate counts only what this process did; another total is other work
            self._close_bar()
            self._offset, self._total, self._started = done - 1, total, now
        if now - self._started < PATIENCE_SECONDS:
            return
        if self._stream.isatty():
            self._bar = self._bar or _Bar(self._title, total, self._stream)
            self._bar.show(done, note)
        elif now - self._line_at >= LINE_SECONDS:
            self._line_at = now
            self._line(done, total, note, now)

    def _line(self, done: int, total: int, note: str, now: float) -> None:
        assert self._offset is not None
        rate = (done - self._offset) / (now - self._started)
        left = (total - done) / rate
        self._stream.write(f"{self._title}  {note}  {done}/{total}  {rate:.1f}/s  {left:.0f} s left\n")
        self._stream.flush()

    def notify(self, message: str) -> None:
        """Says something that must not be missed."""
        self._close_bar()
        self._stream.write(f"warning: {self._title}: {message}\n")
        self._stream.flush()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ConsoleReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()


class _Bar:
    """A bar with counts, rate and time left."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, note="", rate="")
        self._progress.start()

    def show(self, done: int, note: str) -> None:
        """Moves the bar."""
        speed = self._progress.tasks[0].speed
        rate = "" if speed is None else f"{speed:.1f}/s"
        self._progress.update(self._task, completed=done, note=note, rate=rate)

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._progress.stop()
