"""What must be known about a model before its verdicts are believed, from clean images."""

# B batch, C classes

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.attacks.autoattack import fitted
from phalanx.errors import InputError
from phalanx.evaluation.protocols import Protocol
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import routed

PROBABILITIES = "probabilities"
ALLOWED = (PROBABILITIES,)
"""What can be evaluated none the less, if the caller says so."""

_SUMS_TO_ONE = 1e-4
_SAME = 1e-4
"""Two passes differ where the unit vectors of their logits are further apart (as in AutoAttack's own check)."""


def check_allowed(allow: Collection[str]) -> None:
    """Raises InputError for a word that allows nothing."""
    unknown = sorted({*allow} - {*ALLOWED})
    if unknown:
        raise InputError(f"allow can name {', '.join(ALLOWED)}, got {unknown[0]!r}")


def check_logits(logits: Tensor, allow: Collection[str]) -> None:
    """Raises InputError for (B, C) answers that are probabilities, unless that is allowed."""
    if PROBABILITIES in allow or not len(logits) or logits.shape[1] < 2:
        return
    in_range = bool(((logits >= 0) & (logits <= 1)).all())
    if in_range and bool(((logits.sum(-1) - 1).abs() <= _SUMS_TO_ONE).all()):
        raise InputError(
            "the model answers with probabilities (each row lies in [0, 1] and sums to 1), whose gradients vanish "
            "where it is sure, so that it would look robust; leave out its last softmax, or say --allow probabilities "
            "(in Python allow=['probabilities']) if it has none"
        )


def check_classes(outputs: int, classes: int) -> None:
    """Raises InputError unless a model has as many outputs as there are classes."""
    if outputs != classes:
        raise InputError(
            f"the model has {outputs} outputs and there are {classes} classes; use the data that it was made for, "
            f"or say --classes {outputs} if the labels are the first {classes} of its outputs"
        )


def remarks(model: Callable[..., Any], x: Tensor, logits: Tensor, protocol: Protocol) -> Iterator[str]:
    """What is not wrong, and must be told. `x` (B, ...) images and the model's answers (B, C) to them."""
    if isinstance(model, nn.Module):
        training = sum(module.training for module in model.modules())
        if training:
            yield f"the model came in training mode ({training} of its parts); it is evaluated in evaluation mode"
    averaged = all(getattr(member.attack, "eot", 1) > 1 for member in protocol.members)
    if is_random(model, x, logits):
        if not averaged:
            yield (
                "the model's answers are random: two passes over the same images differ, so that a gradient of one "
                "pass misleads; use --protocol rand, whose gradients are averages"
            )
    elif averaged:
        yield "the model's answers are not random: averages over passes change nothing; use --protocol standard"
    for member in protocol.members:
        yield from fallbacks(member.name, member.attack, logits.shape[1])


@torch.no_grad()
def is_random(model: Callable[..., Any], x: Tensor, logits: Tensor) -> bool:
    """Whether another pass over the images (B, ...) gives other answers than `logits` (B, C)."""
    with frozen(model), exact_fp32(), preserved_rng():
        # of no seed that the first pass may have had: it would draw the same
        torch.manual_seed((torch.initial_seed() + 1) % 2**63)
        again = routed(model, x).logits
    finite = (logits.isfinite() & again.isfinite()).all(-1)
    one, two = (nn.functional.normalize(answers[finite].double(), dim=-1) for answers in (logits, again))
    return bool(((one - two).norm(dim=-1) > _SAME).any())


def fallbacks(name: str, attack: Attack, classes: int) -> Iterator[str]:
    """Where an attack is another on a model of so few classes."""
    real = fitted(attack, classes)
    if real.objective != attack.objective:
        yield f"{name}: {attack.objective} needs more than {classes} classes; the {real.objective} is climbed instead"
    asked, aimed = getattr(attack, "targets", 0), getattr(real, "targets", 0)
    if asked != aimed:
        yield f"{name}: of {classes} classes {aimed} can be aimed at, not {asked}"
