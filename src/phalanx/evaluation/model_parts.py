"""What a model has that an attack can aim at, and the protocol that a name means for it."""

# B batch

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phalanx.evaluation.checks import is_random
from phalanx.evaluation.protocols import Protocol, protocol
from phalanx.evaluation.suites import SUITES, Parts
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import AdaptiveSmoothing, DualModel, leaves, routed
from phalanx.threat import ThreatModel


@torch.no_grad()
def parts_of(model: Callable[[Tensor], Any], x: Tensor) -> Parts:
    """Of a model, from a few images (B, ...) in [0, 1]: two passes."""
    with frozen(model), exact_fp32(), preserved_rng():
        logits, route = routed(model, x)
    # another kind of answer is named by the evaluation itself
    sound = isinstance(logits, Tensor) and logits.dim() == 2
    return Parts(
        gates=route is not None and any(leaf.num_experts > 1 for leaf in leaves(route)),
        halves=isinstance(model, DualModel),
        mixing=isinstance(model, AdaptiveSmoothing),
        random=sound and is_random(model, x, logits),
    )


def protocol_for(name: str, threat: ThreatModel, model: Callable[[Tensor], Any], x: Tensor | None = None) -> Protocol:
    """What a protocol's name means for this model, which may have parts that others lack.

    `x` (B, ...) are a few images, always the same ones; "thorough" and "quick" look at the model's answers to them.
    Raises InputError as `protocol` does.
    """
    if x is not None and len(x) and any(part.strip() in SUITES for part in name.split(",")):
        found = parts_of(model, x)
        return protocol(name, threat, gates=found.gates, halves=found.halves, mixing=found.mixing, random=found.random)
    return protocol(name, threat, halves=isinstance(model, DualModel), mixing=isinstance(model, AdaptiveSmoothing))
