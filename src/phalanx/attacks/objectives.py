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


_CLASSES_OF_DLR = {"dlr": 3, "dlr_targeted": 4}


def fallback(objective: str, num_classes: int) -> str:
    """The objective that this one is on a model of so many classes: a DLR that has too few of them is the margin."""
    return "margin" if num_classes < _CLASSES_OF_DLR.get(objective, 0) else objective


@OBJECTIVES.register("dlr")
def dlr(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """The margin over z_1 - z_3, logits z in falling order (difference of logits ratio, Croce & Hein 2020, eq. 6).

    Neither a shift nor a scale of the logits changes it, so that a confident model's gradient does not vanish. Needs 3
    classes; with 2 it is the margin.
    """
    del clean
    gain_B = _margin(attacked.logits, y)
    if attacked.logits.shape[-1] < _CLASSES_OF_DLR["dlr"]:
        return gain_B
    falling_B3 = attacked.logits.topk(3, -1).values
    return gain_B / (falling_B3[:, 0] - falling_B3[:, 2]).clamp_min(1e-12)


@OBJECTIVES.register("dlr_targeted", clean_pass=True)
def dlr_targeted(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """The targeted form, to be lowered, `y` the class to reach: (z_s - z_y) / (z_1 - (z_3 + z_4) / 2) (sec. 4, eq. 7).

    s, the class to leave, is the clean image's answer among all others: of an image that is classified rightly its
    label. Needs 4 classes; with fewer it is the margin of `y`.
    """
    assert clean is not None
    if attacked.logits.shape[-1] < _CLASSES_OF_DLR["dlr_targeted"]:
        return _margin(attacked.logits, y)
    left_B1 = clean.logits.scatter(-1, y[:, None], float("-inf")).argmax(-1, keepdim=True)
    falling_B4 = attacked.logits.topk(4, -1).values
    lead_B = (attacked.logits.gather(-1, left_B1) - attacked.logits.gather(-1, y[:, None])).squeeze(-1)
    return lead_B / (falling_B4[:, 0] - falling_B4[:, 2:].mean(-1)).clamp_min(1e-12)


@OBJECTIVES.register("kl", clean_pass=True, only="untargeted")
def kl(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """KL(p(x) || p(x')) of the softmax at the clean and at the attacked image (Zhang et al. 2019, eq. 5); no labels.

    Least at the clean image, where its gradient vanishes: a search for more must start elsewhere.
    """
    del y
    assert clean is not None
    return _divergence(clean.logits, attacked.logits)


def _divergence(clean_BN: Tensor, attacked_BN: Tensor) -> Tensor:
    """(B,) KL(softmax(clean) || softmax(attacked)), the clean side fixed."""
    log_p_BN = clean_BN.detach().log_softmax(-1)
    # both sides as logarithms: where a probability underflows, t log t has no derivative
    return F.kl_div(attacked_BN.log_softmax(-1), log_p_BN, reduction="none", log_target=True).sum(-1)


@OBJECTIVES.register("kl_route", clean_pass=True, only="untargeted")
def kl_route(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """`kl` plus the same divergence of the router's scores, 1 to 1, the mean over several gates (AdvMoE's training).

    Without a route it is `kl`.
    """
    assert clean is not None
    gain = kl(attacked, clean, y)
    if attacked.route is None or clean.route is None:
        return gain
    pairs = zip(leaves(clean.route), leaves(attacked.route), strict=True)
    return gain + torch.stack([_divergence(before.scores, after.scores) for before, after in pairs]).mean(0)


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


@OBJECTIVES.register("steer", only="untargeted")
def steer(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """Send the image to the expert that answers in `attacked` and make it err there, on an "expert-J" surface.

    min(route lead of J, h) + min(-class lead of y, h), each in standard deviations of its row: both terms are hinged a
    little past their boundary, so that neither goes on growing at the other's cost. Works without a gate gradient: the
    scores are differentiated as such.
    """
    del clean
    return (-_lead(attacked.logits, y[:, None])).clamp_max(STEER_HINGE) + _held_route(attacked)


@OBJECTIVES.register("steer_to", only="targeted")
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


MISLEAD_WEIGHT = 0.5
"""Of gamma in `mislead`."""


@OBJECTIVES.register("mislead", only="untargeted")
def mislead(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
    """On the surface "mixing" of an `AdaptiveSmoothing`: max_{k != y} log p_D,k - log p_D,y - max(gamma, 0) / 2.

    Where the mixing network is sure, alpha saturates and so does its part of the mixture's own gradient; here it is
    driven until it says "clean", so that the standard half has its say, and the rest goes to the margin. The attack of
    Bai et al. 2024 has the weight, but cross-entropy and no hinge: it spends all on gamma.
    """
    del clean
    logits_BC, gamma = attacked.logits[:, :-1], attacked.logits[:, -1]
    return _margin(logits_BC, y) - MISLEAD_WEIGHT * gamma.clamp_min(0)


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


@OBJECTIVES.register_family("cross_entropy_route")
def cross_entropy_route(weight: int) -> Objective:
    """CE(logits, y) + weight CE(scores, y mod E), the mean over several gates; for reproductions.

    What AdvMoE's released code evaluates its mixtures with. A router trained to know y mod E lends the sign of the
    gradient to the second term, which is not what is judged. Without a route it is the cross-entropy.
    """

    def objective(attacked: Routed, clean: Routed | None, y: Tensor) -> Tensor:
        gain = cross_entropy(attacked, clean, y)
        if attacked.route is None:
            return gain
        losses = [
            F.cross_entropy(leaf.scores, y % leaf.num_experts, reduction="none") for leaf in leaves(attacked.route)
        ]
        return gain + weight * torch.stack(losses).mean(0)

    return objective
