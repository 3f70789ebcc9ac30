"""Progress: silent at first, plain lines off a terminal."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from phalanx import console
from phalanx.console import ConsoleReporter


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_short_work_shows_nothing(clock: _Clock) -> None:
    stream = io.StringIO()
    with ConsoleReporter("at", stream) as reporter:
        for done in range(1, 20):
            clock.now += 0.1
            reporter.progress(done, 20, "epoch 1")
    assert stream.getvalue() == ""


def test_lines_say_rate_and_time_left(clock: _Clock) -> None:
    stream = io.StringIO()
    with ConsoleReporter("at", stream) as reporter:
        # resumed at step 40: one step a second from there
        for done in range(41, 62):
            reporter.progress(done, 100, "epoch 3")
            clock.now += 1
    # the clock starts at the first report: 10 s later step 51, (51 - 40) / 10 s = 1.1 steps/s, 49 / 1.1 = 45 s left
    assert stream.getvalue().splitlines()[0] == "at  epoch 3  51/100  1.1/s  45 s left"
    assert len(stream.getvalue().splitlines()) == 2


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
"""What a live display writes when it comes, and when it goes."""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return _Terminal()


def _advance(reporter: ConsoleReporter, clock: _Clock, done: int = 5) -> None:
    """Works for three seconds."""
    reporter.progress(done - 1, 10, "epoch 1")
    clock.now += 3
    reporter.progress(done, 10, "epoch 1")


def test_a_terminal_gets_a_bar_that_goes_away(clock: _Clock, terminal: _Terminal) -> None:
    with ConsoleReporter("at", terminal) as reporter:
        _advance(reporter, clock)
        assert terminal.getvalue().count(HIDE_CURSOR) == 1 and SHOW_CURSOR not in terminal.getvalue()
    assert terminal.getvalue().count(SHOW_CURSOR) == 1 and not console._DISPLAYS


def test_several_bars_share_one_display(clock: _Clock, terminal: _Terminal) -> None:
    with ConsoleReporter("first", terminal) as first, ConsoleReporter("second", terminal) as second:
        _advance(first, clock)
        _advance(second, clock)
        display = console._DISPLAYS[terminal]
        display.refresh()
        drawn = terminal.getvalue().rpartition("first")[2]
        assert "second" in drawn and "\n" in drawn
        second.__exit__(None, None, None)
        assert [task.description for task in display.tasks] == ["first"]
        assert terminal.getvalue().count(HIDE_CURSOR) == 1 and SHOW_CURSOR not in terminal.getvalue()
    assert terminal.getvalue().count(SHOW_CURSOR) == 1 and not console._DISPLAYS


def test_a_reporter_made_under_a_display_finds_its_terminal(
    clock: _Clock, terminal: _Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal)
    with ConsoleReporter("first") as first:
        _advance(first, clock)
        with ConsoleReporter("second") as second:
            _advance(second, clock)
            assert list(console._DISPLAYS) == [terminal]


def test_a_notice_stands_above_the_bars(clock: _Clock, terminal: _Terminal) -> None:
    with ConsoleReporter("first", terminal) as first, ConsoleReporter("second", terminal) as second:
        _advance(first, clock)
        second.notify("router collapse [100%]")
        _, notice, after = terminal.getvalue().rpartition("warning: second: router collapse [100%]\n")
        assert notice and "first" in after
        assert SHOW_CURSOR not in terminal.getvalue()


def test_reporters_of_many_threads(clock: _Clock, terminal: _Terminal) -> None:
    def work(number: int) -> None:
        with ConsoleReporter(f"run {number}", terminal) as reporter:
            for done in range(1, 20):
                reporter.progress(done, 20, "[/]")
                clock.now += 1
                reporter.notify(f"{number} at {done}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(16)))
    assert not console._DISPLAYS
    told = terminal.getvalue()
    assert all(f"warning: run {number}: {number} at {done}\n" in told for number in range(16) for done in range(1, 20))


def test_work_that_begins_again_is_other_work(clock: _Clock) -> None:
    stream = io.StringIO()
    with ConsoleReporter("images", stream) as reporter:
        for done in (41, 42, 40, 41):
            reporter.progress(done, 100, "")
            clock.now += 20
    # 40 came 40 s after the start, and is the first of other work: 41 is one more in 20 s, two done in all
    assert [line.split()[1:3] for line in stream.getvalue().splitlines()] == [["42/100", "0.1/s"], ["41/100", "0.1/s"]]


def test_a_notice_is_never_lost() -> None:
    stream = io.StringIO()
    ConsoleReporter("at", stream).notify("router collapse")
    assert stream.getvalue() == "warning: at: router collapse\n"


def test_work_that_begins_again_in_batches_as_large_has_its_own_rate(clock: _Clock) -> None:
    stream = io.StringIO()
    with ConsoleReporter("images", stream) as reporter:
        for done in (128, 256, 128, 256):
            reporter.progress(done, 256, "")
            clock.now += 20
    # not 1 image in the 40 s since the first report of all
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["6.5/s", "6.5/s"]
