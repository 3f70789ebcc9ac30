"""Routers, gates, dispatch and the mixtures made of them."""

from phalanx.routing.adaptive import AdaptiveSmoothing, Smoothed
from phalanx.routing.controls import ControlGate, with_gate
from phalanx.routing.counts import Counts, counts
from phalanx.routing.dual import DualModel, DualRoute
from phalanx.routing.ensemble import Ensemble
from phalanx.routing.fit_router import fit_robust_router, fit_rows
from phalanx.routing.gates import gate
from phalanx.routing.hierarchical import HierarchicalRouter, build_hierarchical
from phalanx.routing.moe import MixtureOfExperts
from phalanx.routing.moe_conv import ExpertNorm2d, MoEConv2d, RoutedLayers
from phalanx.routing.moe_layers import FeatureRouter, LayerMixture
from phalanx.routing.nuts import LogitMap, MixedNUTS, normalised
from phalanx.routing.reach import ProvableRouter, Regions, reachable
from phalanx.routing.resnet_router import ResNetRouter
from phalanx.routing.robust_router import RobustRouter
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
from phalanx.routing.routers import (
    ROUTERS,
    CNNRouter,
    LinearRouter,
    LipschitzRouter,
    MLPRouter,
    UniformRouter,
    build_router,
)
from phalanx.routing.soe import SynergyOfExperts
from phalanx.routing.stats import gate_entropy, load_balance, load_per_expert

__all__ = [
    "ROUTERS",
    "AdaptiveSmoothing",
    "CNNRouter",
    "ControlGate",
    "Counts",
    "DualModel",
    "DualRoute",
    "Ensemble",
    "ExpertNorm2d",
    "FeatureRouter",
    "HierarchicalRouter",
    "LayerMixture",
    "LinearRouter",
    "LipschitzRouter",
    "LogitMap",
    "MLPRouter",
    "MixedNUTS",
    "MixtureOfExperts",
    "MoEConv2d",
    "ProvableRouter",
    "Regions",
    "ResNetRouter",
    "RobustRouter",
    "Route",
    "RouteTree",
    "Routed",
    "RoutedLayers",
    "RoutedModel",
    "Smoothed",
    "SynergyOfExperts",
    "UniformRouter",
    "build_hierarchical",
    "build_router",
    "counts",
    "dense",
    "fit_robust_router",
    "fit_rows",
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
    "reachable",
    "routed",
    "select",
    "with_gate",
]
