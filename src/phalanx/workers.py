"""Worker processes that do jobs side by side; what one of them is, `phalanx.worker` says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from phalanx import errors
from phalanx.errors import InputError, Interrupted, PhalanxError
from phalanx.worker import GRACE_SECONDS, STOP_SIGNALS

if TYPE_CHECKING:
    from phalanx.runs.canonical import JSON
    from phalanx.training import Reporter

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KINDS: dict[str, type[PhalanxError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PhalanxError)
}


class WorkerPool:
    """Up to `count` processes, each started when it is first needed and kept for the jobs that follow.

    `target` is MODULE:FUNCTION, called in a worker's main thread as `function(job, reporter)`. `threads` is how many
    CPU threads each worker computes with; None leaves that to the environment.

    A context manager. Entered in the main thread, it takes SIGINT, SIGTERM, SIGUSR1 and SIGUSR2: the first is passed
    on to the workers, which save and stop, no job is begun after it, and the block ends with Interrupted at the
    latest; the second kills the workers and raises Interrupted at once. Raises InputError for a count or a number of
    threads below 1.
    """

    def __init__(self, count: int, target: str = "phalanx.workflow:perform", threads: int | None = None) -> None:
        for name, number in (("workers", count), ("threads", threads)):
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        self._target, self._threads = target, threads
        self._free = threading.Semaphore(count)
        self._idle: list[_Process] = []
        self._processes: list[_Process] = []
        self._signum: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def do(self, job: Mapping[str, JSON], reporter: Reporter) -> None:
        """Returns when a worker has done `job`; may be called from several threads at once.

        `job["folder"]`, what it makes, names it in messages. `reporter` is called in this thread.
        Raises what the job raised if its class, or a base of it, is in `phalanx.errors`, with the job's exit code;
        RuntimeError with the worker's traceback for anything else; Interrupted once the pool was asked to stop;
        PhalanxError if the worker died.
        """
        with self._free:
            process = self._take()
            try:
                # only now: a signal that comes later finds the process among those to be stopped
                if self._signum is not None:
                    raise Interrupted(self._signum, f"{job['folder']} was not begun; the same command goes on")
                process.do(job, reporter)
            except BaseException as error:
                process.end()
                self._processes.remove(process)
                if isinstance(error, EOFError):
                    raise PhalanxError(
                        f"the worker process of {job['folder']} died ({process.ending()}); "
                        "what it saved is kept, the same command goes on"
                    ) from None
                raise
            self._idle.append(process)

    def _take(self) -> _Process:
        with suppress(IndexError):
            return self._idle.pop()
        process = _Process(self._target, self._threads)
        self._processes.append(process)
        return process

    def __enter__(self) -> WorkerPool:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._stop) for signum in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            left = tuple(self._processes)
            for process in left:
                process.dismiss()
            for process in left:
                process.end()
        finally:
            for signum, handler in self._before.items():
                signal.signal(signum, handler)
        if self._signum is not None and error is None:
            raise Interrupted(self._signum, "stopped; what was begun is finished, the same command goes on")

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        del frame
        insisting = self._signum is not None
        self._signum = signum
        # a copy: the threads that wait for the workers may start and end some
        for process in tuple(self._processes):
            process.send_signal(signal.SIGKILL if insisting else signum)
        if insisting:
            raise Interrupted(signum, "stopped at once; what was saved is kept, the same command goes on")


class _Process:
    """One worker process, seen from its pool."""

    def __init__(self, target: str, threads: int | None) -> None:
        environment = dict(os.environ)
        # a job finds the modules that this process finds, and none that only lie in the working directory
        environment["PYTHONPATH"] = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        if threads is not None:
            environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
        with _blocked_signals():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "phalanx.worker", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.send_signal = self._process.send_signal

    def do(self, job: Mapping[str, JSON], reporter: Reporter) -> None:
        """Raises what came back, EOFError if nothing did."""
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps({"job": job}).encode() + b"\n")
            self._requests.flush()
        for line in self._answers:
            # a worker that is killed may leave half a line
            if not line.endswith(b"\n"):
                break
            answer = json.loads(line)
            if "progress" in answer:
                reporter.progress(*answer["progress"])
            elif "notify" in answer:
                reporter.notify(answer["notify"])
            elif "error" in answer:
                raise _rebuilt(str(job["folder"]), answer["error"])
            else:
                return
        raise EOFError

    def dismiss(self) -> None:
        """Lets the process end by itself: at once if it is idle, else as if it got SIGTERM."""
        with suppress(BrokenPipeError):
            self._requests.close()

    def end(self) -> None:
        """Dismisses the process and waits; one that does not end is killed."""
        self.dismiss()
        try:
            self._process.wait(GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "killed by SIGKILL, as the system does when memory runs out"
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process started inside is born deaf to stop signals: they wait until it can answer them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rebuilt(folder: str, error: Mapping[str, Any]) -> Exception:
    if "traceback" in error:
        return RuntimeError(f"{folder} failed in its worker process:\n{error['traceback']}")
    if "signum" in error:
        return Interrupted(error["signum"], error["message"])
    rebuilt = _KINDS[error["kind"]](error["message"])
    rebuilt.exit_code = error["exit_code"]
    return rebuilt
