"""The dual model: a standard classifier, accurate, and a robust one, mixed so that the robust one can hold the answer.

Bai et al. 2024 (Mixing Classifiers, SIMODS) mix the probabilities of two frozen networks; here both are routed models.
"""

# B batch, C classes

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.route import Routed, RoutedModel, RouteTree, require_routed

Mix = Literal["probabilities", "logits"]


class DualRoute(NamedTuple):
    """The routes of both halves."""

    standard: RouteTree
    robust: RouteTree


class DualModel(nn.Module):
    """p_D = (1 - alpha) p_S + alpha p_R, returned as log-probabilities, which are valid logits.

    Mixing probabilities bounds what S can do: D answers y whatever S says wherever
    p_R,y - max_{k != y} p_R,k > (1 - alpha) / alpha (equality is at worst a tie), since
    D_y - D_k >= alpha (p_R,y - p_R,k) - (1 - alpha). For alpha <= 1/2 that protects nothing.

    Args:
        standard: S, a routed model; wrap a single network as `MixtureOfExperts(None, [network])`.
        robust: R, another routed model for the same classes.
        alpha: the weight of R, in [0, 1]. At 0 and at 1 the answer is that of one half alone and the other's experts
            do not run; its route is still decided and returned.
        mix: "logits" returns (1 - alpha) z_S + alpha z_R, only to reproduce released code. It is unsound: its softmax
            is proportional to p_S^(1 - alpha) p_R^alpha, where S's share is unbounded. A gap g between two logits of S
            outweighs one of (1 - alpha) / alpha * g in R, and a standard network under attack has large gaps.

    Raises TypeError for a half that is no routed model, ValueError for a bad alpha or mix, for halves that share
    parameters and, in a forward pass, for halves that answer with different shapes.
    """

    standard: RoutedModel
    robust: RoutedModel

    def __init__(self, standard: nn.Module, robust: nn.Module, alpha: float, *, mix: Mix = "probabilities") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], the weight of the robust half, got {alpha}")
        if mix not in get_args(Mix):
            raise ValueError(f"mix must be one of {', '.join(get_args(Mix))}, got {mix!r}")
        if {id(p) for p in standard.parameters()} & {id(p) for p in robust.parameters()}:
            raise ValueError("standard and robust must not share parameters, got some in both; copy one of them")
        self.standard = require_routed("standard", standard)
        self.robust = require_routed("robust", robust)
        self._alpha = float(alpha)
        self._mix = mix
        specs = spec_of(standard), spec_of(robust)
        if specs[0] is not None and specs[1] is not None:
            record(
                self, "dual", standard=specs[0].to_json(), robust=specs[1].to_json(), alpha=self._alpha, mix=self._mix
            )

    @property
    def alpha(self) -> float:
        """The weight of the robust half. It is part of what the model is: for another, build another of the halves."""
        return self._alpha

    @property
    def mix(self) -> Mix:
        """What is mixed."""
        return self._mix

    def extra_repr(self) -> str:
        return f"alpha={self._alpha}, mix={self._mix!r}"

    def gate(self, x: Tensor) -> DualRoute:
        """The routes of images (B, C, H, W), without running an expert where the halves can do that."""
        return DualRoute(self.standard.gate(x), self.robust.gate(x))

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Log-probabilities (B, C), float32 at least, under `route` or the gates' own decisions; and the route used.

        With `mix` = "logits" the mixed logits (B, C). Raises TypeError unless `route` is a `DualRoute`.
        """
        held_standard, held_robust = self._held(route)
        standard, standard_route = _pass(self.standard, x, held_standard, counts=self._alpha < 1)
        robust, robust_route = _pass(self.robust, x, held_robust, counts=self._alpha > 0)
        return Routed(self._mixed(standard, robust), DualRoute(standard_route, robust_route))

    @staticmethod
    def _held(route: RouteTree | None) -> tuple[RouteTree | None, RouteTree | None]:
        """The given routes of both halves, None for one that its gate decides."""
        if not (route is None or isinstance(route, DualRoute)):
            raise TypeError(f"a dual model takes a DualRoute, one route for each half, got {type(route).__name__}")
        return (None, None) if route is None else route

    @staticmethod
    def _precise(*answers: Tensor) -> list[Tensor]:
        """The halves' logits (B, C), float32 at least. Raises ValueError unless they are for the same classes."""
        if len({logits.shape for logits in answers}) > 1:
            shapes = " and ".join(str(tuple(logits.shape)) for logits in answers)
            raise ValueError(f"standard and robust must answer with logits for the same classes, got shapes {shapes}")
        # in half precision rounding would swamp the smaller probability; autocast leaves these float32 operations alone
        return [logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in answers]

    def _mixed(self, standard_BC: Tensor | None, robust_BC: Tensor | None) -> Tensor:
        answers = self._precise(*(logits for logits in (standard_BC, robust_BC) if logits is not None))
        if self._mix == "probabilities":
            answers = [logits.log_softmax(-1) for logits in answers]
        if len(answers) == 1:
            return answers[0]
        standard_BC, robust_BC = answers
        if self._mix == "logits":
            return (1 - self._alpha) * standard_BC + self._alpha * robust_BC
        # log(softmax + softmax) would be log 0 once the logits are 104 nats apart
        return torch.logaddexp(math.log1p(-self._alpha) + standard_BC, math.log(self._alpha) + robust_BC)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, C) of images (B, C, H, W) in [0, 1]; mixed logits with `mix` = "logits"."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Each half's players under its name: "standard.experts", "standard.router", "robust.experts", ..."""
        halves = {"standard": self.standard, "robust": self.robust}
        return {f"{half}.{name}": list(own) for half, model in halves.items() for name, own in model.players().items()}


def _pass(half: RoutedModel, x: Tensor, route: RouteTree | None, *, counts: bool) -> tuple[Tensor | None, RouteTree]:
    """Logits, None for a half that does not count, and the route."""
    if not counts:
        return None, half.gate(x) if route is None else route
    logits, decided = half.routed(x, route)
    assert decided is not None, "a routed model returns its route"
    return logits, decided
