"""The surfaces of a dual model: its halves, and smooth stand-ins for their mixture. Another model has none of them."""

# B batch, C classes

from __future__ import annotations

import math

import torch
from torch import Tensor

from phalanx.attacks.surfaces import SURFACES, Model, Surface
from phalanx.errors import InputError
from phalanx.routing import AdaptiveSmoothing, DualModel, Routed


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


@SURFACES.register("geometric")
def geometric(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """A dual model's logits mixed, (1 - alpha) z_S + alpha z_R, whatever the model mixes: neither half can hide its
    gradient behind the other's confidence. alpha is the least weight of R. Raises InputError for another model."""
    del x, clean
    dual = _dual(model, "geometric")
    standard, robust = (half.routed(x_adv).logits for half in (dual.standard, dual.robust))
    return Routed((1 - dual.alpha) * standard + dual.alpha * robust, None)


@SURFACES.register_temperatures("softened")
def softened_standard(temperature: float) -> Surface:
    """log[(1 - alpha) softmax(z_S / T) + alpha softmax(z_R)] of a dual model, alpha the least weight of R: a standard
    half that is sure has no gradient in the mixture, a softened one has. Raises InputError for another model."""

    def surface(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
        del x, clean
        dual = _dual(model, f"softened-t{temperature:g}")
        parts = [
            math.log(weight) + (half.routed(x_adv).logits / divisor).log_softmax(-1)
            for half, weight, divisor in ((dual.standard, 1 - dual.alpha, temperature), (dual.robust, dual.alpha, 1.0))
            if weight > 0
        ]
        return Routed(torch.stack(parts).logsumexp(0), None)

    return surface


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
