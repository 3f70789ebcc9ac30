"""MixedNUTS (Bai et al. 2024, TMLR): two trained classifiers mixed through a nonlinear map of the robust one's logits,
so that the robust half is sure where it is right and gives way where it is wrong. Nothing is trained.
"""

# B batch, C classes

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.dual import DualModel

LARGEST = 250
"""Logits are normalised by the mean and variance of so many, the largest of each row: all of them for fewer classes."""

MAPPED = 0.1
"""The share of the mapped probabilities in the gradient of a `MixedNUTS`; the rest goes round the map."""


def normalised(logits_BC: Tensor) -> Tensor:
    """Layer norm without affine: (B, C) float64, each row less its mean and divided by sqrt(variance + 1e-8), unbiased,
    both over its `LARGEST` largest logits."""
    logits_BC = logits_BC.double()
    largest = logits_BC.topk(min(LARGEST, logits_BC.shape[-1])).values
    deviation_B1 = (largest.var(-1, keepdim=True) + 1e-8).sqrt()
    return (logits_BC - largest.mean(-1, keepdim=True)) / deviation_B1


@dataclass(frozen=True, kw_only=True)
class LogitMap:
    """T(z) = scale * sign(v) |v|^power, v = GELU(normalised(z) + bias). Raises ValueError for a bad number."""

    scale: float
    """Positive; an inverse temperature."""
    power: float
    """At least 1; large ones drive large margins apart from small ones."""
    bias: float
    """Of the normalised logits, negative to flatten all but the largest."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        # below 1 the slope at 0 is infinite
        if not 1 <= self.power < float("inf"):
            raise ValueError(f"power must be at least 1 and finite, got {self.power}")
        if not abs(self.bias) < float("inf"):
            raise ValueError(f"bias must be finite, got {self.bias}")

    def stretched(self, normalised_BC: Tensor) -> Tensor:
        """T of logits that `normalised` has seen; (B, C) float64."""
        clamped_BC = F.gelu(normalised_BC + self.bias)
        return self.scale * clamped_BC.sign() * clamped_BC.abs() ** self.power

    def __call__(self, logits_BC: Tensor) -> Tensor:
        """T of logits (B, C); float64."""
        return self.stretched(normalised(logits_BC))


class MixedNUTS(DualModel):
    """p_D = (1 - alpha) onehot(argmax z_S) + alpha softmax(T(z_R)), returned as log-probabilities, T a `LogitMap`.

    Computed in float64 and returned in R's precision, float32 at least. The values are exact; the gradient is not
    theirs, for the one-hot has none and T is so steep that softmax(T(z_R)) has next to none. It is straight-through, as
    in the authors' adaptive attack: that of log[(1 - alpha) softmax(normalised(z_S)) + alpha p_around], with
    p_around = 0.9 softmax(z_R) + 0.1 softmax(T(z_R)), which goes round the map. (They take another alpha there, the one
    for R without T.) It makes the model easier to attack, which is its purpose, and is no gradient to train with. The
    attack surfaces "standard", "robust" and "halves" read the halves' own logits, as of any dual model.

    Args:
        standard: S, as for `DualModel`.
        robust: R, likewise.
        alpha: the weight of R, in (0, 1]; up to 1/2 S alone decides. At 1 the answer is softmax(T(z_R)), and S's
            experts do not run.
        scale, power, bias: of T; `phalanx.evaluation.pick_nuts` finds them, and alpha.

    A row in which either half's logits are not all finite is NaN. Raises as `DualModel` and `LogitMap` do.
    """

    def __init__(
        self, standard: nn.Module, robust: nn.Module, alpha: float, *, scale: float, power: float, bias: float
    ) -> None:
        if alpha == 0:
            raise ValueError("alpha must be in (0, 1], the weight of the robust half, got 0; use the standard half")
        super().__init__(standard, robust, alpha)
        self._map = LogitMap(scale=float(scale), power=float(power), bias=float(bias))
        specs = spec_of(standard), spec_of(robust)
        if specs[0] is not None and specs[1] is not None:
            halves = {"standard": specs[0].to_json(), "robust": specs[1].to_json()}
            record(self, "nuts", **halves, alpha=self.alpha, **asdict(self._map))

    @property
    def map(self) -> LogitMap:
        """T. Part of what the model is, as alpha is."""
        return self._map

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, scale={self.map.scale}, power={self.map.power}, bias={self.map.bias}"

    def _mixed(self, standard_BC: Tensor | None, robust_BC: Tensor | None) -> Tensor:
        assert robust_BC is not None, "alpha is positive"
        sure_BC = None if standard_BC is None else _one_hot_logits(standard_BC)
        exact_BC = super()._mixed(sure_BC, self._map(robust_BC))
        soft_BC = None if standard_BC is None else normalised(standard_BC)
        smooth_BC = super()._mixed(soft_BC, self._around(robust_BC))
        # the difference is exactly 0: the value is the exact one to the last bit
        answer_BC = exact_BC.detach() + (smooth_BC - smooth_BC.detach())
        return answer_BC.to(torch.promote_types(robust_BC.dtype, torch.float32))

    def _around(self, robust_BC: Tensor) -> Tensor:
        """log[0.9 softmax(z_R) + 0.1 softmax(T(z_R))], (B, C) float64: what R's gradient is taken from."""
        straight_BC, mapped_BC = robust_BC.double().log_softmax(-1), self._map(robust_BC).log_softmax(-1)
        return torch.logaddexp(math.log(1 - MAPPED) + straight_BC, math.log(MAPPED) + mapped_BC)


def _one_hot_logits(logits_BC: Tensor) -> Tensor:
    """(B, C) float64, detached, with the softmax 1 at each row's argmax and 0 elsewhere; NaN for a non-finite row."""
    sure_BC = torch.full_like(logits_BC, float("-inf"), dtype=torch.float64)
    sure_BC.scatter_(-1, logits_BC.detach().argmax(-1, keepdim=True), 0.0)
    return sure_BC.masked_fill(~logits_BC.isfinite().all(-1, keepdim=True), float("nan"))
