"""One network of a mixture, an expert or a router, with what is known of how far its outputs move."""

# N samples, C outputs

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from phalanx.bounds import (
    Ball,
    Blocks,
    Dense,
    Planes,
    Residual,
    Stage,
    crown_planes,
    forward,
    interval_features,
    interval_lower,
    output_lipschitz,
    read_network,
    slopes_of,
    whole,
)
from phalanx.bounds.stages import MaxPool, Shape
from phalanx.errors import InputError
from phalanx.experts.resnet import BasicBlock
from phalanx.nn import exact_fp32
from phalanx.routing import CNNRouter, LinearRouter, LipschitzRouter, MLPRouter
from phalanx.threat import Norm

Method = Literal["auto", "lipschitz", "ibp", "crown"]
"""lipschitz: global constants. ibp: interval bounds and interval derivatives in the ball. crown: linear bounds. auto:
the best for each expert and class of all that apply."""
METHODS: tuple[Method, ...] = get_args(Method)

_UNITS = 128
"""Allowance for the deployed precision, in units of its rounding: 1.5e-5 for float32."""
_OBSERVED = 8
"""And so many times the difference from float64 that is seen at the clean image."""
_WRONG = 1e-2
"""A difference, relative to the largest output, that no rounding explains."""

_CHAINS = (LinearRouter, MLPRouter, CNNRouter, LipschitzRouter)
_BLOCKS: Blocks = {BasicBlock: lambda block: (block.body, block.shortcut)}


def precision(module: nn.Module) -> torch.dtype:
    """That a network is deployed in."""
    return next((p.dtype for p in module.parameters()), torch.float32)


def rounding(module: nn.Module) -> float:
    """The allowance for it, relative to the size of what the network computes."""
    return _UNITS * torch.finfo(precision(module)).eps


class Answers(NamedTuple):
    """At clean images."""

    values: Tensor
    """(N, C) float64 outputs."""
    slack: Tensor
    """(N,) how far a difference of two deployed outputs may be from its float64 value: an allowance, not a proof."""


class Bounds(NamedTuple):
    """Within a ball around each image."""

    margins: Tensor
    """(N, C): lower bounds of f^y - f^k, infinite at k = y."""
    planes: Planes | None
    """Linear functions below f^y - f^k (k = y: 0), where a method made them."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network read into stages, on images (*shape)."""

    module: nn.Module
    stages: tuple[Stage, ...]
    shape: Shape
    norm: Norm
    name: str
    known: Tensor | None = None
    """Its constants, where they were made before."""

    @classmethod
    def read(cls, module: nn.Module, shape: Shape, norm: Norm, name: str, known: Tensor | None = None) -> Network:
        """Raises InputError naming a layer that no bound is known for."""
        stages = read_network(module, shape, where=name, chains=_CHAINS, blocks=_BLOCKS)
        return cls(module, stages, shape, norm, name, known)

    @cached_property
    def lipschitz(self) -> Tensor:
        """(C, C): constants of the differences of two outputs."""
        return output_lipschitz(self.stages, self.shape, self.norm) if self.known is None else self.known

    @property
    def linear(self) -> Tensor | None:
        """(C, D): the weights of a network that is one linear layer."""
        return self.stages[0].weight if len(self.stages) == 1 and isinstance(self.stages[0], Dense) else None

    @cached_property
    def deep(self) -> bool:
        """Whether bounds that go backwards cost more than they are worth: residual blocks or max-pooling behind layers
        whose bounds are too large to be carried."""
        return any(isinstance(stage, Residual | MaxPool) for stage in self.stages) and not whole(self.stages)

    def methods(self, method: Method) -> tuple[Method, ...]:
        """What `method` means here."""
        if method == "auto":
            # CROWN holds the interval bounds already
            return ("lipschitz", "ibp" if self.deep else "crown")
        return (method,)

    @torch.no_grad()
    def answers(self, x: Tensor) -> Answers:
        """Of images (N, *shape), float64. Raises InputError if the network does not compute what its layers say."""
        values = forward(self.stages, x)
        with exact_fp32():
            deployed = self.module(x.to(precision(self.module))).double()
        scale = 1 + values.abs().amax(1)
        seen = (deployed - values).abs().amax(1)
        # an overflow is another matter: the slack is then infinite, and nothing is certified
        if bool(((seen > _WRONG * scale) & deployed.isfinite().all(1)).any()):
            raise InputError(
                f"{self.name} answers otherwise than its layers one after the other do, so that no bound "
                "can be given for it"
            )
        return Answers(values, 2 * (rounding(self.module) * scale + _OBSERVED * seen))

    def bounds(self, answers: Answers, x: Tensor, y: Tensor, radius: Tensor, method: Method) -> Bounds:
        """Within `radius` (N,) of images x, less the slack; labels y (N,)."""
        clean = answers.values.gather(1, y[:, None]) - answers.values
        ball = Ball(x, radius, self.norm)
        eye = torch.eye(clean.shape[1], dtype=x.dtype, device=x.device)
        rows = eye[y][:, None] - eye
        slack, planes, found = answers.slack[:, None], None, []
        for each in self.methods(method):
            if each == "lipschitz":
                # they may have been made, or kept, on another device
                low = clean - self.lipschitz.to(clean)[y] * radius[:, None]
            elif each == "crown":
                planes = crown_planes(self.stages, rows, ball)
                low = planes.least(ball)
                planes = planes._replace(constants=planes.constants - slack)
            else:
                low = self._by_intervals(clean, rows, ball)
            found.append(low - slack)
        return Bounds(torch.stack(found).amax(0).scatter(1, y[:, None], math.inf), planes)

    def _by_intervals(self, clean: Tensor, rows: Tensor, ball: Ball) -> Tensor:
        features = interval_features(self.stages, ball)
        found = interval_lower(self.stages, features, rows)
        if self.deep:
            return found
        local = slopes_of(self.stages, features, rows, self.norm)
        return torch.maximum(found, clean - local * ball.radius[:, None])
