"""A router of routers: first the group, then the expert within it."""

# B batch, G groups, E experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.routers import Shape, build_router


class HierarchicalRouter(nn.Module):
    """Scores log p_g(x) + log p_{j|g}(x) for expert j of group g; (B, C, H, W) in [0, 1] to (B, E), E the sum of the
    groups' sizes.

    Their softmax is the product of the two gates' probabilities, so that a soft `MixtureOfExperts` is then the
    hierarchical mixture of Jordan and Jacobs (1994). A top-k gate takes the k most probable experts of all, which need
    not lie in the most probable group. Experts count through the groups: group 0 first.

    Args:
        top: images to scores of the G groups (B, G).
        groups: a router for each group, images to scores of its experts; `UniformRouter(1)` for a group of one.

    Raises ValueError for fewer than two groups, for one router in two places and, in a forward pass, unless `top`
    answers with one score for each group.
    """

    def __init__(self, top: nn.Module, groups: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(groups) < 2:
            raise ValueError(f"groups must hold at least 2 routers, got {len(groups)}; use a single router as it is")
        if len({id(part) for part in (top, *groups)}) < len(groups) + 1:
            raise ValueError("top and groups must be different routers, got one of them twice; build each anew")
        self.top = top
        self.groups = nn.ModuleList(groups)
        specs = [spec_of(part) for part in (top, *groups)]
        if all(spec is not None for spec in specs):
            parts = [spec.to_json() for spec in specs if spec is not None]
            record(self, "router.hierarchical", top=parts[0], groups=parts[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, E): valid scores that sum to 1 in probability."""
        top_BG = self.top(x)
        if top_BG.shape != (len(x), len(self.groups)):
            raise ValueError(
                f"top must answer with scores ({len(x)}, {len(self.groups)}), one for each group, "
                f"got shape {tuple(top_BG.shape)}; build it with num_experts={len(self.groups)}"
            )
        groups_B1 = top_BG.log_softmax(-1).split(1, -1)
        parts = zip(groups_B1, self.groups, strict=True)
        return torch.cat([group_B1 + router(x).log_softmax(-1) for group_B1, router in parts], -1)


def build_hierarchical(
    inner: str, shape: Shape, num_experts: int, *, groups: int, **arguments: Any
) -> HierarchicalRouter:
    """A router of `groups` groups of equal size, `num_experts` / `groups` each, all its parts of the kind `inner` and
    with its `arguments` (see `build_router`). Raises ValueError unless every group has at least two experts."""
    if groups < 2 or num_experts % groups or num_experts < 2 * groups:
        raise ValueError(
            f"groups must be at least 2 and divide the {num_experts} experts into groups of at least 2, got {groups}"
        )
    sizes = [groups] + [num_experts // groups] * groups
    top, *parts = [build_router(inner, shape, size, **arguments) for size in sizes]
    return HierarchicalRouter(top, parts)
