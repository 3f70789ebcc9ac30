"""Independent networks averaged: what a mixture must beat, since it has the same parameters and no router."""

# B batch, C classes, M members

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast, get_args

import torch
from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.dual import Mix
from phalanx.routing.route import Routed, RoutedModel, RouteTree, require_routed


class Ensemble(nn.Module):
    """Every member answers for every image, all with the same weight.

    Args:
        members: at least two routed models for the same classes, each with parameters of its own; wrap a single
            network as `MixtureOfExperts(None, [network])`.
        mix: "probabilities" returns log((1 / M) sum_m p_m), valid logits; "logits" returns (1 / M) sum_m z_m, whose
            softmax is the normalised geometric mean of the p_m, so that one confident member can outvote the others.

    Raises TypeError for a member that is no routed model, ValueError for fewer than two, for a bad mix, for members
    that share parameters and, in a forward pass, for members that answer with different shapes.
    """

    members: Sequence[RoutedModel]

    def __init__(self, members: Sequence[nn.Module], *, mix: Mix = "probabilities") -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least 2 members, got {len(members)}; use a single model as it is")
        if mix not in get_args(Mix):
            raise ValueError(f"mix must be one of {', '.join(get_args(Mix))}, got {mix!r}")
        for number, member in enumerate(members):
            require_routed(f"member {number}", member)
        own = [{id(p) for p in member.parameters()} for member in members]
        if len(set().union(*own)) < sum(len(ids) for ids in own):
            raise ValueError("members must not share parameters, got some in two of them; train each anew")
        self.members = cast(Sequence[RoutedModel], nn.ModuleList(members))
        self._mix = mix
        specs = [spec_of(member) for member in members]
        if all(spec is not None for spec in specs):
            record(self, "ensemble", members=[spec.to_json() for spec in specs if spec is not None], mix=mix)

    @property
    def mix(self) -> Mix:
        """What is averaged."""
        return self._mix

    def extra_repr(self) -> str:
        return f"mix={self._mix!r}"

    def gate(self, x: Tensor) -> RouteTree:
        """The members' routes of images (B, C, H, W), a tuple of M."""
        return tuple(member.gate(x) for member in self.members)

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Log-probabilities (B, C), with `mix` = "logits" logits, float32 at least, under `route`, a tuple with one
        route for each member, or the gates' own decisions; and the route used.

        Raises TypeError unless `route` is such a tuple.
        """
        if route is not None and not (isinstance(route, tuple) and len(route) == len(self.members)):
            kind = f"a tuple of {len(route)}" if isinstance(route, tuple) else type(route).__name__
            raise TypeError(f"an ensemble of {len(self.members)} takes a tuple of that many routes, got {kind}")
        held = (None,) * len(self.members) if route is None else route
        answers = [member.routed(x, own) for member, own in zip(self.members, held, strict=True)]
        decided = []
        for answer in answers:
            assert answer.route is not None, "a routed model returns its route"
            decided.append(answer.route)
        return Routed(self._averaged([answer.logits for answer in answers]), tuple(decided))

    def _averaged(self, answers: list[Tensor]) -> Tensor:
        shapes = sorted({tuple(logits.shape) for logits in answers})
        if len(shapes) > 1:
            raise ValueError(
                "members must answer with logits for the same classes, got shapes " + " and ".join(map(str, shapes))
            )
        logits_MBC = torch.stack(answers)
        # in half precision rounding would swamp the smaller probabilities
        logits_MBC = logits_MBC.to(torch.promote_types(logits_MBC.dtype, torch.float32))
        if self._mix == "logits":
            return logits_MBC.mean(0)
        return logits_MBC.log_softmax(-1).logsumexp(0) - math.log(len(answers))

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, C) of images (B, C, H, W) in [0, 1]; mean logits with `mix` = "logits"."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Each member's players under its number: "member-0.experts", "member-0.router", "member-1.experts", ..."""
        numbered = enumerate(self.members)
        return {f"member-{m}.{name}": own for m, member in numbered for name, own in member.players().items()}
