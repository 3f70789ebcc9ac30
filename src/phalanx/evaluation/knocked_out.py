"""A mixture without one of its experts: the route goes to the others."""

# B batch, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from phalanx.routing import Route, Routed, RoutedModel, RouteTree, gate


class Without(nn.Module):
    """The model as if `expert` scored minus infinity: the gate chooses among the others by its own rule, with weights
    that sum to 1 again; a gate that selects all experts selects the rest. A routed model, whose scores and experts
    keep their places, so that the missing one's load is 0.

    The model must have one gate of at least 2 experts (see `cannot_go_without`).
    """

    def __init__(self, model: RoutedModel, expert: int) -> None:
        super().__init__()
        self.model = model
        self.expert = expert

    def gate(self, x: Tensor) -> Route:
        """The route of images (B, C, H, W) among the other experts."""
        decided = self.model.gate(x)
        assert isinstance(decided, Route)
        missing_E = torch.arange(decided.num_experts, device=decided.scores.device) == self.expert
        scores_BE = decided.scores.masked_fill(missing_E, float("-inf"))
        selected = min(decided.experts.shape[1], decided.num_experts - 1)
        # with one expert selected its weight is 1, whatever the temperature
        return gate(scores_BE, selected, float(getattr(self.model, "temperature", 1.0)))

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Logits (B, C) under `route`, or under the gate's decision among the others; and the route used."""
        return self.model.routed(x, self.gate(x) if route is None else route)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W) in [0, 1]."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """The model's."""
        return self.model.players()


def cannot_go_without(model: RoutedModel, route: RouteTree) -> str:
    """Why an expert of a model that decides so cannot be taken out; "" if it can."""
    if not isinstance(route, Route):
        return (
            "the model has several gates, and what a later one reads is computed by the experts that an earlier one "
            "chose: without one of them there is no route that the model would take"
        )
    if route.experts.shape[1] > 1 and not hasattr(model, "temperature"):
        return "the model does not say its gate's temperature, so what the others would weigh is not known"
    return "" if route.num_experts > 1 else "the model has one expert"
