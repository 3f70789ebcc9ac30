"""The model-level mixture: a router on the image, whole networks as experts."""

# B batch, E experts, K selected, C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.dispatch import dispatch
from phalanx.routing.gates import check_temperature, gate
from phalanx.routing.route import Route, Routed, RouteTree


class MixtureOfExperts(nn.Module):
    """`top_k` of the experts answer for each image, weighted by the gate.

    Args:
        router: images (B, C, H, W) in [0, 1] to scores (B, E); None for a mixture of one, which is its expert.
        experts: E networks, images to logits (B, C).
        top_k: how many experts answer; "all" is the soft gate.
        temperature: divides the scores inside the softmax.
        train_router: False declares the router frozen (the released dual-model code's untrained random router): it is
            then no player, and no method moves it.
        train_experts: False declares the experts frozen likewise, and they want no gradient. They stay in evaluation
            mode while the router trains, so that BatchNorm keeps its statistics.
        checkpoint: in training, run each expert again in the backward pass instead of keeping its activations: memory
            for one expert's activations and not for all, the same gradients, about a third more time in the update.
            Attacks, being in evaluation mode, go on keeping theirs, for nearly all the time is theirs too; what they
            keep is then the peak.

    Raises ValueError where these do not fit together.
    """

    def __init__(
        self,
        router: nn.Module | None,
        experts: Sequence[nn.Module],
        top_k: int | str = 1,
        *,
        temperature: float = 1.0,
        train_router: bool = True,
        train_experts: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts must hold at least one network, got none")
        if len({id(expert) for expert in experts}) < len(experts):
            raise ValueError(
                f"experts must be {len(experts)} different networks, got one of them twice; build each anew"
            )
        if router is None and len(experts) > 1:
            raise ValueError(f"router must be given for {len(experts)} experts, got None")
        check_temperature(temperature)
        selected = len(experts) if top_k == "all" else top_k
        if not isinstance(selected, int) or not 1 <= selected <= len(experts):
            raise ValueError(
                f"top_k must be in 1..num_experts={len(experts)} or 'all', got {top_k}; lower top_k or add experts"
            )
        # a mixture of one has nothing to route: a router would be dead weight without gradient
        self.router = router if len(experts) > 1 else None
        if not train_experts and (self.router is None or not train_router):
            raise ValueError(
                "train_experts=False needs a router that trains, got "
                f"{'none' if self.router is None else 'train_router=False'}; leave one of them to move"
            )
        self.experts = nn.ModuleList(experts)
        self.top_k = selected
        self.temperature = temperature
        self.train_router = train_router
        self.train_experts = train_experts
        self.checkpoint = checkpoint
        if not train_experts:
            self.experts.eval().requires_grad_(False)
        parts = [spec_of(part) for part in ([self.router] if self.router is not None else []) + [*experts]]
        if all(part is not None for part in parts):
            specs = [part.to_json() for part in parts if part is not None]
            # only where they differ from the default: the spec of a mixture without them stays what it was
            options = {} if train_experts else {"train_experts": False}
            options |= {"checkpoint": True} if checkpoint else {}
            record(
                self,
                "mixture",
                router=specs.pop(0) if self.router is not None else None,
                experts=specs,
                top_k=self.top_k,
                temperature=temperature,
                train_router=train_router,
                **options,
            )

    def extra_repr(self) -> str:
        """What the parts do not show; also tells two mixtures of the same weights apart in a ledger."""
        return f"top_k={self.top_k}, temperature={self.temperature}"

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; frozen experts stay in evaluation mode."""
        super().train(mode)
        if not self.train_experts:
            self.experts.eval()
        return self

    def gate(self, x: Tensor) -> Route:
        """The route of images (B, C, H, W), without running an expert.

        Raises ValueError unless the router answers with one score for each expert.
        """
        scores = x.new_zeros(len(x), 1) if self.router is None else self.router(x)
        if scores.shape != (len(x), len(self.experts)):
            raise ValueError(
                f"router must answer with scores ({len(x)}, {len(self.experts)}), one for each expert, "
                f"got shape {tuple(scores.shape)}; build it with num_experts={len(self.experts)}"
            )
        return gate(scores, self.top_k, self.temperature)

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Logits (B, C) under `route`, or under the gate's own decision; and the route used."""
        if route is None:
            route = self.gate(x)
        if not isinstance(route, Route):
            raise TypeError(f"a model-level mixture takes one Route, got {type(route).__name__}")
        return Routed(dispatch(tuple(self.experts), x, route, checkpoint=self.checkpoint), route)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W) in [0, 1]."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Who can move: "experts" unless they are frozen, and "router" unless it is or there is none; of an expert that
        is partly frozen, the parameters that want a gradient."""
        experts = [parameter for parameter in self.experts.parameters() if parameter.requires_grad]
        players = {"experts": experts} if self.train_experts else {}
        if self.router is not None and self.train_router:
            players["router"] = list(self.router.parameters())
        return players
