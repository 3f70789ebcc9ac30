"""What an attack climbs: functions (attacked pass, clean pass, labels) -> gain (B,), larger is worse for the model.

Registered by name, so that a ledger can say which one was used. Gains are per sample and are summed before
differentiating, never averaged: a mean would shrink gradients with the batch size.
"""

# B batch, C classes, E experts

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks.registry import Registry
from phalanx.routing import Route, Routed, leaves

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


@OBJECTIVES.register("kl", clean_pass=True)
def kl(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """KL(p(x) || p(x')) of the softmax at the clean and at the attacked image (Zhang et al. 2019, eq. 5); no labels.

    Least at the clean image, where its gradient vanishes: a search for more must start elsewhere.
    """
    del y
    assert clean is not None
    log_p_BC = clean.logits.detach().log_softmax(-1)
    return F.kl_div(attacked.logits.log_softmax(-1), log_p_BC, reduction="none", log_target=True).sum(-1)


STEER_HINGE = 0.25
"""How far past its boundary each term of `steer` is pushed, in standard deviations of the scores or logits."""


def _lead(values_BN: Tensor, chosen_B1: Tensor) -> Tensor:
    """(B,) how far the chosen entry is above all others, in detached standard deviations of its row."""
    others_B = values_BN.scatter(-1, chosen_B1, float("-inf")).amax(-1)
    scale_B = values_BN.detach().std(-1, correction=0).clamp_min(1e-12)
    return (values_BN.gather(-1, chosen_B1).squeeze(-1) - others_B) / scale_B


def _route_lead(leaf: Route) -> Tensor:
    if leaf.num_experts == 1:
        return leaf.scores.new_full((len(leaf.scores),), float("inf"))
    return _lead(leaf.scores, leaf.experts[:, :1])


def _held_route(attacked: Routed) -> Tensor | float:
    """(B,) the hinged lead of the answering expert over all others, the smallest of all leaves; 0 without a route."""
    if attacked.route is None:
        return 0.0
    return torch.stack([_route_lead(leaf).clamp_max(STEER_HINGE) for leaf in leaves(attacked.route)]).amin(0)


@OBJECTIVES.register("steer")
def steer(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """Send the image to the expert that answers in `attacked` and make it err there, on an "expert-J" surface.

    min(route lead of J, h) + min(-class lead of y, h), each in standard deviations of its row: both terms are hinged a
    little past their boundary, so that neither goes on growing at the other's cost. Works without a gate gradient: the
    scores are differentiated as such.
    """
    del clean
    return (-_lead(attacked.logits, y[:, None])).clamp_max(STEER_HINGE) + _held_route(attacked)


@OBJECTIVES.register("steer_to")
def steer_to(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """The targeted form, to be lowered: -min(class lead of y, h) - min(route lead of J, h), `y` the class to reach."""
    del clean
    return -(_lead(attacked.logits, y[:, None]).clamp_max(STEER_HINGE) + _held_route(attacked))
