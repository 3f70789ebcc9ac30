"""What the tests of the worker pool let its workers do, and a small study that does it; cheap to import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from phalanx import errors
from phalanx.errors import Interrupted, PhalanxError
from phalanx.runs import Node, Study
from phalanx.workers import WorkerPool

PATIENCE_SECONDS = 10.0
PAUSE_SECONDS = 0.01


class OddError(PhalanxError):
    """One that the pool's process has never heard of."""

    exit_code = 3


class OddInputError(errors.InputError):
    """One that needs more than a message."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}")


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails the test when `condition` does not come true in time."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(PAUSE_SECONDS)


# -- targets -------------------------------------------------------------------------------------------------------


def do(job: Mapping[str, Any], reporter: Any) -> None:
    """Calls the function of this module that the job names."""
    globals()[job["call"]](job, reporter)


def tell_pid(job: Mapping[str, Any], reporter: Any) -> None:
    reporter.notify(str(os.getpid()))


def meet(job: Mapping[str, Any], reporter: Any) -> None:
    """Ends when the job it is to meet goes on at the same time."""
    Path(job["folder"]).touch()
    wait_until(Path(job["other"]).exists)


def count(job: Mapping[str, Any], reporter: Any) -> None:
    for done in range(1, 1001):
        reporter.progress(done, 1000, "counting")


def print_much(job: Mapping[str, Any], reporter: Any) -> None:
    print('{"done": true}')
    os.write(1, b'{"error": {"traceback": "not mine"}}\n')
    subprocess.run(["echo", "{"], check=True)
    reporter.notify(f"read {sys.stdin.read()!r}")


def fail(job: Mapping[str, Any], reporter: Any) -> None:
    if job["kind"] == "Interrupted":
        raise Interrupted(signal.SIGUSR1, "saved")
    if job["kind"] == "OddInputError":
        raise OddInputError(7, "it went wrong")
    raise {**vars(errors), "OddError": OddError}[job["kind"]]("it went wrong")


def divide(job: Mapping[str, Any], reporter: Any) -> None:
    raise ZeroDivisionError("by nothing")


def leave(job: Mapping[str, Any], reporter: Any) -> None:
    sys.exit(0)


def die(job: Mapping[str, Any], reporter: Any) -> None:
    os.kill(os.getpid(), job["signum"])


def tell_threads(job: Mapping[str, Any], reporter: Any) -> None:
    reporter.notify(os.environ.get("OMP_NUM_THREADS", "unset"))


def save_when_asked(job: Mapping[str, Any], reporter: Any) -> None:
    """As a training run does: a first signal asks, a second one would insist."""
    heard: list[int] = []

    def hear(signum: int, frame: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(signum)

    before = {signum: signal.signal(signum, hear) for signum in (signal.SIGINT, signal.SIGTERM)}
    folder = _begin(job)
    wait_until(lambda: bool(heard))
    # another signal of the same stop would come in this time
    time.sleep(10 * PAUSE_SECONDS)
    # perhaps to nobody
    reporter.progress(1, 1, "last step")
    for signum, handler in before.items():
        signal.signal(signum, handler)
    (folder / "saved").write_text(str(heard[0]))
    raise Interrupted(heard[0], f"{folder} was saved")


def end_anyway(job: Mapping[str, Any], reporter: Any) -> None:
    """Hears the signal too late to stop."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: bool(heard))
    signal.signal(signal.SIGTERM, before)


def work_on(job: Mapping[str, Any], reporter: Any) -> None:
    """Has no handlers of its own."""
    _begin(job)
    wait_until(lambda: False)


def be_stubborn(job: Mapping[str, Any], reporter: Any) -> None:
    """Does not let itself be stopped; a worker without a pool gives it a moment only."""
    sys.modules["__main__"].__dict__["GRACE_SECONDS"] = 10 * PAUSE_SECONDS
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: (Path(job["folder"]) / "asked").touch())
    _begin(job)
    wait_until(lambda: False)


def _begin(job: Mapping[str, Any]) -> Path:
    folder = Path(job["folder"])
    # in one step: whoever waits for it reads it at once
    (folder / "half").write_text(str(os.getpid()))
    (folder / "half").rename(folder / "pid")
    return folder


# -- a program that uses a pool ------------------------------------------------------------------------------------


class Quiet:
    """Tells nobody."""

    def progress(self, done: int, total: int, note: str) -> None: ...
    def notify(self, message: str) -> None: ...


def main(folder: Path, call: str) -> None:
    """Makes a study of two independent runs, each by `call`, and ends as the command line does."""

    def action(pool: WorkerPool, own: Path, needs: Mapping[str, Path]) -> None:
        pool.do({"call": call, "folder": str(own)}, Quiet())

    try:
        with WorkerPool(2, "worker_jobs:do") as pool:
            Study(folder, [Node(name, (), {}, partial(action, pool)) for name in ("a", "b")]).run(workers=2)
    except PhalanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
