"""The layer-level mixture: one network, some of whose layers are computed by the expert that a router selects."""

# B batch, E experts, S sites

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from phalanx.routing.assignment import Assignment, inverse
from phalanx.routing.gates import StraightThrough, check_temperature, gate
from phalanx.routing.route import Route, Routed, RouteTree


class FeatureRouter(nn.Sequential):
    """A decision within a network: global average pooling and one linear layer; (B, channels, H, W) -> (B, E)."""

    def __init__(self, channels: int, num_experts: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_experts))


class LayerMixture(nn.Module):
    """A network with routed layers, its decision or decisions made by `routers`.

    With one router on the image all routed layers follow one decision, and the network is E narrow networks that share
    their other layers (AdvMoE's released code). With several, each reads the features that arrive at its site, and a
    route is a tuple of S leaves (as the paper draws it).

    Args:
        network: (images (B, C, H, W) in [0, 1], plan) to logits (B, C); its layers are made by `RoutedLayers`.
        routers: one module on images for a shared decision, or a sequence of them on the features of each site; None
            for one expert, which needs no decision.
        num_experts: E, of every routed layer.
        top_k: how many experts answer; "all" is the soft gate.
        temperature: divides the scores inside the softmax.
        train_router: False declares the routers frozen.
        straight_through: what a top-1 gate's gradient follows: the selected expert's probability, or its score alone
            as in AdvMoE's code.

    Raises ValueError where these do not fit together.
    """

    def __init__(
        self,
        network: nn.Module,
        routers: nn.Module | Sequence[nn.Module] | None,
        num_experts: int,
        top_k: int | Literal["all"] = 1,
        *,
        temperature: float = 1.0,
        train_router: bool = True,
        straight_through: StraightThrough = "probability",
    ) -> None:
        super().__init__()
        if (routers is None) != (num_experts == 1):
            raise ValueError(f"routers must be given for several experts and only then, got {num_experts} experts")
        check_temperature(temperature)
        selected = num_experts if top_k == "all" else top_k
        if not 1 <= selected <= num_experts:
            raise ValueError(
                f"top_k must be in 1..num_experts={num_experts} or 'all', got {top_k}; lower top_k or add experts"
            )
        self.network = network
        self.shared = routers is None or isinstance(routers, nn.Module)
        self.router = routers if isinstance(routers, nn.Module) or routers is None else nn.ModuleList(routers)
        self.num_experts = num_experts
        self.top_k = selected
        self.temperature = temperature
        self.train_router = train_router
        self.straight_through: StraightThrough = straight_through

    def extra_repr(self) -> str:
        """What the parts do not show; also tells two mixtures of the same weights apart in a ledger."""
        return f"top_k={self.top_k}, temperature={self.temperature}, straight_through={self.straight_through}"

    def decide(self, site: int, x: Tensor) -> Route:
        """The route of images, or of the features at a site.

        Raises ValueError unless the router answers with one score for each expert.
        """
        if self.router is None:
            scores = x.new_zeros(len(x), 1)
        else:
            scores = (self.router if self.shared else self.router[site])(x)  # type: ignore[index]
        if scores.shape != (len(x), self.num_experts):
            raise ValueError(
                f"router must answer with scores ({len(x)}, {self.num_experts}), one for each expert, "
                f"got shape {tuple(scores.shape)}; build it with num_experts={self.num_experts}"
            )
        return gate(scores, self.top_k, self.temperature, straight_through=self.straight_through)

    def gate(self, x: Tensor) -> RouteTree:
        """The route of images (B, C, H, W): the router's cost for one shared decision, a whole pass for several."""
        return self.decide(0, x) if self.shared else self._at_sites(x, None).route  # type: ignore[return-value]

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Logits (B, C) under `route`, or under the gates' own decisions; and the route used."""
        if not self.shared:
            return self._at_sites(x, route)
        if route is None:
            route = self.gate(x)
        if not isinstance(route, Route):
            raise TypeError(f"a mixture with one shared router takes one Route, got {type(route).__name__}")
        return Routed(self._following(x, Assignment.of(route)), route)

    def _following(self, x: Tensor, assignment: Assignment) -> Tensor:
        sorting = assignment.sort()
        if sorting is None:
            logits: Tensor = self.network(x, _Shared(assignment))
            return logits
        order_B, ordered = sorting
        x = x.index_select(0, order_B)
        if any(layer.training for layer in self.network.modules()):
            # BatchNorm's statistics are those of all images together
            logits = self.network(x, _Shared(ordered))
        else:
            logits = torch.cat([self.network(x[rows], _Shared(alone)) for rows, alone in ordered.by_expert()])
        return logits.index_select(0, inverse(order_B))

    def _at_sites(self, x: Tensor, route: RouteTree | None) -> Routed:
        if route is not None and (isinstance(route, Route) or len(route) != len(self.router)):  # type: ignore[arg-type]
            got = "one Route" if isinstance(route, Route) else f"{len(route)} of them"
            raise TypeError(f"this mixture takes a tuple of {len(self.router)} Routes, got {got}")  # type: ignore[arg-type]
        plan = _Sites(self, route)
        logits = self.network(x, plan)
        return Routed(logits, plan.routes())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W) in [0, 1]."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Who can move: "experts", which is the network with all that its experts share, and "router" unless it is
        frozen or there is none."""
        players = {"experts": list(self.network.parameters())}
        if self.router is not None and self.train_router:
            players["router"] = list(self.router.parameters())
        return players


class _Shared:
    """Every layer follows one decision."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def at(self, site: int, x: Tensor) -> Assignment:
        del site, x
        return self.assignment


class _Sites:
    """Every site follows its own, made when its first layer asks, or given."""

    def __init__(self, mixture: LayerMixture, given: RouteTree | None) -> None:
        self.mixture = mixture
        self.given = given
        self.made: dict[int, Assignment] = {}

    def at(self, site: int, x: Tensor) -> Assignment:
        if site not in self.made:
            route = self.mixture.decide(site, x) if self.given is None else self.given[site]  # type: ignore[index]
            assert isinstance(route, Route)
            self.made[site] = Assignment.of(route)
        return self.made[site]

    def routes(self) -> tuple[Route, ...]:
        return tuple(self.made[site].route for site in sorted(self.made))
