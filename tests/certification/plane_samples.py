"""Mixtures on images of two pixels: the whole image plane can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phalanx.routing import LinearRouter, MixtureOfExperts
from phalanx.threat import Norm

SHAPE = (1, 1, 2)
_SIDE = 81


def plane() -> Tensor:
    """(G, 1, 1, 2) float64: every point of a grid over [0, 1]^2."""
    line = torch.linspace(0, 1, _SIDE, dtype=torch.float64)
    return torch.cartesian_prod(line, line).reshape(-1, *SHAPE)


def network(classes: int, hidden: int, scale: float) -> nn.Module:
    """A linear network of two pixels, or with one hidden layer."""
    wide = [nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(2, classes)]
    for layer in wide:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale)
    return nn.Sequential(nn.Flatten(), *wide)


def mixture(seed: int, top_k: int | str, *, classes: int = 3, experts: int = 3, hidden: int = 0) -> MixtureOfExperts:
    """In float64, evaluation mode; the gate is as steep as the experts."""
    torch.manual_seed(seed)
    router = LinearRouter(SHAPE, experts, mean=(0.4,), std=(0.7,))
    nn.init.normal_(router[2].weight, std=4)  # type: ignore[arg-type]
    networks = [network(classes, hidden, 2.0) for _ in range(experts)]
    return MixtureOfExperts(router, networks, top_k, temperature=0.7).double().eval()


def flip_distance(x: Tensor, y: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """(N,): how far the nearest point of the plane with another label is."""
    order = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[norm]
    distance = (plane()[None] - x[:, None]).flatten(2).norm(p=order, dim=2)
    return distance.masked_fill(labels[None] == y[:, None], torch.inf).amin(1)


def points(seed: int, n: int = 25) -> Tensor:
    """(N, 1, 1, 2) drawn from [0, 1]^2."""
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
