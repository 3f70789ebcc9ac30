"""Stop signals at random moments: saved, gone within seconds, and the run ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import children
import pytest

import tiny
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.checkpoint import load_latest
from phalanx.training.signals import STOP_SIGNALS

SECONDS = 10.0
HURRIED_SECONDS = 1.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its evaluation that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    # by the parent: what is loaded once is loaded for every child
    children.train(folder / "run")
    children.evaluate(folder / "run", folder / "evaluation")
    return folder


def _rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the signals: {seed}")
    return random.Random(seed)


def _signals(times: int) -> list[int]:
    return [int(STOP_SIGNALS[number % len(STOP_SIGNALS)]) for number in range(times)]


def _check(seen: list[tuple[int, int, float]]) -> None:
    # 0: the work was done before the signal came
    assert all(code in (0, 128 + signum) for signum, code, _ in seen), seen
    assert any(code for _, code, _ in seen), seen
    assert all(seconds <= SECONDS for _, _, seconds in seen), seen


def _stopped_training(whole: Path, run: Path, times: int) -> None:
    seen = children.signal_at_random(
        lambda reporter: children.train(run, reporter), _signals(times), max(1, children.STEPS // times), _rng()
    )
    _check(seen)
    kept = load_latest(run / "checkpoints")
    assert kept is not None and not kept.notes and kept.step >= min(times, children.STEPS) // 2
    assert children.finish(lambda: children.train(run)) == 0
    assert tiny.result(run) == tiny.result(whole / "run")
    RunFolder(run).verify()


def _stopped_evaluation(whole: Path, folder: Path, times: int) -> None:
    _check(
        children.signal_at_random(
            lambda reporter: children.evaluate(whole / "run", folder, reporter),
            _signals(times),
            max(1, children.BATCHES // times),
            _rng(),
        )
    )
    assert children.finish(lambda: children.evaluate(whole / "run", folder)) == 0
    with Ledger.read(whole / "evaluation/ledger.sqlite") as one, Ledger.read(folder / "ledger.sqlite") as two:
        assert one.table_sha256() == two.table_sha256()
    RunFolder(folder).verify()


def test_a_stopped_training_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    _stopped_training(whole, tmp_path / "run", 4)


def test_a_stopped_evaluation_ends_with_the_same_verdicts(whole: Path, tmp_path: Path) -> None:
    _stopped_evaluation(whole, tmp_path / "evaluation", 4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(whole: Path, tmp_path: Path, signum: signal.Signals) -> None:
    run, ready = tmp_path / "run", tmp_path / "ready"

    def linger() -> None:
        ready.touch()
        time.sleep(60)

    pid = children.fork(lambda: children.train(run, tiny.StopAt(4, linger)))
    while not ready.exists():
        time.sleep(0.01)
    os.kill(pid, signum)
    time.sleep(0.3)
    # the first one waits for the step to end
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    started = time.monotonic()
    os.kill(pid, signum)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 128 + signal.SIGINT and time.monotonic() - started <= HURRIED_SECONDS
    assert RunFolder(run).status() == "interrupted"
    assert children.finish(lambda: children.train(run)) == 0
    assert tiny.result(run) == tiny.result(whole / "run")


@pytest.mark.nightly
def test_a_training_stopped_25_times(whole: Path, tmp_path: Path) -> None:
    _stopped_training(whole, tmp_path / "run", 25)


@pytest.mark.nightly
def test_an_evaluation_stopped_25_times(whole: Path, tmp_path: Path) -> None:
    _stopped_evaluation(whole, tmp_path / "evaluation", 25)
