"""Attack strengths drawn anew for each batch (Divided We Fall, Algorithms 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from phalanx.attacks import AnyAttack
from phalanx.errors import InputError
from phalanx.rng import Rng
from phalanx.threat import parse_epsilon

AttackT = TypeVar("AttackT", bound=AnyAttack)

Draws = Mapping[str, Sequence[float | str] | None]
"""A field of an attack to the set its value is drawn from; None leaves the field alone."""


def check_draws(attack: AnyAttack, draws: Draws, names: Mapping[str, str]) -> None:
    """Raises InputError, naming the option (`names`: by field), for a set that is empty, that `attack` has no such
    field for, or that holds a value which it does not take."""
    for field, choices in draws.items():
        if choices is None:
            continue
        name = names[field]
        if not choices:
            raise InputError(f"{name} must hold at least one value to draw from, got none")
        if not hasattr(attack, field):
            raise InputError(f"{name} needs an attack with {field}, got {attack.name}; use pgd, or leave {name} out")
        for value in choices:
            try:
                replace(attack, **{field: value})  # type: ignore[arg-type]
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None


def draw(attack: AttackT, draws: Draws, rng: Rng, device: torch.device) -> tuple[AttackT, dict[str, Tensor]]:
    """`attack` with each field of `draws` set to one value of its set, all equally likely.

    A function of `rng` and the field's name alone: in training of the seed and the step. Also returns what was drawn
    as "drawn_FIELD" ().
    """
    logs = {}
    for field, choices in draws.items():
        if choices is not None:
            # 63 random bits: the remainder favours no value by more than a part in 10^18
            value = choices[rng.fold("draw", field).seed % len(choices)]
            attack = replace(attack, **{field: value})  # type: ignore[arg-type]
            logs[f"drawn_{field}"] = torch.tensor(float(parse_epsilon(value)), device=device)
    return attack, logs
