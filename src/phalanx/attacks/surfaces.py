"""Which part of the model an attack differentiates: functions (model, attacked x', images x, clean pass) -> Routed.

Registered by name. Whatever surface found it, a perturbation is judged on the whole real model. On a model without a
route every surface of routing is the whole model. Those of a dual model's halves are in `dual_surfaces`.
"""

# B batch, C classes, E experts, K selected

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phalanx.attacks.registry import Registry
from phalanx.errors import InputError
from phalanx.routing import (
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

DEPLOYED = frozenset({"whole", "pinned", "straight-through"})
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
    with torch.no_grad():
        route = pin(model.gate(x_adv))
    return model.routed(x_adv, route)


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


@SURFACES.register("straight-through")
def straight_through(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """Forward the deployed hard route, backward routed(x', dense(gate(x'))), all experts under softmax weights.

    The straight-through estimator (Bengio et al. 2013), with the softmax in the place of the choice: the gain is the
    deployed model's, the gradient says where every expert and the gate would move it. Where an expert that was not
    chosen answers with a non-finite number, the gradient is the deployed model's own.
    """
    if not isinstance(model, RoutedModel):
        return whole(model, x_adv, x, clean)
    soft = softened(1.0)(model, x_adv, x, clean).logits
    with torch.no_grad():
        hard = model.routed(x_adv)
    # exactly 0: the value is the deployed one to the last bit
    moving = soft - soft.detach()
    finite = soft.isfinite().all(-1)
    if not bool(finite.all()):
        # asked again, apart: a non-finite number reaches the gradient even with a factor of 0
        moving = torch.zeros_like(hard.logits)
        for rows, surface in ((finite, softened(1.0)), (~finite, whole)):
            if bool(rows.any()):
                logits = surface(model, x_adv[rows], x[rows], clean).logits
                moving = moving.index_put((rows,), (logits - logits.detach()).to(moving))
    return Routed(hard.logits + moving, hard.route)


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


def named_experts(route: RouteTree, choice: Sequence[int | None]) -> RouteTree:
    """The route on which the surface "forced" reads, gate by gate in the order of `leaves`, which expert is to answer:
    none at a gate whose entry is None, which decides for itself."""
    wanted = iter(choice)

    def name(leaf: Route) -> RouteTree:
        expert = next(wanted)
        if expert is None:
            return Route(leaf.scores, leaf.experts[:, :0], leaf.weights[:, :0])
        return only(leaf, expert)

    return map_route(name, route)


@SURFACES.register("forced", clean_pass=True)
def forced(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """routed(x', r): at some of the gates a given expert answers, the others decide at x'; see `named_experts`.

    The route that comes with the logits holds the forced gates alone, with their scores at x': what steering climbs.
    Without a given route every gate keeps its choice of the clean image.
    """
    if not isinstance(model, RoutedModel) or clean is None or clean.route is None:
        return whole(model, x_adv, x, clean)
    given, steered = leaves(clean.route), []

    def force(leaf: Route) -> Route:
        wanted = next(given)
        if not wanted.experts.shape[1]:
            return leaf
        steered.append(Route(leaf.scores, wanted.experts, wanted.weights.to(leaf.weights)))
        return steered[-1]

    logits = model.routed(x_adv, map_route(force, model.gate(x_adv))).logits
    return Routed(logits, tuple(steered))
