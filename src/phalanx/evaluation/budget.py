"""Time: how long an evaluation may take, how long it will take, and how long one attack may."""

# B batch

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from phalanx.attacks import Attack
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.evaluation.protocols import Member
from phalanx.evaluation.shards import Shard
from phalanx.evaluation.standing import Standing
from phalanx.nn import frozen, preserved_rng
from phalanx.rng import SampleRng

_PROBED_STEPS = 4, 12
"""Of the two short attacks that are timed: enough for every phase of one that has several."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far one call goes. Only `attack_seconds` can change a verdict."""

    seconds: float | None = None
    """Stop after the batch in which this much time is over; another call goes on."""
    attack_seconds: float | None = None
    """One attack on one batch that takes longer is given up: its images get the verdict timeout, never robust."""
    shard: Shard | None = None
    """Only these images, of a ledger that other processes share."""


def parse_duration(text: str) -> float:
    """ "90s", "10m", "1h30m" or a number of seconds, in seconds. Raises InputError unless it is positive."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    seconds = (
        0.0
        if found is None
        else sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    )
    if seconds <= 0:
        raise InputError(f"a time is written 90s, 10m or 1h30m, and is positive, got {text!r}")
    return seconds


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    if round(seconds) < 100:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class OutOfTime(Exception):
    """An attack took longer than it may."""


class _Watch(TorchFunctionMode):
    """Looks at the clock whenever torch is called, and raises once."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end: float | None = time.monotonic() + seconds

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._end is not None and time.monotonic() > self._end:
            # once: what gives the model back on the way out calls torch, too
            self._end = None
            raise OutOfTime
        return function(*args, **(kwargs or {}))


@contextmanager
def at_most(seconds: float | None, model: Callable[..., Any]) -> Iterator[None]:
    """Raises OutOfTime at the first call of torch after `seconds`; whatever is cut short, `model`, its flags and
    torch's global random state are as before. None sets no limit."""
    if seconds is None:
        yield
        return
    with frozen(model), preserved_rng(), _Watch(seconds):
        yield


def estimate(
    model: Callable[..., Any], batch: Batch, members: Sequence[Member], standing: Standing, samples: Collection[int]
) -> dict[str, float]:
    """About so many seconds are left for each member, from a few steps of each on one batch.

    `samples` are the ids of all images. What breaks early makes it shorter, and what a cascade takes.
    """
    left = {member.name: standing.left(member, samples) for member in members}
    return {
        member.name: _seconds(model, batch, member.attack) * left[member.name] / len(batch.y)
        for member in members
        if left[member.name]
    }


def _seconds(model: Callable[..., Any], batch: Batch, attack: Attack) -> float:
    """For the whole attack on the batch: what a short one takes, and each further step as long as some more of them."""
    short, longer = (_shortened(attack, steps) for steps in _PROBED_STEPS)
    begun, ended = (_timed(model, batch, probe) for probe in (short, longer))
    if _size(short) == _size(longer):
        return begun * _size(attack) / _size(short)
    each = max(ended - begun, 0.0) / (_size(longer) - _size(short))
    return begun + each * (_size(attack) - _size(short))


_SIZES = ("steps", "queries", "restarts", "targets", "classes", "searches")


def _size(attack: Attack) -> int:
    """Its steps over all restarts and targets."""
    size = 1
    for field in _own(attack):
        size *= max(getattr(attack, field), 1)
    return size


def _own(attack: Attack) -> list[str]:
    return [field.name for field in fields(attack) if field.name in _SIZES]


def _shortened(attack: Attack, steps: int) -> Attack:
    """The same attack with so many steps, one restart and one target."""
    most = {"steps": steps, "queries": steps}
    return replace(attack, **{field: min(getattr(attack, field), most.get(field, 1)) for field in _own(attack)})


def _timed(model: Callable[..., Any], batch: Batch, attack: Attack) -> float:
    started = time.perf_counter()
    attack.run(model, batch.x, batch.y, rng=SampleRng(0, batch.ids))
    if batch.x.is_cuda:
        torch.cuda.synchronize(batch.x.device)
    return time.perf_counter() - started
