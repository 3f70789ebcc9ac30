"""Fit a robust router to the training images and the threat, before training."""

# N images, D pixels

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from phalanx.errors import InputError
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing.feature_maps import Features, feature_map
from phalanx.routing.margin_fit import MarginClustering
from phalanx.routing.robust_router import CENTRE, LAYOUTS, Layout, RobustRouter, measured
from phalanx.threat import ThreatModel

FLOOR = 0.5
"""The smallest share of the images that a region may hold, in units of 1 / E."""
MOST_IMAGES = 50_000
"""More training images are not looked at."""
SAFE = 0.02
"""A router is refused where less than this share of the training images has a route that cannot be flipped."""


def fit_robust_router(
    images: Tensor,
    num_experts: int,
    threat: ThreatModel,
    *,
    features: Features = "pixels",
    layout: Layout = "tree",
    attempts: int = 12,
    seed: int = 0,
) -> RobustRouter:
    """A router of `num_experts` regions that few images can leave within `threat`: see `phalanx.routing.margin_fit`.

    Args:
        images: (N, C, H, W) float training images in [0, 1], on the CPU; `fit_rows` says which where there are many.
        features: what scores are linear in: all "pixels", the "low_pass" part of the image's cosine transform, or the
            means of "pooled" blocks. All are linear in the pixels, so the proof is as exact for each.
        layout: "flat", all regions at once, or "tree", one split after the other, which can hold where one is easy.
        attempts: clusterings to begin with; the best router by `Quality.objective` is kept.
        seed: of everything drawn.

    Raises InputError for fewer than two experts and, before anything is trained, where no attempt keeps every region
    above half of its even share, or where hardly any route is safe from a flip.
    """
    if layout not in LAYOUTS:
        raise InputError(f"router.layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if features not in get_args(Features):
        raise InputError(f"router.features must be one of {', '.join(get_args(Features))}, got {features!r}")
    if num_experts < 2:
        raise InputError(f"num_experts must be at least 2, got {num_experts}; a single network has nothing to route")
    x_ND = images.detach().float().flatten(1)
    floor = FLOOR / num_experts if layout == "flat" else FLOOR ** (1 / math.ceil(math.log2(num_experts))) / 2
    task = MarginClustering(threat, feature_map(features, images.shape[1:]), attempts, num_experts, floor)
    router = RobustRouter(
        images.shape[1:],
        num_experts,
        layout=layout,
        sides=_sides(range(num_experts)) if layout == "tree" else (),
        norm=threat.norm,
        eps=threat.eps,
    )
    if layout == "flat":
        scores = task.best(x_ND, num_experts, derive_seed(seed, "router"))
        weights, bias = scores.weights, scores.bias
    else:
        splits = list(_tree(task, x_ND, num_experts, derive_seed(seed, "router")))
        weights, bias = (torch.stack(part) for part in zip(*splits, strict=True))
    router.linear.weight.copy_(weights)
    router.linear.bias.copy_(bias)
    quality = measured(router, x_ND.reshape(-1, *images.shape[1:]), threat)
    if quality.unflippable < SAFE:
        raise InputError(
            f"model.router: at eps {threat.eps} ({threat.norm}) an attacker reaches {quality.reach:.2f} of "
            f"{num_experts} experts on average and only {quality.unflippable:.1%} of the routes are safe; "
            "lower threat.eps, or set model.experts=1, a single network, which has no route to attack"
        )
    # recorded with the run
    router.fitted |= {
        "features": features,
        "attempts": attempts,
        "seed": seed,
        "images": len(x_ND),
        "load": [round(share, 4) for share in quality.load],
        "reach": round(quality.reach, 4),
        "unflippable": round(quality.unflippable, 4),
    }
    return router


def fit_rows(total: int, seed: int) -> Tensor:
    """(N,) int64 the images, of so many, that a router is fitted to: all of them, or 50,000 drawn."""
    if total <= MOST_IMAGES:
        return torch.arange(total)
    order_N = SampleRng.for_batch(total, derive_seed(seed, "router.images")).uniform("order").argsort()
    return order_N[:MOST_IMAGES].sort().values


def _sides(experts: range) -> list[tuple[list[int], list[int]]]:
    """The splits of a tree over `experts`, a split before those below it; the larger half on the positive side."""
    if len(experts) < 2:
        return []
    middle = -(-len(experts) // 2)
    larger, smaller = experts[:middle], experts[middle:]
    return [(list(larger), list(smaller)), *_sides(larger), *_sides(smaller)]


def _tree(task: MarginClustering, x_ND: Tensor, leaves: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The splits (D,), () as `_sides` orders them: positive for the cell that holds more images."""
    if leaves < 2:
        return
    scores = task.best(x_ND, 2, seed)
    weights, bias = scores.weights[0] - scores.weights[1], scores.bias[0] - scores.bias[1]
    positive_N = (x_ND - CENTRE) @ weights + bias >= 0
    if 2 * int(positive_N.sum()) < len(x_ND):
        weights, bias, positive_N = -weights, -bias, ~positive_N
    yield weights, bias
    larger = -(-leaves // 2)
    yield from _tree(task, x_ND[positive_N], larger, derive_seed(seed, "larger"))
    yield from _tree(task, x_ND[~positive_N], leaves - larger, derive_seed(seed, "smaller"))
