"""Worker processes: side by side, errors as they were, and nothing left behind by whatever ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import worker_jobs
from phalanx import errors
from phalanx.errors import InputError, Interrupted, PhalanxError
from phalanx.runs import RunFolder
from phalanx.training.signals import STOP_SIGNALS
from phalanx.worker import STOP_SIGNALS as WORKER_STOP_SIGNALS
from phalanx.workers import WorkerPool


class _Told:
    def __init__(self) -> None:
        self.reports: list[tuple[int, int, str]] = []
        self.messages: list[str] = []

    def progress(self, done: int, total: int, note: str) -> None:
        self.reports.append((done, total, note))

    def notify(self, message: str) -> None:
        self.messages.append(message)


def _do(pool: WorkerPool, call: str, **job: Any) -> _Told:
    told = _Told()
    pool.do({"call": call, "folder": f"study/{call}", **job}, told)
    return told


def _pool(count: int = 1, threads: int | None = None) -> WorkerPool:
    return WorkerPool(count, "worker_jobs:do", threads)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with _pool() as pool:
        yield pool


# -- jobs ----------------------------------------------------------------------------------------------------------


def test_jobs_are_done_side_by_side(tmp_path: Path) -> None:
    def meet(name: str, other: str) -> None:
        pool.do({"call": "meet", "folder": str(tmp_path / name), "other": str(tmp_path / other)}, _Told())

    with _pool(2) as pool, ThreadPoolExecutor(2) as threads:
        for met in [threads.submit(meet, "a", "b"), threads.submit(meet, "b", "a")]:
            met.result()


def test_one_process_does_many_jobs(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(lambda _: _do(pool, "tell_pid"), range(3)))
    pids = {message for each in told for message in each.messages}
    assert len(pids) == 1 and pids != {str(os.getpid())}


def test_progress_is_told_now_and_then_and_at_the_end(pool: WorkerPool) -> None:
    reports = _do(pool, "count").reports
    assert reports[0] == (1, 1000, "counting") and reports[-1] == (1000, 1000, "counting")
    assert len(reports) < 100


def test_what_a_job_prints_and_reads_has_nothing_to_do_with_the_pool(
    pool: WorkerPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _do(pool, "print_much").messages == ["read ''"]
    assert _do(pool, "tell_pid").messages
    printed = capfd.readouterr()
    assert printed.out == "" and sorted(printed.err.splitlines())[0] == "{" and "not mine" in printed.err


def test_threads_are_set_for_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for threads, expected in ((3, "3"), (None, "5")):
        with _pool(1, threads) as pool:
            assert _do(pool, "tell_threads").messages == [expected]


@pytest.mark.parametrize(("count", "threads", "name"), [(0, None, "workers"), (1, 0, "threads")])
def test_nothing_below_one(count: int, threads: int | None, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        WorkerPool(count, threads=threads)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "known", "exit_code", "message"),
    [
        *(
            (kind.__name__, kind, kind.exit_code, "it went wrong")
            for kind in (PhalanxError, *PhalanxError.__subclasses__())
            if kind.__module__ == errors.__name__ and kind is not Interrupted
        ),
        ("OddError", PhalanxError, 3, "it went wrong"),
        ("OddInputError", InputError, 2, "line 7: it went wrong"),
        ("Interrupted", Interrupted, 128 + signal.SIGUSR1, "saved"),
    ],
)
def test_an_error_comes_back_as_it_was(
    pool: WorkerPool, kind: str, known: type[PhalanxError], exit_code: int, message: str
) -> None:
    with pytest.raises(known) as caught:
        _do(pool, "fail", kind=kind)
    assert type(caught.value) is known and str(caught.value) == message
    assert caught.value.exit_code == exit_code
    assert not isinstance(caught.value, Interrupted) or caught.value.signum == signal.SIGUSR1


@pytest.mark.parametrize(("call", "last"), [("divide", "ZeroDivisionError: by nothing"), ("leave", "SystemExit: 0")])
def test_a_bug_comes_back_with_its_traceback(pool: WorkerPool, call: str, last: str) -> None:
    with pytest.raises(RuntimeError, match=f"study/{call} failed in its worker process") as caught:
        _do(pool, call)
    assert "worker_jobs.py" in str(caught.value) and str(caught.value).strip().endswith(last)


def test_an_unknown_target_is_a_bug() -> None:
    with WorkerPool(1, "worker_jobs:nothing") as pool, pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
        _do(pool, "tell_pid")


@pytest.mark.parametrize(
    ("signum", "how"), [(signal.SIGKILL, r"killed by SIGKILL, as .* memory"), (signal.SIGSEGV, "killed by SIGSEGV")]
)
def test_a_worker_that_dies_is_named_and_replaced(pool: WorkerPool, signum: int, how: str) -> None:
    before = _do(pool, "tell_pid").messages
    with pytest.raises(
        PhalanxError, match=rf"worker process of study/die died \({how}.*the same command goes on"
    ) as caught:
        _do(pool, "die", signum=signum)
    assert caught.value.exit_code == 1
    assert _do(pool, "tell_pid").messages != before


def test_a_job_is_stopped_when_its_reporter_fails(pool: WorkerPool, tmp_path: Path) -> None:
    class Broken(_Told):
        def progress(self, done: int, total: int, note: str) -> None:
            raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        pool.do({"call": "count", "folder": "study/count"}, Broken())
    assert _do(pool, "tell_pid").messages


# -- signals -------------------------------------------------------------------------------------------------------


def test_the_signals_are_those_of_training() -> None:
    assert WORKER_STOP_SIGNALS == STOP_SIGNALS


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_no_job_is_begun_after_a_signal(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="study/tell_pid was not begun") as caught, _pool() as pool:
        _do(pool, "tell_pid")
        os.kill(os.getpid(), signum)
        _do(pool, "tell_pid")
        pytest.fail("a job was begun")
    assert caught.value.signum == signum and signal.getsignal(signum) == before


def test_a_signal_between_jobs_is_not_forgotten() -> None:
    with pytest.raises(Interrupted, match="what was begun is finished") as caught, _pool() as pool:
        _do(pool, "tell_pid")
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM


def test_a_second_signal_is_heeded_at_once() -> None:
    with pytest.raises(Interrupted, match="stopped at once") as caught, _pool() as pool:
        _do(pool, "tell_pid")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not heeded")
    assert caught.value.signum == signal.SIGINT


def test_an_idle_worker_that_was_stopped_says_so(pool: WorkerPool) -> None:
    pid = int(_do(pool, "tell_pid").messages[0])
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped") as caught:
        # on a busy machine a short job may end before the signal is heard
        for _ in range(200):
            _do(pool, "tell_pid")
    assert caught.value.signum == signal.SIGTERM


def test_a_signal_that_came_too_late_for_one_job_stops_the_next(pool: WorkerPool) -> None:
    _do(pool, "end_anyway")
    with pytest.raises(Interrupted, match="stopped"):
        _do(pool, "tell_pid")


def test_a_worker_that_has_just_been_started_hears_a_signal(tmp_path: Path) -> None:
    with _pool() as pool, ThreadPoolExecutor(1) as threads:
        done = threads.submit(_do, pool, "work_on", folder=str(tmp_path))
        worker_jobs.wait_until(lambda: bool(pool._processes))
        pool._processes[0].send_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped") as caught:
            done.result()
    assert caught.value.signum == signal.SIGINT


@contextmanager
def _program(folder: Path, call: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program whose two workers do `call`, and their process ids; none of them outlives the block."""
    program = subprocess.Popen(
        [sys.executable, worker_jobs.__file__, str(folder), call],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids: list[int] = []
    try:
        files = [folder / name / "pid" for name in ("a", "b")]
        worker_jobs.wait_until(lambda: all(file.exists() for file in files))
        pids += [int(file.read_text()) for file in files]
        yield program, pids
        worker_jobs.wait_until(lambda: not any(map(_is_alive, pids)))
    finally:
        for pid in [program.pid, *pids]:
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        program.communicate()


def _is_alive(pid: int) -> bool:
    try:
        # an orphan that has ended may wait for ever to be collected
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ended(program: subprocess.Popen[str]) -> tuple[int, str]:
    _, printed = program.communicate(timeout=worker_jobs.PATIENCE_SECONDS)
    return program.returncode, printed


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the parent", "to everybody"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_every_worker_save_once(
    tmp_path: Path, send: Callable[[int, int], None], signum: signal.Signals
) -> None:
    with _program(tmp_path, "save_when_asked") as (program, _):
        send(program.pid, signum)
        code, printed = _ended(program)
    assert code == 128 + signum and printed in (f"error: {tmp_path / name} was saved\n" for name in ("a", "b"))
    for name in ("a", "b"):
        assert (tmp_path / name / "saved").read_text() == str(int(signum))
        assert RunFolder(tmp_path / name).status() == "interrupted"


def test_a_job_without_handlers_is_stopped_by_name(tmp_path: Path) -> None:
    with _program(tmp_path, "work_on") as (program, _):
        program.terminate()
        code, printed = _ended(program)
    assert code == 143 and printed == "error: stopped; what was saved is kept, the same command goes on\n"


def test_a_second_signal_kills_the_workers(tmp_path: Path) -> None:
    with _program(tmp_path, "be_stubborn") as (program, _):
        program.terminate()
        worker_jobs.wait_until(lambda: all((tmp_path / name / "asked").exists() for name in ("a", "b")))
        program.send_signal(signal.SIGINT)
        code, printed = _ended(program)
    assert code == 130 and "stopped at once; what was saved is kept" in printed


@pytest.mark.parametrize("call", ["save_when_asked", "work_on", "be_stubborn"])
def test_no_worker_outlives_a_killed_program(tmp_path: Path, call: str) -> None:
    with _program(tmp_path, call) as (program, _):
        program.kill()
        # its workers hold the pipe of its errors until they end
        assert _ended(program)[0] == -signal.SIGKILL
    if call == "save_when_asked":
        assert [(tmp_path / name / "saved").read_text() for name in ("a", "b")] == [str(int(signal.SIGTERM))] * 2


def test_the_others_go_on_when_a_worker_is_killed(tmp_path: Path) -> None:
    with _program(tmp_path, "save_when_asked") as (program, (a, b)):
        os.kill(a, signal.SIGKILL)
        worker_jobs.wait_until(lambda: not _is_alive(a))
        assert program.poll() is None and _is_alive(b)
        os.kill(b, signal.SIGTERM)
        code, printed = _ended(program)
    assert code == 1 and printed.startswith(f"error: the worker process of {tmp_path / 'a'} died (killed by SIGKILL")
    assert [RunFolder(tmp_path / name).status() for name in ("a", "b")] == ["running", "interrupted"]
