"""Routers, gates, dispatch and the mixtures made of them."""

from phalanx.routing.dual import DualModel, DualRoute
from phalanx.routing.gates import gate
from phalanx.routing.moe import MixtureOfExperts
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
from phalanx.routing.routers import ROUTERS, CNNRouter, LinearRouter, MLPRouter, build_router
from phalanx.routing.stats import gate_entropy, load_balance, load_per_expert

__all__ = [
    "ROUTERS",
    "CNNRouter",
    "DualModel",
    "DualRoute",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfExperts",
    "Route",
    "RouteTree",
    "Routed",
    "RoutedModel",
    "build_router",
    "dense",
    "flipped",
    "gate",
    "gate_entropy",
    "leaves",
    "load_balance",
    "load_per_expert",
    "map_route",
    "only",
    "pin",
    "routed",
    "select",
]
