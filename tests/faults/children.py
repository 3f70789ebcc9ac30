"""Children that are killed: forked after the imports, so that each costs milliseconds."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phalanx.config import EvaluationConfig, RunConfig, load_run
from phalanx.data import Batch
from phalanx.errors import PhalanxError
from phalanx.evaluation.filling import Filling
from phalanx.evaluation.protocols import Member
from phalanx.training import Reporter
from phalanx.workflow import Conduct, evaluate_run, train_run

TINY = (
    "data.train_limit=100",
    "data.val_limit=20",
    "data.test_limit=60",
    "model.experts=2",
    "model.options.hidden=[8]",
    "method.attack.steps=2",
    "training.epochs=8",
    "training.batch_size=32",
    "training.validate_every=2",
    "training.ema_decay=0.9",
    "training.checkpoint_seconds=0",
    "validation.protocol=pgd-2",
    "device=cpu",
)
BATCH = 4
EVALUATION = EvaluationConfig(protocol="fgsm,pgd-5x2", batch_size=BATCH)
STEPS = 24
"""8 epochs of 3 batches."""
BATCHES = 15
"""60 images by 4."""


def config() -> RunConfig:
    """A small adversarial training that saves after every step."""
    return load_run("digits-at", TINY).value


def train(folder: Path, reporter: Reporter | None = None) -> None:
    train_run(config(), folder, reporter)


def evaluate(
    run: Path,
    folder: Path,
    reporter: Reporter | None = None,
    *,
    log: Path | None = None,
    conduct: Conduct | None = None,
) -> None:
    """Evaluates the run; `log` gets a line for each image that a member of the protocol attacks for its verdict."""
    attack = Filling._attack

    def logged(self: Filling, member: Member, batch: Batch) -> Any:
        with log.open("a") as file:  # type: ignore[union-attr]
            file.write("".join(f"{member.name}-{sample}\n" for sample in batch.ids.tolist()))
        return attack(self, member, batch)

    if log is not None:
        Filling._attack = logged  # type: ignore[method-assign]
    try:
        evaluate_run(run, folder, EVALUATION, reporter, conduct=conduct)
    finally:
        Filling._attack = attack  # type: ignore[method-assign]


def fork(work: Callable[[], object]) -> int:
    """The process id of a child that does `work`; it exits with 0, an error's exit code, 130 when it was hurried, or 99
    for a bug."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work()
        code = 0
    except PhalanxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        # as the command line ends then
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(work: Callable[[], object]) -> int:
    """The exit code of a child that does `work`."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


class _Steps:
    """A reporter that writes one byte into a pipe for every step or batch."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def progress(self, done: int, total: int, note: str) -> None:
        os.write(self.descriptor, b".")

    def notify(self, message: str) -> None:
        print(message, file=sys.stderr)


def kill_at_random(work: Callable[[Reporter], object], kills: int, most_steps: int, rng: random.Random) -> int:
    """Starts `work` so many times and kills -9 each child, at most `most_steps` steps and 30 ms into its work; how
    many were killed before they had finished.
    """
    killed = 0
    for _ in range(kills):
        reading, writing = os.pipe()
        steps, seconds = rng.randint(0, most_steps), rng.uniform(0, 0.03)
        pid = fork(lambda end=writing: work(_Steps(end)))
        os.close(writing)
        # ends early if the child does
        while steps > 0 and (seen := os.read(reading, steps)):
            steps -= len(seen)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reading)
        assert status in (0, -signal.SIGKILL), f"{steps} steps and {seconds:.4f} s in, it ended with {status}"
        killed += status != 0
    return killed


def signal_at_random(
    work: Callable[[Reporter], object], signums: Sequence[int], most_steps: int, rng: random.Random
) -> list[tuple[int, int, float]]:
    """Starts `work` once for each signal and sends it to the child at most `most_steps` steps and 30 ms into its work:
    the signal, the exit code, and the seconds from one to the other.
    """
    seen = []
    for signum in signums:
        reading, writing = os.pipe()
        steps, seconds = rng.randint(1, most_steps), rng.uniform(0, 0.03)
        pid = fork(lambda end=writing: work(_Steps(end)))
        os.close(writing)
        while steps > 0 and (done := os.read(reading, steps)):
            steps -= len(done)
        time.sleep(seconds)
        os.kill(pid, signum)
        started = time.monotonic()
        # nobody reads: a full pipe must not hold up the child
        while os.read(reading, 4096):
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen.append((signum, code, time.monotonic() - started))
        os.close(reading)
    return seen
