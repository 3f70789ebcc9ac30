"""Progress: silent at first, plain lines off a terminal."""

from __future__ import annotations

import io

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


def test_a_terminal_gets_a_bar_that_goes_away(clock: _Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ConsoleReporter("at", stream) as reporter:
        reporter.progress(1, 10, "epoch 1")
        clock.now += 3
        reporter.progress(5, 10, "epoch 1")
        assert reporter._bar is not None
    assert reporter._bar is None


def test_a_notice_is_never_lost() -> None:
    stream = io.StringIO()
    ConsoleReporter("at", stream).notify("router collapse")
    assert stream.getvalue() == "warning: at: router collapse\n"
