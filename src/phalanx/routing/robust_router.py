"""A router that an attacker can rarely turn: linear on the pixels, fitted before training, then frozen."""

# B batch, D pixels, E experts, P functions: E scores, or the E - 1 splits of a tree

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phalanx.nn import record
from phalanx.routing.reach import Regions, in_chunks, regions_of_scores, rounding_error
from phalanx.threat import Norm, ThreatModel

Layout = Literal["flat", "tree"]
"""E scores of which the largest wins, or a binary tree of splits."""
LAYOUTS: tuple[Layout, ...] = ("flat", "tree")

_BATCH = 1024

CENTRE = 0.5
"""What is subtracted from every pixel, so that weights and offset are nearly independent."""


@dataclass(frozen=True)
class Quality:
    """What a router makes of the images it is fitted on."""

    load: tuple[float, ...]
    """Share of the images in each cell."""
    reach: float
    """Mean number of experts that an attacker can send an image to."""
    unflippable: float
    """Share of the images with one reachable expert."""

    @property
    def objective(self) -> float:
        """Entropy of the load, 1 for an even one, less what is reachable beyond the one expert that answers."""
        entropy = -sum(share * math.log(share) for share in self.load if share > 0)
        return entropy / math.log(len(self.load)) - (self.reach - 1)


class RobustRouter(nn.Module):
    """Linear functions of x - 1/2: (B, C, H, W) in [0, 1] to scores (B, E), and the experts reachable from x.

    "flat": E linear scores. "tree": E - 1 linear splits, each sending an image to one side of its sign; the score of an
    expert is the smallest of the signed splits on its path, so that the largest score is that of the leaf an image
    falls into. `fit_robust_router` makes the weights; they never train. Scores are computed in the weights' own
    precision, under autocast too, since a proof about them must hold for what is deployed.

    Args:
        shape: (C, H, W) of the images.
        num_experts: E, at least 2.
        layout: "flat" or "tree".
        sides: of a tree, for each split the expert indices on its positive and on its negative side.
        norm, eps: the threat that it is fitted for.
        fitted: what the fit measured, recorded with the run.

    Raises ValueError where these do not fit together.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_experts: int,
        *,
        layout: Layout = "flat",
        sides: Sequence[Sequence[Sequence[int]]] = (),
        norm: Norm = "Linf",
        eps: float | str = "8/255",
        fitted: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {num_experts}: one expert needs no router")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if len(sides) != (num_experts - 1 if layout == "tree" else 0):
            raise ValueError(
                f"sides must hold {num_experts - 1} splits for a tree and none otherwise, got {len(sides)}"
            )
        self.shape, self.num_experts, self.layout = tuple(shape), num_experts, layout
        self.threat = ThreatModel(norm, eps)
        self.fitted = dict(fitted or {})
        channels, height, width = shape
        functions = num_experts if layout == "flat" else num_experts - 1
        self.linear = nn.Linear(channels * height * width, functions).requires_grad_(False)
        self._signs = _signs(sides, num_experts)
        record(
            self,
            "router.robust",
            shape=list(shape),
            num_experts=num_experts,
            layout=layout,
            sides=[[list(side) for side in split] for split in sides],
            norm=norm,
            eps=eps,
            fitted=self.fitted,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, layout={self.layout}, fitted for {self.threat}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, E)."""
        with torch.autocast(x.device.type, enabled=False):
            values_BP: Tensor = self.linear(x.flatten(1).to(self.linear.weight.dtype) - CENTRE)
            if self.layout == "flat":
                return values_BP
            signs = self._signs.to(values_BP)
            signed_BPE = (values_BP[:, :, None] * signs).masked_fill(signs == 0, float("inf"))
            return signed_BPE.amin(1)

    @property
    def regions(self) -> Regions:
        """Where each expert answers."""
        weights, bias = self.linear.weight.detach(), self.linear.bias.detach()
        offsets = bias - CENTRE * weights.sum(1)
        if self.layout == "flat":
            return regions_of_scores(weights, offsets)
        return Regions(weights, offsets, self._signs.to(weights.device), 2 * rounding_error(weights, offsets))

    def reachable(self, x: Tensor, threat: ThreatModel) -> Tensor:
        """(B, E) bool: the experts that can answer somewhere within `threat` of images (B, C, H, W) in [0, 1]; one that
        is not among them cannot (see `phalanx.routing.reach`)."""
        with torch.no_grad():
            answering = self(x).argmax(1)
        return in_chunks(self.regions, x, threat, answering)


def _signs(sides: Sequence[Sequence[Sequence[int]]], num_experts: int) -> Tensor:
    """(E - 1, E) int8: on which side of each split an expert lies, 0 on none."""
    signs = torch.zeros(len(sides), num_experts, dtype=torch.int8)
    for split, (positive, negative) in enumerate(sides):
        signs[split, list(positive)], signs[split, list(negative)] = 1, -1
    return signs


@torch.no_grad()
def measured(router: RobustRouter, images: Tensor, threat: ThreatModel) -> Quality:
    """Balance and reach of `router` on images (N, C, H, W) in [0, 1]."""
    experts_N = torch.cat([router(part).argmax(1) for part in torch.split(images, _BATCH)])
    return quality_of(experts_N, router.reachable(images, threat))


def quality_of(cells_N: Tensor, reach_NE: Tensor) -> Quality:
    """Of the experts that answer (N,) and those that are reachable (N, E)."""
    sizes = torch.bincount(cells_N, minlength=reach_NE.shape[1])
    count_N = reach_NE.sum(1).double()
    load = tuple((sizes.double() / len(cells_N)).tolist())
    return Quality(load, float(count_N.mean()), float((count_N == 1).double().mean()))
