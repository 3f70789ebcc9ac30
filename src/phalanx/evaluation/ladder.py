"""What the gates do as the radius grows: accuracy, flipped routes and entropy, from 0 to twice epsilon."""

# B batch, G gates

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.attacks import Attack
from phalanx.data import Batch
from phalanx.evaluation.alone import answer
from phalanx.evaluation.gates import flips, gates_of
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import gate_entropy
from phalanx.runs.rate import Rate
from phalanx.runs.rungs import Rung, RungGate
from phalanx.threat import parse_epsilon

MULTIPLES = ("0", "1/4", "1/2", "1", "2")
"""Of the threat's radius; the last is outside the threat."""


class RungColumns(NamedTuple):
    """One batch at one radius, on the CPU."""

    held_B: Tensor
    """bool"""
    names: tuple[str, ...]
    flipped_GB: Tensor
    """bool"""
    entropy_GB: Tensor


def rungs_of(attack: Attack) -> dict[str, Attack]:
    """The attack by multiple of its radius; without a radius that the norm does not know (Linf above 1)."""
    radius = parse_epsilon(attack.eps or 0)
    found = {}
    for multiple in MULTIPLES:
        eps = radius * Fraction(multiple)
        # the own radius stays as it was written
        if multiple == "1" or not ((attack.norm or "Linf") == "Linf" and eps > 1):
            found[multiple] = attack if multiple == "1" else replace(attack, eps=float(eps))
    return found


def climb(model: Callable[[Tensor], Any], batch: Batch, attack: Attack, multiple: str, seed: int) -> RungColumns:
    """One rung; at radius 0 there is nothing to search, and the model is only asked."""
    clean = answer(model, batch.x)
    if multiple == "0":
        attacked = clean
        held_B = (clean.logits.argmax(-1) == batch.y) & clean.logits.isfinite().all(-1)
    else:
        result = attack.run(model, batch.x, batch.y, rng=SampleRng(derive_seed(seed, "eps", multiple), batch.ids))
        attacked = answer(model, result.x_adv)
        held_B = ~(result.broken | result.invalid)
    gates = gates_of(model, clean.route, attacked.route)
    return RungColumns(
        held_B.cpu(),
        tuple(gate.name for gate in gates),
        torch.stack([flips(gate.clean, gate.attacked) for gate in gates]).cpu(),
        torch.stack([gate_entropy(gate.attacked).double() for gate in gates]).cpu(),
    )


def rung(multiple: str, eps: float, batches: Sequence[RungColumns]) -> Rung:
    """Of all batches."""
    held_N = torch.cat([columns.held_B for columns in batches])
    flipped_GN = torch.cat([columns.flipped_GB for columns in batches], 1)
    entropy_GN = torch.cat([columns.entropy_GB for columns in batches], 1)
    gates = zip(batches[0].names, flipped_GN, entropy_GN, strict=True)
    return Rung(
        multiple,
        eps,
        Rate.of(held_N),
        tuple(RungGate(name, Rate.of(flipped_N), _mean(entropy_N)) for name, flipped_N, entropy_N in gates),
    )


def _mean(values: Tensor) -> float | None:
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else None
