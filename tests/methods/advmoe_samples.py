"""Models with a router and experts to move in turn, and what an update leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD
from phalanx.data import Batch
from phalanx.experts import build_backbone
from phalanx.methods import AdvMoE, Update
from phalanx.rng import Rng
from phalanx.routing import CNNRouter, FeatureRouter, LayerMixture, RoutedLayers

RNG = Rng(5)
EPSILON = 3 / 16


def layered(routers: str = "shared", experts: int = 2, **gate: Any) -> LayerMixture:
    """A small network with routed layers for `tiny.digits()`; BatchNorm in the shared router and in the backbone."""
    torch.manual_seed(0)
    layers = RoutedLayers(experts, 0.5, routers)  # type: ignore[arg-type]
    network = build_backbone("small_cnn", layers, num_classes=10, image_size=8, channels=1, width=8)
    router: Any = None
    if experts > 1:
        within = [FeatureRouter(channels, experts) for channels in layers.sites]
        router = within or CNNRouter((1, 8, 8), experts, hidden=(4, 8))
    return LayerMixture(network, router, experts, **gate)


MODELS: dict[str, Callable[[], Any]] = {
    "layers, shared": layered,
    "layers, block": lambda: layered("block"),
    "layers, layer": lambda: layered("layer"),
    "layers, soft": lambda: layered(top_k="all"),
    "mixture": lambda: tiny.mixture(2, expert="small_cnn"),
    "mixture, soft": lambda: tiny.mixture(3, "all", expert="small_cnn"),
}


def method(steps: int = 1, **settings: Any) -> AdvMoE:
    attack = PGD(steps=steps, step_size=0.1, gaussian_start=0.001, objective="kl")
    return AdvMoE(attack=attack, **settings).within(tiny.THREAT)


def batch(size: int = 16, start: int = 0) -> Batch:
    """Digits; `start` for others."""
    x, y, ids = next(tiny.digits().train.batches(start + size))
    return Batch(x[start:], y[start:], ids[start:])


def streams(size: int = 16) -> dict[str, Batch]:
    return {"train": batch(size), "router": batch(size, start=size)}


def updates(chosen: AdvMoE, model: Any, batches: dict[str, Batch] | None = None) -> dict[str, Update]:
    """One step's, by player, before anybody has moved."""
    model.train()
    return {update.player: update for update in chosen.updates(model, batches or streams(), RNG)}


def part(model: Any, player: str) -> nn.Module:
    """The submodule that is all of a player's."""
    if player == "router":
        return model.router  # type: ignore[no-any-return]
    return model.network if isinstance(model, LayerMixture) else model.experts  # type: ignore[no-any-return]


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def passes(module: nn.Module) -> set[int]:
    """How often the BatchNorms of a module have moved their statistics."""
    return {int(tensor) for name, tensor in module.state_dict().items() if name.endswith("num_batches_tracked")}
