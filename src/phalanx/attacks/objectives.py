"""What an attack climbs: functions (attacked pass, clean pass, labels) -> gain (B,), larger is worse for the model.

Registered by name, so that a ledger can say which one was used. Gains are per sample and are summed before
differentiating, never averaged: a mean would shrink gradients with the batch size.
"""

# B batch, C classes

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks.registry import Registry
from phalanx.routing import Routed

Objective: TypeAlias = Callable[[Routed, Routed | None, Tensor], Tensor]

OBJECTIVES: Registry[Objective] = Registry("objective")


@OBJECTIVES.register("cross_entropy")
def cross_entropy(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """-log softmax(logits)[y] (Madry et al. 2018, eq. 2.1)."""
    del clean
    return F.cross_entropy(attacked.logits, y, reduction="none")


@OBJECTIVES.register("margin")
def margin(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """max_{k != y} logits_k - logits_y (Carlini & Wagner 2017, f_6 without its floor): positive is misclassified."""
    del clean
    logits_BC = attacked.logits
    others_BC = logits_BC.scatter(-1, y[:, None], float("-inf"))
    return others_BC.amax(-1) - logits_BC.gather(-1, y[:, None]).squeeze(-1)
