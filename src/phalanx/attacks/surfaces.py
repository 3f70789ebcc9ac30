"""Which part of the model an attack differentiates: functions (model, attacked x', images x, clean pass) -> Routed.

Registered by name. Whatever surface found it, a perturbation is judged on the whole real model. On a model without a
route every surface of routing is the whole model; "standard", "robust" and "halves" are a dual model's alone, "mixing"
is that of one with a mixing network.
"""

# B batch, C classes, E experts, K selected

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phalanx.attacks.registry import Registry
from phalanx.errors import InputError
from phalanx.routing import (
    AdaptiveSmoothing,
    DualModel,
    Route,
    Routed,
    RoutedModel,
    RouteTree,
    SynergyOfExperts,
    dense,
    leaves,
    map_route,
    only,
    pin,
    routed,
)

Model: TypeAlias = Callable[[Tensor], Any]
Surface: TypeAlias = Callable[[Model, Tensor, Tensor, Routed | None], Routed]

SURFACES: Registry[Surface] = Registry("surface")

DEPLOYED = frozenset({"whole", "pinned"})
"""Surfaces whose logits are the deployed model's own; they differ in their gradient."""


@SURFACES.register("whole")
def whole(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """The deployed model: routed(x'), gate and experts together (the papers' RA)."""
    del x, clean
    return routed(model, x_adv)


@SURFACES.register("pinned")
def pinned(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x', pin(gate(x'))): the deployed forward pass without the gate's gradient.

    A top-1 gate's gradient, 1 + p - stopgrad(p), is an invention of training: the forward value is constant. Following
    it misleads an attack as often as it helps, so both are tried.
    """
    if not isinstance(model, RoutedModel):
        return whole(model, x_adv, x, clean)
    return model.routed(x_adv, pin(model.gate(x_adv)))


@SURFACES.register("experts", clean_pass=True)
def experts(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x', gate(x)): the route stays that of the clean image (RA-E)."""
    if not isinstance(model, RoutedModel) or clean is None or clean.route is None:
        return whole(model, x_adv, x, clean)
    return model.routed(x_adv, pin(clean.route))


UNDECIDED = -1
"""In the place of an expert: the gate decides."""


@SURFACES.register("held", clean_pass=True)
def held(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x', r): under a route given to the search, to one expert an image; where that says `UNDECIDED` the top-1
    gate decides, with its gradient. One search can so attack a mixture and single experts of it side by side.

    Without a given route every image keeps its clean one. Raises InputError for a model without one top-1 gate.
    """
    del x
    route = None if clean is None else clean.route
    decided = model.gate(x_adv) if isinstance(model, RoutedModel) else None
    top_1 = isinstance(decided, Route) and decided.experts.shape[1] == 1
    if not (isinstance(model, RoutedModel) and isinstance(decided, Route) and isinstance(route, Route) and top_1):
        raise InputError("surface 'held' needs a model with one top-1 gate; use 'experts'")
    free_B1 = route.experts == UNDECIDED
    experts_B1 = torch.where(free_B1, decided.experts, route.experts)
    weights_B1 = torch.where(free_B1, decided.weights, torch.ones_like(decided.weights))
    return model.routed(x_adv, Route(decided.scores, experts_B1, weights_B1))


@SURFACES.register("router")
def router(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x, soft(gate(x'))): the experts see the clean image, only the route is attacked (RA-R).

    The weights are softened: a hard route would have no gradient.
    """
    if not isinstance(model, RoutedModel):
        return whole(model, x_adv, x, clean)
    return model.routed(x, dense(model.gate(x_adv)))


@SURFACES.register("dense")
def dense_surrogate(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x', dense(gate(x'))): all experts under softmax weights, a smooth stand-in (the "smooth attack").

    The same as "dense-t1".
    """
    return softened(1.0)(model, x_adv, x, clean)


@SURFACES.register_temperatures("dense")
def softened(temperature: float) -> Surface:
    """routed(x', dense(gate(x'), T)), weights softmax(scores / T): the lower T, the nearer to the hard choice.

    Of a Synergy-of-Experts, whose sub-models answer each with how sure it is, log sum_i s_i p_i with s = softmax(log R
    / T): averages of logits would let one sub-model outshout the others.
    """

    def surface(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
        if isinstance(model, SynergyOfExperts):
            return _soft_selection(model, x_adv, temperature)
        if not isinstance(model, RoutedModel):
            return whole(model, x_adv, x, clean)
        return model.routed(x_adv, dense(model.gate(x_adv), temperature))

    return surface


def _soft_selection(model: SynergyOfExperts, x_adv: Tensor, temperature: float) -> Routed:
    logits_BMC, confidence_BM = model.submodels(x_adv)
    route = dense(model.decide(logits_BMC, confidence_BM), temperature)
    assert isinstance(route, Route)
    log_s_BM = (route.scores / temperature).log_softmax(-1)
    return Routed((log_s_BM[..., None] + logits_BMC.log_softmax(-1)).logsumexp(1), route)


@SURFACES.register_family("expert")
def expert(number: int) -> Surface:
    """routed(x', only(j)): expert j answers, wherever the image is sent; the scores at x' come along in the route.

    A gate with fewer experts, in one half of a dual model say, decides for itself. Gates that have an expert j are all
    forced to it: combinations of different numbers are not tried. Raises InputError if no gate has one.
    """

    def surface(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
        if not isinstance(model, RoutedModel):
            return whole(model, x_adv, x, clean)
        return model.routed(x_adv, _forced(model.gate(x_adv), number))

    return surface


def _forced(tree: RouteTree, number: int) -> RouteTree:
    most = max(leaf.num_experts for leaf in leaves(tree))
    if number >= most:
        raise InputError(f"surface 'expert-{number}' needs an expert {number}, the model's last is {most - 1}")
    return map_route(lambda leaf: only(leaf, number) if number < leaf.num_experts else leaf, tree)


def _dual(model: Model, name: str) -> DualModel:
    if not isinstance(model, DualModel):
        kind = getattr(model, "__qualname__", type(model).__qualname__)
        raise InputError(f"surface {name!r} is for a DualModel, and {kind} has no halves; use 'whole'")
    return model


@SURFACES.register("standard")
def standard(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """The standard half of a dual model alone, its own logits (RA-SMoE). Raises InputError for another model."""
    del x, clean
    return _dual(model, "standard").standard.routed(x_adv)


@SURFACES.register("robust")
def robust(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """The robust half of a dual model alone, its own logits (RA-RMoE). Raises InputError for another model."""
    del x, clean
    return _dual(model, "robust").robust.routed(x_adv)


@SURFACES.register("halves")
def halves(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """Both halves of a dual model, each by itself: logits (B, 2C), the standard half's before the robust half's.

    Only the objectives "joint-L" read them. Raises InputError for another model.
    """
    del x, clean
    dual = _dual(model, "halves")
    parts = dual.standard.routed(x_adv), dual.robust.routed(x_adv)
    return Routed(torch.cat([part.logits for part in parts], -1), None)


@SURFACES.register("mixing")
def mixing(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """The whole of an `AdaptiveSmoothing` and, in one more column, its mixing network's gamma: logits (B, C + 1).

    Only the objective "mislead" reads them. Raises InputError for another model.
    """
    del x, clean
    if not isinstance(model, AdaptiveSmoothing):
        kind = getattr(model, "__qualname__", type(model).__qualname__)
        raise InputError(f"surface 'mixing' is for an AdaptiveSmoothing, and {kind} has no mixing network; use 'whole'")
    logits, gamma, route = model.smoothed(x_adv)
    return Routed(torch.cat([logits, gamma[:, None]], -1), route)
