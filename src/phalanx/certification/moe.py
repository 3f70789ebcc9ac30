"""Lower bounds of a model-level mixture's margins: a soft, top-1 or top-n gate over networks that have been read."""

# N samples, E experts, C classes, P conditions

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phalanx.bounds import Ball, Planes, dual_norm
from phalanx.certification.gates import entry_radii, quotient, soft_low, surely_ahead, top1_low, topn_low
from phalanx.certification.joint import Joint
from phalanx.certification.networks import Answers, Bounds, Method, Network
from phalanx.certification.reach import Reachable, earliest, exact_entries
from phalanx.routing import Regions
from phalanx.threat import Norm

_TOGETHER = 2**24
"""Numbers that linear bounds of all experts may take: memory does not grow with the samples."""


class Low(NamedTuple):
    """Within a ball around each sample."""

    margins: Tensor
    """(N, C): lower bounds of F^y - F^k, infinite at k = y. All positive: certified."""
    through: Tensor
    """(N, C) int64: the part of the model that is to blame for each, by its place in `names`."""


class Certifiable(Protocol):
    """What a certificate can be searched for."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parts."""
        ...

    @property
    def classes(self) -> int:
        """C."""
        ...

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """That it is made of."""
        ...

    def see(self, x: Tensor) -> Seen:
        """All that is needed of images (N, C, H, W), float64 in [0, 1]."""
        ...

    def low(self, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Low:
        """Bounds within `radius` (N,) of each image."""
        ...


class Seen(Protocol):
    """Clean images and what the networks answered."""

    def select(self, index: Tensor) -> Seen:
        """Of some of the samples, by position or mask."""
        ...


@dataclass(frozen=True, eq=False)
class _MixtureSeen:
    x: Tensor
    answers: tuple[Answers, ...]
    scores: Answers
    entries: Tensor

    def select(self, index: Tensor) -> _MixtureSeen:
        answers = tuple(Answers(each.values[index], each.slack[index]) for each in self.answers)
        scores = Answers(self.scores.values[index], self.scores.slack[index])
        return _MixtureSeen(self.x[index], answers, scores, self.entries[index])


@dataclass(frozen=True, eq=False)
class Cells:
    """A router known by its regions alone: a tree of linear splits."""

    regions: Regions
    norm: Norm

    def entries(self, x: Tensor) -> Tensor:
        """(N, E): below this radius an expert cannot answer."""
        values_NP = x.flatten(1) @ self.regions.directions.double().T + self.regions.offsets.double()
        signed_NPE = values_NP[:, :, None] * self.regions.signs.double() + self.regions.rounding.double()[:, None]
        missing_NPE = (-signed_NPE).masked_fill(self.regions.signs == 0, 0)
        return quotient(missing_NPE, dual_norm(self.regions.directions.double(), self.norm)[:, None]).amax(1)

    def exact_entries(self, x: Tensor) -> Tensor:
        """The same, all conditions of an expert together."""
        directions, signs = self.regions.directions.double(), self.regions.signs.double()
        values_NP = x.flatten(1) @ directions.T + self.regions.offsets.double()
        found = []
        for expert in range(signs.shape[1]):
            own = signs[:, expert].nonzero()[:, 0]
            sign = signs[own, expert]
            missing_NJ = -(values_NP[:, own] * sign + self.regions.rounding.double()[own])
            found.append(earliest(missing_NJ, directions[own] * sign[:, None], self.norm))
        return torch.stack(found, 1)


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture whose networks have been read."""

    experts: tuple[Network, ...]
    router: Network | Cells | None
    """None where all scores are 0."""
    top_k: int
    temperature: float
    reachable: Reachable = "pairwise"

    @property
    def norm(self) -> Norm:
        """That distances are measured in."""
        return self.experts[0].norm

    @property
    def names(self) -> tuple[str, ...]:
        """See `Certifiable`."""
        return tuple(expert.name or "the network" for expert in self.experts)

    @property
    def classes(self) -> int:
        """See `Certifiable`."""
        return len(self.experts[0].lipschitz)

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """See `Certifiable`."""
        return (self,)

    @property
    def networks(self) -> tuple[Network, ...]:
        """Experts, and the router where it is one."""
        return (*self.experts, self.router) if isinstance(self.router, Network) else self.experts

    @cached_property
    def _lipschitz(self) -> Tensor:
        experts = len(self.experts)
        if isinstance(self.router, Network):
            return self.router.lipschitz
        return torch.zeros(experts, experts, dtype=torch.float64)

    def see(self, x: Tensor) -> _MixtureSeen:
        """See `Certifiable`."""
        if isinstance(self.router, Network):
            scores = self.router.answers(x)
        else:
            scores = Answers(x.new_zeros(len(x), len(self.experts)), x.new_zeros(len(x)))
        entries = self._entries(x, scores)
        return _MixtureSeen(x, tuple(expert.answers(x) for expert in self.experts), scores, entries)

    def _entries(self, x: Tensor, scores: Answers) -> Tensor:
        if isinstance(self.router, Cells):
            return self.router.exact_entries(x) if self.reachable == "exact" else self.router.entries(x)
        pairwise = entry_radii(scores.values, self._lipschitz.to(x), scores.slack)
        if self.reachable == "pairwise" or self.router is None or self.router.linear is None:
            return pairwise
        return torch.maximum(pairwise, exact_entries(scores.values, self.router.linear, scores.slack, self.norm))

    def low(self, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Low:
        """See `Certifiable`."""
        assert isinstance(seen, _MixtureSeen)
        together = max(1, _TOGETHER // max(1, len(self.experts) * self.classes * seen.x[:1].numel()))
        places = torch.arange(len(y), device=y.device)
        parts = [places[start : start + together] for start in range(0, max(1, len(y)), together)]
        found = [self._low(seen.select(some), y[some], radius[some], method) for some in parts]
        return Low(torch.cat([part.margins for part in found]), torch.cat([part.through for part in found]))

    def _low(self, seen: _MixtureSeen, y: Tensor, radius: Tensor, method: Method) -> Low:
        reachable_NE = self._reachable(seen, radius)
        bounds = [
            self._bounds(expert, answers, seen.x, y, radius, reachable_NE[:, index], method)
            for index, (expert, answers) in enumerate(zip(self.experts, seen.answers, strict=True))
        ]
        margins_NEC = torch.stack([each.margins for each in bounds], 1)
        planes = [each.planes for each in bounds if each.planes is not None]
        # a top-1 gate adds nothing up
        adds = self.top_k > 1 and len(planes) == len(bounds)
        summed = Joint.of(planes, Ball(seen.x, radius, self.norm)) if adds else None
        through_NC = margins_NEC.masked_fill(~reachable_NE[:, :, None], float("inf")).argmin(1)
        return Low(self._gated(seen, margins_NEC, radius, summed), through_NC)

    def _bounds(
        self,
        expert: Network,
        answers: Answers,
        x: Tensor,
        y: Tensor,
        radius: Tensor,
        reachable_N: Tensor,
        method: Method,
    ) -> Bounds:
        """Where an expert cannot answer, its bounds do not count and are not made: they are 0."""
        some = reachable_N.nonzero()[:, 0]
        if len(some) == len(x):
            return expert.bounds(answers, x, y, radius, method)
        margins_NC = torch.zeros_like(answers.values).scatter(1, y[:, None], float("inf"))
        chosen = Answers(answers.values[some], answers.slack[some])
        found = expert.bounds(chosen, x[some], y[some], radius[some], method)
        margins_NC = margins_NC.index_copy(0, some, found.margins)
        # of a top-1 gate only the margins count
        if found.planes is None or self.top_k == 1:
            return Bounds(margins_NC, None)
        slopes = margins_NC.new_zeros(*margins_NC.shape, x[:1].numel()).index_copy(0, some, found.planes.slopes)
        constants = torch.zeros_like(margins_NC).index_copy(0, some, found.planes.constants)
        return Bounds(margins_NC, Planes(slopes, constants))

    def _reachable(self, seen: _MixtureSeen, radius: Tensor) -> Tensor:
        if self.top_k == len(self.experts):
            return torch.ones_like(seen.entries, dtype=torch.bool)
        if self.top_k == 1:
            return seen.entries <= radius[:, None]
        ahead_NEE = surely_ahead(seen.scores.values, self._lipschitz.to(radius), radius, seen.scores.slack)
        return ahead_NEE.sum(1) < self.top_k

    def _gated(self, seen: _MixtureSeen, margins: Tensor, radius: Tensor, summed: Joint | None) -> Tensor:
        if self.top_k == 1:
            return top1_low(margins, seen.entries, radius)
        scores, lipschitz, slack = seen.scores.values, self._lipschitz.to(radius), seen.scores.slack
        if self.top_k == len(self.experts):
            shared = 1 / self.temperature
            return soft_low(margins, scores * shared, lipschitz * shared, radius, slack * shared, summed)
        return topn_low(margins, scores, lipschitz, radius, slack, self.top_k, self.temperature, summed)
