"""Adaptive smoothing: a dual model that decides for each image how far to trust which half (Bai et al. 2024)."""

# B batch, C classes, H width of the mixing network's hidden layer

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import layers_of, preserved_rng, record, spec_of
from phalanx.routing.dispatch import dispatch
from phalanx.routing.dual import DualModel, DualRoute
from phalanx.routing.moe import MixtureOfExperts
from phalanx.routing.route import Route, Routed, RouteTree


class Smoothed(NamedTuple):
    """What one pass of an `AdaptiveSmoothing` computes."""

    logits: Tensor
    """(B, C) log-probabilities."""
    gamma: Tensor
    """(B,) what the mixing network says: above 0 it takes the image for attacked."""
    route: DualRoute


class _Read(nn.Module):
    """An expert whose logits (B, C) come with what the mixing network reads off it (B, H): (B, C + H)."""

    def __init__(self, expert: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        *self.layers, self.classifier = layers_of(expert)
        self.reader = reader
        # a view of two parts that keep their own modes
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.cat([self.classifier(x), self.reader(x)], -1)


class AdaptiveSmoothing(DualModel):
    """f(x) = log[(1 - alpha(x)) softmax(s_S z_S) + alpha(x) softmax(s_R z_R)], alpha(x) by a mixing network.

    Both halves are frozen, in evaluation mode for good; the mixing network alone can be trained, and it is part of the
    gradient that an attack sees. It reads the features that enter the classifiers of the answering experts, through
    one linear layer for each expert (two experts' features have nothing in common), weighted by the route as their
    logits are; the sum over both halves, a ReLU and a linear layer give gamma(x). Then
    alpha = low + (high - low) sigmoid(gamma) in evaluation mode, and sigmoid(gamma) in training mode.

    The authors read two feature maps of each network through residual stages, and normalise gamma by BatchNorm without
    affine part after clamping it in training. Here the halves are mixtures of any backbones, so one stage that they all
    have is read, and gamma is used as it comes.

    What `DualModel` says of S's share holds here with alpha = low, whatever the mixing network says.

    Args:
        standard, robust: S and R, each a `MixtureOfExperts` whose experts are chains that end in a linear classifier.
        scales: s_S and s_R, positive inverse temperatures of the halves' logits.
        alpha_range: (low, high), 0 <= low < high <= 1: what the weight of R is squeezed into.
        hidden: H.
        seed: of the mixing network's initial weights.

    Raises as `DualModel` does; TypeError for a half that is no such mixture, ValueError for the other arguments.
    """

    standard: MixtureOfExperts
    robust: MixtureOfExperts

    def __init__(
        self,
        standard: nn.Module,
        robust: nn.Module,
        *,
        scales: Sequence[float] = (2.0, 1.0),
        alpha_range: Sequence[float] = (0.8, 1.0),
        hidden: int = 64,
        seed: int = 0,
    ) -> None:
        _check(scales, alpha_range, hidden)
        low, high = alpha_range
        super().__init__(standard, robust, low)
        self._high = float(high)
        self._scales = float(scales[0]), float(scales[1])
        self._hidden = hidden
        with preserved_rng():
            torch.manual_seed(seed)
            self.readers = nn.ModuleDict(
                {name: _readers(name, half, hidden) for name, half in (("standard", standard), ("robust", robust))}
            )
            anchor = next(iter(self.readers["standard"].parameters()))
            self.mixing = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1)).to(anchor)
        self.standard.eval().requires_grad_(False)
        self.robust.eval().requires_grad_(False)
        specs = spec_of(standard), spec_of(robust)
        if specs[0] is not None and specs[1] is not None:
            halves = {"standard": specs[0].to_json(), "robust": specs[1].to_json()}
            settings = {"scales": list(self._scales), "alpha_range": [self.alpha, self._high], "hidden": hidden}
            record(self, "adaptive", **halves, **settings)

    @property
    def alpha(self) -> float:
        """The least weight of the robust half at any image."""
        return self._alpha

    @property
    def alpha_range(self) -> tuple[float, float]:
        """What the weight of the robust half is squeezed into."""
        return self._alpha, self._high

    def extra_repr(self) -> str:
        return f"scales={self._scales}, alpha_range={self.alpha_range}"

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode of the mixing network; the halves stay in evaluation mode."""
        super().train(mode)
        self.standard.eval()
        self.robust.eval()
        return self

    def smoothed(self, x: Tensor, route: RouteTree | None = None) -> Smoothed:
        """Log-probabilities (B, C), float32 at least, gamma (B,) and the route: as `routed` in all else."""
        held_standard, held_robust = self._held(route)
        standard_BC, standard_BH, standard_route = self._answer("standard", x, held_standard)
        robust_BC, robust_BH, robust_route = self._answer("robust", x, held_robust)
        gamma = self.mixing(standard_BH + robust_BH).squeeze(-1)
        gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
        logits = self._smooth(standard_BC, robust_BC, gamma)
        return Smoothed(logits, gamma, DualRoute(standard_route, robust_route))

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Log-probabilities (B, C), float32 at least, under `route` or the gates' own decisions; and the route used.

        Raises TypeError unless `route` is a `DualRoute`.
        """
        logits, _, decided = self.smoothed(x, route)
        return Routed(logits, decided)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Who can move: "mixing", the mixing network."""
        return {"mixing": [*self.readers.parameters(), *self.mixing.parameters()]}

    def _answer(self, name: str, x: Tensor, route: RouteTree | None) -> tuple[Tensor, Tensor, Route]:
        """Logits (B, C), the mixing network's share (B, H) and the route of one half."""
        half: MixtureOfExperts = getattr(self, name)
        decided = half.gate(x) if route is None else route
        if not isinstance(decided, Route):
            raise TypeError(f"a model-level mixture takes one Route, got {type(decided).__name__}")
        readers = self.readers[name]
        assert isinstance(readers, nn.ModuleList)
        views = [_Read(expert, reader) for expert, reader in zip(half.experts, readers, strict=True)]
        both = dispatch(views, x, decided)
        return both[:, : -self._hidden], both[:, -self._hidden :], decided

    def _smooth(self, standard_BC: Tensor, robust_BC: Tensor, gamma: Tensor) -> Tensor:
        low, high = (0.0, 1.0) if self.training else self.alpha_range
        weights = _log_between(1 - high, 1 - low, -gamma), _log_between(low, high, gamma)
        parts = [
            weight[:, None] + (scale * logits).log_softmax(-1)
            for weight, scale, logits in zip(weights, self._scales, self._precise(standard_BC, robust_BC), strict=True)
        ]
        return torch.logaddexp(*parts)


def _log_between(low: float, high: float, gamma: Tensor) -> Tensor:
    """log(low + (high - low) sigmoid(gamma)); stable, and with a gradient where the sigmoid rounds to 0 or 1."""
    part = math.log(high - low) + F.logsigmoid(gamma)
    return part if low <= 0 else torch.logaddexp(part, torch.full_like(part, math.log(low)))


def _check(scales: Sequence[float], alpha_range: Sequence[float], hidden: int) -> None:
    """Raises ValueError for numbers that make no `AdaptiveSmoothing`."""
    if len(scales) != 2 or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"scales must be two positive numbers, standard and robust, got {tuple(scales)}")
    if len(alpha_range) != 2 or not 0 <= alpha_range[0] < alpha_range[1] <= 1:
        raise ValueError(f"alpha_range must be two numbers, 0 <= low < high <= 1, got {tuple(alpha_range)}")
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}")


def _readers(name: str, half: nn.Module, hidden: int) -> nn.ModuleList:
    """A linear layer for each expert of a half, on its features."""
    if not isinstance(half, MixtureOfExperts):
        raise TypeError(f"{name} must be a MixtureOfExperts, got {type(half).__name__}; its experts' features are read")
    readers = nn.ModuleList()
    for expert in half.experts:
        classifier = layers_of(expert)[-1]
        if not isinstance(classifier, nn.Linear):
            raise TypeError(
                f"{name} must have experts that are an nn.Sequential ending in nn.Linear, the classifier, "
                f"got {type(expert).__name__} ending in {type(classifier).__name__}; use one of the named experts"
            )
        # on the classifier's device and in its precision
        readers.append(nn.Linear(classifier.in_features, hidden).to(classifier.weight))
    return readers
