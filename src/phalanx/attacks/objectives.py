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
from phalanx.errors import InputError
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
    return _margin(attacked.logits, y)


def _margin(logits_BC: Tensor, y: Tensor) -> Tensor:
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


JOINT_CAP = 1.0
"""How far `joint` pushes the standard half past its boundary, in standard deviations of its logits."""


@OBJECTIVES.register_family("joint")
def joint(weight: int) -> Objective:
    """To be lowered, on the surface "halves" of a dual model; `y` is the class k to reach in both halves at once.

    -min(lead of k in z_S, JOINT_CAP) - L (log p_R,k - max_{c != k} log p_R,c), L the weight; the lead is in detached
    standard deviations of S's logits. Through the mixture's own gradient a confident S hides itself and, once it sees
    k, disappears, so that nothing keeps it there; here S is driven to k by its logits and held there, and all that is
    left goes to R's margin against the same k.
    """

    def objective(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
        del clean
        standard_BC, robust_BC = attacked.logits.chunk(2, -1)
        # log p_k - log p_c is z_k - z_c: the normaliser cancels
        return weight * _margin(robust_BC, y) - _lead(standard_BC, y[:, None]).clamp_max(JOINT_CAP)

    return objective


@OBJECTIVES.register_family("cross_entropy_fp16")
def cross_entropy_fp16(batch: int) -> Objective:
    """Cross-entropy / N as half precision without loss scaling would give it; for reproductions.

    The logits are rounded to fp16 and so is their gradient (p - e_y) / N, which is exactly 0 below 3e-8: at N = 512
    where 1 - p_y < 1.5e-5. Layers before the logits compute in the caller's precision, so that the result is the same
    on every device; half precision there loses more. This is a lower bound of the underflow.
    """
    if batch < 1:
        raise InputError(f"objective 'cross_entropy_fp16-N' divides by N, at least 1, got {batch}; 1 is the sum")

    def objective(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
        del clean
        # a cast rounds the value on its way forward and the gradient on its way back
        logits_BC = attacked.logits.half().to(attacked.logits.dtype)
        return F.cross_entropy(logits_BC, y, reduction="none") / batch

    return objective
