"""What every benchmark shares: interleaved timing, paired ratios, and the record that goes into `results/`.

A machine's clock drifts and its neighbours come and go, so seconds are never a result here. The variants are timed in
turn, round after round, in one process on one thread; a result is the median over the rounds of the ratio of two
variants within one round, with the smallest and the largest beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch

import phalanx
from phalanx.workflow import processor_name

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
TABLE_START, TABLE_END = "<!-- results: written by the scripts -->", "<!-- end of results -->"

Times = Mapping[str, Sequence[float]]
"""Seconds of each variant, one per round."""


@dataclass(frozen=True)
class Spread:
    """A ratio over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Rounded to three decimals: more is noise."""
        return cls(round(median(values), 3), round(min(values), 3), round(max(values), 3))


@dataclass(frozen=True)
class Bar:
    """What a measurement must reach."""

    what: str
    value: float
    """The measured number (a ratio's median)."""
    limit: float
    at_most: bool
    """True: `value` must not exceed `limit`; False: it must reach it."""

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Record:
    """One benchmark's outcome: what a file in `results/` holds."""

    benchmark: str
    """The script's name."""
    what: str
    """What was measured, and against what, in a sentence or two."""
    settings: Mapping[str, Any]
    """Everything that was chosen: sizes, seeds, budgets."""
    rounds: int
    """Interleaved rounds behind every ratio."""
    measurements: Mapping[str, Any]
    bars: Sequence[Bar]
    packages: tuple[str, ...] = ()
    """Distributions, beside the usual ones, whose versions matter."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Filled in by `stamped`."""

    def stamped(self) -> Record:
        """The same with hardware, versions and threads."""
        names = ("torch", "numpy", *self.packages)
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "processor": processor_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {"phalanx": phalanx.__version__, **{name: _version(name) for name in names}},
        }
        return Record(**{**vars(self), "environment": environment})

    def to_json(self) -> dict[str, Any]:
        """Plain values; every bar with whether it was met."""
        plain = asdict(self)
        plain.pop("packages")
        plain["bars"] = [{**asdict(bar), "met": bar.met} for bar in self.bars]
        return {"schema": SCHEMA, **plain}


def write_record(record: Record, folder: Path = RESULTS) -> Path:
    """Writes `folder`/BENCHMARK.json and prints its bars; in `results/`, the README's table follows."""
    plain = record.stamped().to_json()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.benchmark}.json"
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    print("\n".join(bar_rows(plain)))
    if folder == RESULTS:
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(TABLE_START)
        README.write_text(before + TABLE_START + results_table() + rest[rest.index(TABLE_END) :], encoding="utf-8")
    return path


def from_command_line(doc: str | None, measure: Callable[..., Record], *, width: int, batch: int, rounds: int) -> None:
    """Runs `measure(width, batch=, rounds=, device=)` on one thread, with these defaults, and writes its record."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    write_record(measure(chosen.width, batch=chosen.batch, rounds=chosen.rounds, device=chosen.device), chosen.out)


def bar_rows(record: Mapping[str, Any]) -> list[str]:
    """One Markdown row for each bar of a record read from its file."""
    return [
        f"| {record['benchmark']} | {bar['what']} | {bar['value']:.4g} "
        f"| {'at most' if bar['at_most'] else 'at least'} {bar['limit']:g} | {'yes' if bar['met'] else '**no**'} |"
        for bar in record["bars"]
    ]


def results_table(folder: Path = RESULTS) -> str:
    """The README's table: every bar of every committed record."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    head = ["", "| benchmark | what | measured | bar | met |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for record in records for row in bar_rows(record)), ""])


def clock(device: str) -> float:
    """Seconds. CPU time of this process, because on one thread it leaves out the moments in which another program held
    the core; on a GPU the wall clock, once the device has finished what it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> Times:
    """Seconds of each variant, one number a round, after one untimed call of each.

    The order is shuffled each round: a fixed one, even a rotated one, lets the same variant always find the caches and
    the heap as the same other left them, which alone made two equal networks differ by a tenth.
    """
    for run in variants.values():
        run()
    order = list(variants)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = clock(device)
            variants[name]()
            times[name].append(clock(device) - start)
    return times


def ratio(times: Times, variant: str, reference: str) -> Spread:
    """`variant` over `reference`, paired within each round."""
    return Spread.of([a / b for a, b in zip(times[variant], times[reference], strict=True)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" if src or benchmarks differ from it; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
