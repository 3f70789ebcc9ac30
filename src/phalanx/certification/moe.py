"""Lower bounds of a model-level mixture's margins: a soft, top-1 or top-n gate over networks that have been read."""

# N samples, E experts, C classes, P conditions

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phalanx.bounds import dual_norm
from phalanx.certification.gates import entry_radii, quotient, soft_low, surely_ahead, top1_low, topn_low
from phalanx.certification.networks import Answers, Method, Network
from phalanx.routing import Regions
from phalanx.threat import Norm


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
    def constants(self) -> dict[str, float]:
        """The largest Lipschitz constant of a difference of two outputs, by network."""
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


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture whose networks have been read."""

    experts: tuple[Network, ...]
    router: Network | Cells | None
    """None where all scores are 0."""
    top_k: int
    temperature: float

    @property
    def names(self) -> tuple[str, ...]:
        """See `Certifiable`."""
        return tuple(expert.name or "the network" for expert in self.experts)

    @property
    def classes(self) -> int:
        """See `Certifiable`."""
        return len(self.experts[0].lipschitz)

    @property
    def constants(self) -> dict[str, float]:
        """See `Certifiable`."""
        found = {name: float(expert.lipschitz.max()) for name, expert in zip(self.names, self.experts, strict=True)}
        if isinstance(self.router, Network):
            found[self.router.name] = float(self.router.lipschitz.max())
        return found

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
        if isinstance(self.router, Cells):
            entries = self.router.entries(x)
        else:
            entries = entry_radii(scores.values, self._lipschitz.to(x), scores.slack)
        return _MixtureSeen(x, tuple(expert.answers(x) for expert in self.experts), scores, entries)

    def low(self, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Low:
        """See `Certifiable`."""
        assert isinstance(seen, _MixtureSeen)
        reachable_NE = self._reachable(seen, radius)
        margins_NEC = torch.stack(
            [
                self._margins(expert, answers, seen.x, y, radius, reachable_NE[:, index], method)
                for index, (expert, answers) in enumerate(zip(self.experts, seen.answers, strict=True))
            ],
            1,
        )
        through_NC = margins_NEC.masked_fill(~reachable_NE[:, :, None], float("inf")).argmin(1)
        return Low(self._gated(seen, margins_NEC, radius), through_NC)

    @staticmethod
    def _margins(
        expert: Network, answers: Answers, x: Tensor, y: Tensor, radius: Tensor, reachable_N: Tensor, method: Method
    ) -> Tensor:
        """Where an expert cannot answer, its bounds do not count and are not made."""
        margins_NC = torch.zeros_like(answers.values).scatter(1, y[:, None], float("inf"))
        some = reachable_N.nonzero()[:, 0]
        if len(some):
            chosen = Answers(answers.values[some], answers.slack[some])
            margins_NC[some] = expert.margins(chosen, x[some], y[some], radius[some], method)
        return margins_NC

    def _reachable(self, seen: _MixtureSeen, radius: Tensor) -> Tensor:
        if self.top_k == len(self.experts):
            return torch.ones_like(seen.entries, dtype=torch.bool)
        if self.top_k == 1:
            return seen.entries <= radius[:, None]
        ahead_NEE = surely_ahead(seen.scores.values, self._lipschitz.to(radius), radius, seen.scores.slack)
        return ahead_NEE.sum(1) < self.top_k

    def _gated(self, seen: _MixtureSeen, margins: Tensor, radius: Tensor) -> Tensor:
        if self.top_k == 1:
            return top1_low(margins, seen.entries, radius)
        scores, lipschitz, slack = seen.scores.values, self._lipschitz.to(radius), seen.scores.slack
        if self.top_k == len(self.experts):
            shared = 1 / self.temperature
            return soft_low(margins, scores * shared, lipschitz * shared, radius, slack * shared)
        return topn_low(margins, scores, lipschitz, radius, slack, self.top_k, self.temperature)
