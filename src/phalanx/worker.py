"""A worker process: does the jobs that a `phalanx.workers.WorkerPool` gives it, one after the other.

    python -m phalanx.worker MODULE:FUNCTION

It speaks one JSON object a line. On standard input come {"job": {...}}; on standard output go
{"progress": [done, total, note]}, {"notify": text}, and last {"done": true}, or {"error": {...}}, after which it ends.
A job is done in the main thread. The pool starts the process with stop signals blocked, in every thread: one of them
takes the first signal, or the end of standard input, which is the end of the pool, and calls that signal's Python
handler in the main thread; whatever signals follow are ignored.
"""

from __future__ import annotations

import _thread
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from phalanx.errors import Interrupted, PhalanxError

if TYPE_CHECKING:
    from phalanx.training import Reporter

Job: TypeAlias = Mapping[str, Any]
Target: TypeAlias = "Callable[[Job, Reporter], None]"

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Those of `phalanx.training.signals`, which takes seconds to import."""

GRACE_SECONDS = 30.0
"""So long a worker without a pool may take to save its job."""

PROGRESS_SECONDS = 0.1
"""Between two reports of progress."""


def main() -> None:
    """Serves the process's pipes until it is stopped, or a job fails."""
    requests, answers = _take_pipes()
    jobs: SimpleQueue[Job] = SimpleQueue()
    worker = _Worker(sys.argv[1], answers)
    for signum in STOP_SIGNALS:
        signal.signal(signum, worker.stop)
    threading.Thread(target=worker.watch, args=(jobs,), daemon=True).start()
    threading.Thread(target=_read, args=(requests, jobs), daemon=True).start()
    while worker.do(jobs.get()):
        pass


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, for the protocol alone: from here on, a job that reads finds nothing there, and what
    it prints goes to standard error.
    """
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # unbuffered: nothing is left to be written when the pool is gone
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb", buffering=0)


def _read(requests: BinaryIO, jobs: SimpleQueue[Job]) -> None:
    for line in requests:
        # a pool that is killed may leave half a line
        if line.endswith(b"\n"):
            jobs.put(json.loads(line)["job"])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


class _Worker:
    """Does jobs and answers for them."""

    def __init__(self, target: str, answers: BinaryIO) -> None:
        self._target = target
        self._answers = _Answers(answers)
        self._working = False
        self._signum: int | None = None

    def watch(self, jobs: SimpleQueue[Job]) -> None:
        """Hands on the first stop signal only: pool and terminal may both send one, and a job takes the second for
        haste.
        """
        signum = signal.Signals(signal.sigwait(STOP_SIGNALS))
        self._signum = signum
        _thread.interrupt_main(signum)
        # wakes an idle main thread, which finds the signal before it looks at the job
        jobs.put({})

    def do(self, job: Job) -> bool:
        """Whether the job went well, and with it the process."""
        answer: dict[str, Any] = {"done": True}
        try:
            self._work(job)
        except BaseException as error:
            answer = {"error": _described(error)}
        self._answers.send(answer)
        return "done" in answer

    def _work(self, job: Job) -> None:
        try:
            self._working = True
            if self._signum is not None:
                self.stop(self._signum, None)
            _find(self._target)(job, self._answers)
        finally:
            self._working = False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Handles a stop signal wherever the job has no handler of its own."""
        del frame
        if self._working:
            raise Interrupted(signum, "stopped; what was saved is kept, the same command goes on")


def _find(target: str) -> Target:
    module, _, name = target.partition(":")
    found: Target = getattr(importlib.import_module(module), name)
    return found


def _described(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, PhalanxError):
        return {"traceback": "".join(traceback.format_exception(error))}
    # the nearest class that the pool knows: it need not have imported the one that was raised
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == PhalanxError.__module__)
    described = {"kind": kind.__name__, "message": str(error), "exit_code": error.exit_code}
    return described | ({"signum": error.signum} if isinstance(error, Interrupted) else {})


class _Answers:
    """The way back to the pool; a Reporter."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._progress_at = 0.0

    def progress(self, done: int, total: int, note: str) -> None:
        """At most ten a second are sent, and the last."""
        now = time.monotonic()
        if done == total or now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self.send({"progress": [done, total, note]})

    def notify(self, message: str) -> None:
        """Always sent."""
        self.send({"notify": message})

    def send(self, answer: Mapping[str, Any]) -> None:
        """One line, whole. Nobody may be listening: then the job is about to be stopped, and has to save first."""
        line = json.dumps(answer).encode() + b"\n"
        with self._lock, suppress(BrokenPipeError):
            self._pipe.write(line)


if __name__ == "__main__":
    main()
