"""A model and its gates as the radius of an attack grows: what is measured, written and drawn."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.runs.rate import Rate


@dataclass(frozen=True)
class RungGate:
    """One gate at one radius."""

    name: str
    flipped: Rate
    """`held` of the n images are sent elsewhere than when they are clean."""
    entropy: float | None
    """Mean in nats of softmax(scores), over the images whose scores are finite; None without any."""


@dataclass(frozen=True)
class Rung:
    """The model under one attack on the whole of it, within a multiple of the threat's radius."""

    multiple: str
    eps: float
    accuracy: Rate
    gates: tuple[RungGate, ...]
