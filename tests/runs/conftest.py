"""Shared tools of the fault tests: cheap children that may be killed, and damage done to files."""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

InChild = Callable[..., int]


def _run_in_child(work: Callable[[], object], failpoint: str | None = None) -> int:
    """Fork, run `work` under a failpoint, and give the exit status: 0, 1 for an exception, -9 for SIGKILL."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if failpoint:
                os.environ["PHALANX_FAILPOINT"] = failpoint
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def in_child() -> InChild:
    return _run_in_child


@pytest.fixture
def failpoints(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """Gives the names of the failpoints that some work passes, in order."""

    def collect(work: Callable[[], object]) -> list[str]:
        names: list[str] = []
        with monkeypatch.context() as patch:
            for module in ("atomic", "checkpoint", "ledger", "metrics"):
                patch.setattr(f"phalanx.runs.{module}.failpoint", names.append)
            work()
        return list(dict.fromkeys(names))

    return collect


def _damages(content: bytes, flips: int, cuts: int, seed: int = 7) -> Iterator[bytes]:
    rng = random.Random(seed)
    bits = range(len(content) * 8)
    for bit in sorted(rng.sample(bits, min(flips, len(bits)))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)
    for length in sorted(rng.sample(range(len(content)), min(cuts, len(content)))):
        yield content[:length]


@pytest.fixture
def each_damage() -> Callable[..., Iterator[None]]:
    """Iterate over seeded bit flips and truncations of a file, in place; it is whole again after."""

    def damage(path: Path, flips: int = 200, cuts: int = 40) -> Iterator[None]:
        content = path.read_bytes()
        try:
            for damaged in _damages(content, flips, cuts):
                path.write_bytes(damaged)
                yield None
        finally:
            path.write_bytes(content)

    return damage
