"""The model that a view makes of its runs' models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from phalanx.attacks import RouteSteering
from phalanx.config import AnyView, DualView, EnsembleView, GateView, NutsView, RunConfig
from phalanx.data import Splits
from phalanx.evaluation import pick_alpha, pick_nuts
from phalanx.routing import DualModel, Ensemble, MixedNUTS, MixtureOfExperts, with_gate

PICKING = RouteSteering(steps=50)
"""What searches the robust half's smallest margins when alpha is picked."""


def viewed(
    view: AnyView, parts: Sequence[MixtureOfExperts], data: Splits, settings: RunConfig
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a view makes of its runs' models, and what there is to say of it."""
    match view:
        case DualView():
            alpha, picked = _alpha(view, parts[1], data, settings)
            seen: dict[str, Any] = {"alpha": alpha, "mix": view.mix, "picked": picked}
            return DualModel(parts[0], parts[1], alpha, mix=view.mix), seen
        case NutsView():
            choice = pick_nuts(parts[1], data.val, PICKING.within(settings.threat), keep=view.keep, seed=settings.seed)
            found = {"alpha": choice.alpha, "scale": choice.scale, "power": choice.power, "bias": choice.bias}
            return MixedNUTS(parts[0], parts[1], **found), {
                **found,
                "picked": {**_picked(view.keep, choice.quantile, choice.held), "out_of_reach": choice.out_of_reach},
            }
        case EnsembleView():
            return Ensemble(parts, mix=view.mix), {"mix": view.mix}
        case GateView():
            return with_gate(parts[0], view.gate, seed=settings.seed), {"gate": view.gate}


def _alpha(view: DualView, robust: nn.Module, data: Splits, settings: RunConfig) -> tuple[float, dict[str, Any] | None]:
    """The weight of the robust half, and what it was picked on."""
    if view.alpha != "picked":
        return view.alpha, None
    choice = pick_alpha(robust, data.val, PICKING.within(settings.threat), keep=view.keep, seed=settings.seed)
    return choice.alpha, _picked(view.keep, choice.quantile, choice.n)


def _picked(keep: float, quantile: float, n: int) -> dict[str, Any]:
    attack = f"{PICKING.name}, {PICKING.steps} steps"
    return {"keep": keep, "quantile": quantile, "n": n, "attack": attack, "images": "validation"}
