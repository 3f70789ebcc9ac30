"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PATIENCE_SECONDS = 2.0
"""Work that is done sooner shows no progress."""

LINE_SECONDS = 10.0
"""Between two plain lines."""

_DISPLAYS: dict[TextIO, Progress] = {}
"""The live display of each terminal that shows bars: two on one terminal would overwrite each other."""

_LOCK = threading.Lock()
"""Held while displays come and go, and while a line is written."""


class ConsoleReporter:
    """Shows how one piece of work goes on standard error; a context manager.

    Several may be open at once, in several threads: their bars stand one below the other.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._title = title
        stream = sys.stderr if stream is None else stream
        # a live display puts a proxy in the place of sys.stderr
        self._stream: TextIO = getattr(stream, "rich_proxied_file", stream)
        self._started = time.monotonic()
        self._offset: int | None = None
        self._done = self._total = 0
        self._line_at = self._started
        self._bar: _Bar | None = None
        self._lock = threading.Lock()

    def progress(self, done: int, total: int, note: str) -> None:
        """`done` of `total` units are finished. Takes a few microseconds while there is nothing to show."""
        with self._lock:
            self._progress(done, total, note, time.monotonic())

    def _progress(self, done: int, total: int, note: str, now: float) -> None:
        before, self._done = self._done, done
        if self._offset is None or total != self._total or done < before:
            # a resumed run does not start at 0: its rate counts only what this process did. Another total, or fewer
            # units than before, are other work
            self._close_bar()
            self._offset, self._total, self._started = done - 1, total, now
        if now - self._started < PATIENCE_SECONDS:
            return
        if self._stream.isatty():
            self._bar = self._bar or _Bar(self._title, total, self._stream)
            self._bar.show(done, note)
        elif now - self._line_at >= LINE_SECONDS:
            self._line_at = now
            rate = (done - self._offset) / (now - self._started)
            left = (total - done) / rate
            _write_line(self._stream, f"{self._title}  {note}  {done}/{total}  {rate:.1f}/s  {left:.0f} s left")

    def notify(self, message: str) -> None:
        """Says something that must not be missed."""
        _write_line(self._stream, f"warning: {self._title}: {message}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ConsoleReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._close_bar()


class _Bar:
    """A bar with counts, rate and time left, in its terminal's display."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        self._stream = stream
        with _LOCK:
            if stream not in _DISPLAYS:
                _DISPLAYS[stream] = _display(stream)
                _DISPLAYS[stream].start()
            self._display = _DISPLAYS[stream]
            self._task = self._display.add_task(title, total=total, note="")

    def show(self, done: int, note: str) -> None:
        """Moves the bar."""
        self._display.update(self._task, completed=done, note=note)

    def close(self) -> None:
        """Takes the bar off the screen, and with the last one the display."""
        with _LOCK:
            self._display.remove_task(self._task)
            if not self._display.tasks:
                self._display.stop()
                del _DISPLAYS[self._stream]


def _display(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        _RateColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
    )


class _RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _write_line(stream: TextIO, line: str) -> None:
    """Above the bars, where there are any."""
    with _LOCK:
        if stream in _DISPLAYS:
            _DISPLAYS[stream].console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            stream.write(line + "\n")
            stream.flush()
