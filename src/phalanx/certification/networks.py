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
    Residual,
    Stage,
    crown_lower,
    forward,
    interval_features,
    output_lipschitz,
    read_network,
    slopes_of,
)
from phalanx.bounds.stages import MaxPool, Shape
from phalanx.errors import InputError
from phalanx.experts.resnet import BasicBlock
from phalanx.nn import exact_fp32
from phalanx.routing import CNNRouter, LinearRouter, MLPRouter
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

_CHAINS = (LinearRouter, MLPRouter, CNNRouter)
_BLOCKS: Blocks = {BasicBlock: lambda block: (block.body, block.shortcut)}


class Answers(NamedTuple):
    """At clean images."""

    values: Tensor
    """(N, C) float64 outputs."""
    slack: Tensor
    """(N,) how far a difference of two deployed outputs may be from its float64 value: an allowance, not a proof."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network read into stages, on images (*shape)."""

    module: nn.Module
    stages: tuple[Stage, ...]
    shape: Shape
    norm: Norm
    name: str

    @classmethod
    def read(cls, module: nn.Module, shape: Shape, norm: Norm, name: str) -> Network:
        """Raises InputError naming a layer that no bound is known for."""
        stages = read_network(module, shape, where=name, chains=_CHAINS, blocks=_BLOCKS)
        return cls(module, stages, shape, norm, name)

    @cached_property
    def lipschitz(self) -> Tensor:
        """(C, C): constants of the differences of two outputs."""
        return output_lipschitz(self.stages, self.shape, self.norm)

    @property
    def applicable(self) -> tuple[Method, ...]:
        """The methods that know all of its stages."""
        if any(isinstance(stage, Residual) for stage in self.stages):
            return ("lipschitz",)
        if any(isinstance(stage, MaxPool) for stage in self.stages):
            return ("lipschitz", "ibp")
        return ("lipschitz", "ibp", "crown")

    def methods(self, method: Method) -> tuple[Method, ...]:
        """What `method` means here. Raises InputError where it does not apply."""
        if method == "auto":
            # CROWN holds the interval bounds already
            return tuple(each for each in self.applicable if each != "ibp" or "crown" not in self.applicable)
        if method not in self.applicable:
            raise InputError(
                f"method {method} knows no bound for the residual or max-pooling layers of {self.name}; use "
                f"{' or '.join(self.applicable)}, or auto"
            )
        return (method,)

    @torch.no_grad()
    def answers(self, x: Tensor) -> Answers:
        """Of images (N, *shape), float64. Raises InputError if the network does not compute what its layers say."""
        values = forward(self.stages, x)
        dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        with exact_fp32():
            deployed = self.module(x.to(dtype)).double()
        scale = 1 + values.abs().amax(1)
        seen = (deployed - values).abs().amax(1)
        # an overflow is another matter: the slack is then infinite, and nothing is certified
        if bool(((seen > _WRONG * scale) & deployed.isfinite().all(1)).any()):
            raise InputError(
                f"{self.name} answers otherwise than its layers one after the other do, so that no bound "
                "can be given for it"
            )
        return Answers(values, 2 * (_UNITS * torch.finfo(dtype).eps * scale + _OBSERVED * seen))

    def margins(self, answers: Answers, x: Tensor, y: Tensor, radius: Tensor, method: Method) -> Tensor:
        """(N, C): lower bounds of f^y - f^k within `radius` (N,) of x, less the slack; infinite at k = y."""
        found = [self._by(each, answers, x, y, radius) for each in self.methods(method)]
        low = torch.stack(found).amax(0) - answers.slack[:, None]
        return low.scatter(1, y[:, None], math.inf)

    def _by(self, method: Method, answers: Answers, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        clean = answers.values.gather(1, y[:, None]) - answers.values
        if method == "lipschitz":
            return clean - self.lipschitz[y] * radius[:, None]
        ball = Ball(x, radius, self.norm)
        eye = torch.eye(clean.shape[1], dtype=x.dtype, device=x.device)
        rows = eye[y][:, None] - eye
        if method == "crown":
            return crown_lower(self.stages, rows, ball)
        return self._by_intervals(clean, rows, ball)

    def _by_intervals(self, clean: Tensor, rows: Tensor, ball: Ball) -> Tensor:
        features = interval_features(self.stages, ball)
        last = self.stages[-1]
        bounds = features[-1]
        offset = torch.zeros_like(clean)
        slopes = rows
        if isinstance(last, Dense):
            # differences of the last layer's rows keep what two classes share
            bounds, offset, slopes = features[-2], rows @ last.bias, rows @ last.weight
        low, high = (side.flatten(1)[..., None] for side in bounds)
        middle, spread = slopes @ ((low + high) / 2), slopes.abs() @ ((high - low) / 2)
        found = (middle - spread)[..., 0] + offset
        if "crown" not in self.applicable:
            return found
        local = slopes_of(self.stages, features, rows, self.norm)
        return torch.maximum(found, clean - local * ball.radius[:, None])
