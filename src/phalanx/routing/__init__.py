"""Routers, gates, dispatch and the mixtures made of them."""

from phalanx.routing.controls import ControlGate, with_gate
from phalanx.routing.dual import DualModel, DualRoute
from phalanx.routing.ensemble import Ensemble
from phalanx.routing.gates import gate
from phalanx.routing.hierarchical import HierarchicalRouter
from phalanx.routing.moe import MixtureOfExperts
from phalanx.routing.nuts import LogitMap, MixedNUTS, normalised
from phalanx.routing.route import (
    Route,
    Routed,
    RoutedModel,
    RouteTree,
    dense,
    flipped,
    leaves,
    map_route,
    only,
    pin,
    routed,
    select,
)
from phalanx.routing.routers import ROUTERS, CNNRouter, LinearRouter, MLPRouter, UniformRouter, build_router
from phalanx.routing.soe import SynergyOfExperts
from phalanx.routing.stats import gate_entropy, load_balance, load_per_expert

__all__ = [
    "ROUTERS",
    "CNNRouter",
    "ControlGate",
    "DualModel",
    "DualRoute",
    "Ensemble",
    "HierarchicalRouter",
    "LinearRouter",
    "LogitMap",
    "MLPRouter",
    "MixedNUTS",
    "MixtureOfExperts",
    "Route",
    "RouteTree",
    "Routed",
    "RoutedModel",
    "SynergyOfExperts",
    "UniformRouter",
    "build_router",
    "dense",
    "flipped",
    "gate",
    "gate_entropy",
    "leaves",
    "load_balance",
    "load_per_expert",
    "map_route",
    "normalised",
    "only",
    "pin",
    "routed",
    "select",
    "with_gate",
]
