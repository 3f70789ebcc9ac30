"""What an attacker may do: a norm ball around the image, inside the valid pixel range [0, 1]."""

# B batch, D pixels of one image (C*H*W)

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from phalanx.rng import SampleRng

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)

BALL_TOLERANCE = 1e-6
"""Relative to max(epsilon, 1): what float32 may exceed the radius by (8/255 + 3e-8 is seen after a single step)."""

_SPARSITY_L1 = 0.05
"""Share of the pixels that one L1 ascent step moves (Tramer & Boneh 2019, SLIDE: the top percentiles only)."""


def parse_epsilon(text: str | float) -> Fraction:
    """The exact value of "8/255", "0.03" or a number; raises ValueError unless it is finite and at least 0."""
    try:
        value = Fraction(re.sub(r"\s*/\s*", "/", text.strip())) if isinstance(text, str) else Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"eps must be a number or a fraction such as '8/255', got {text!r}") from None
    if value < 0:
        raise ValueError(f"eps must be at least 0, got {text!r}; pixels lie in [0, 1]")
    return value


def check_radius(norm: Norm, eps: float | str) -> None:
    """Raises ValueError for an Linf radius above 1: it covers every image, and is nearly always a forgotten "/255"."""
    if norm == "Linf" and parse_epsilon(eps) > 1:
        raise ValueError(f"eps must be at most 1 for Linf, since pixels lie in [0, 1], got {eps!r}; is it {eps}/255?")


def parse_norm(text: str | float) -> Norm:
    """The field's spellings ("Linf", "linf", "inf", "L2", 2, ...) to the canonical one."""
    key = str(text).lower().removeprefix("l").removesuffix(".0")
    names: dict[str, Norm] = {"inf": "Linf", "2": "L2", "1": "L1"}
    if key not in names:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {text!r}")
    return names[key]


def per_image(values_B: Tensor, like: Tensor) -> Tensor:
    """(B,) values shaped to act on images (B, ...)."""
    return values_B.reshape(-1, *([1] * (like.dim() - 1)))


def unit_l2(gradient: Tensor) -> Tensor:
    """Each image's gradient (B, ...) with length 1; zeros stay zeros."""
    # dividing by the largest entry first keeps tiny gradients from underflowing when they are squared
    floor = torch.finfo(gradient.dtype).tiny
    gradient = gradient / per_image(gradient.flatten(1).abs().amax(1).clamp_min(floor), gradient)
    return gradient / per_image(gradient.flatten(1).norm(dim=1).clamp_min(floor), gradient)


def _project_l1(delta_BD: Tensor, room_BD: Tensor, radius: float) -> Tensor:
    """Nearest point with L1 norm at most `radius` and |delta| at most `room` (exact; Croce & Hein 2021, prop. 2.1).

    The solution is sign(v) min(max(|v| - shift, 0), room); its norm is piecewise linear in the shift with kinks at
    |v| and |v| - room, so sorting the kinks finds the shift without iteration.
    """
    size_BD = delta_BD.abs()
    kinks_B2D, order_B2D = torch.cat([size_BD, (size_BD - room_BD).clamp_min(0)], 1).sort(1, descending=True)
    starts = torch.cat([torch.ones_like(size_BD), -torch.ones_like(size_BD)], 1)
    # going down from an infinite shift, a pixel begins to count at |v| and is full at |v| - room
    slope_B2D = starts.gather(1, order_B2D).cumsum(1)
    gaps = torch.diff(kinks_B2D, dim=1, append=kinks_B2D.new_zeros(len(kinks_B2D), 1)).neg()
    norm_at_next_B2D = (slope_B2D * gaps).cumsum(1)
    first_B1 = (norm_at_next_B2D < radius).sum(1, keepdim=True).clamp_max(kinks_B2D.shape[1] - 1)
    slope_B1 = slope_B2D.gather(1, first_B1).clamp_min(1)
    norm_before_B1 = norm_at_next_B2D.gather(1, first_B1) - (slope_B2D * gaps).gather(1, first_B1)
    shift_B1 = kinks_B2D.gather(1, first_B1) - (radius - norm_before_B1) / slope_B1
    inside_B1 = torch.minimum(size_BD, room_BD).sum(1, keepdim=True) <= radius
    shift_B1 = torch.where(inside_B1, 0, shift_B1).clamp_min(0)
    return delta_BD.sign() * torch.minimum((size_BD - shift_B1).clamp_min(0), room_BD)


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the clean one in `norm`, with pixels in [0, 1]."""

    norm: Norm = "Linf"
    """The norm that measures a perturbation."""
    eps: float | str = "8/255"
    """Radius in pixel units of [0, 1]; a fraction such as "8/255" is kept exactly as written."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        check_radius(self.norm, self.eps)
        parse_epsilon(self.eps)

    @property
    def epsilon(self) -> float:
        return float(parse_epsilon(self.eps))

    def __str__(self) -> str:
        return f"{self.norm} {self.eps}"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the ball around `x` near `x_adv`, both (B, ...): the nearest for Linf and L1.

        For L2 it is the radial projection followed by clipping, which stays in the ball because clipping to a box
        that holds `x` moves every pixel towards `x`.
        """
        epsilon = self.epsilon
        if self.norm == "Linf":
            return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        if self.norm == "L2":
            delta = x_adv - x
            length = delta.flatten(1).norm(dim=1)
            scale = (epsilon / length.clamp_min(1e-12)).clamp_max(1)
            return (x + delta * per_image(scale, x)).clamp(0, 1)
        # in float64: the shift is a small difference of large sums where a point lies far outside
        x_BD = x.flatten(1).double()
        delta_BD = x_adv.flatten(1).double() - x_BD
        room_BD = torch.where(delta_BD > 0, 1 - x_BD, x_BD)
        # rounding to the pixels' precision may lengthen every pixel's step by half a unit in the last place below 1
        slack = min(x_BD.shape[1] * torch.finfo(x.dtype).eps / 4, epsilon / 1000)
        projected_BD = x_BD + _project_l1(delta_BD, room_BD, epsilon - slack)
        return projected_BD.reshape(x.shape).to(x.dtype).clamp(0, 1)

    def random_start(self, x: Tensor, rng: SampleRng, *, restart: int = 0) -> Tensor:
        """A point drawn uniformly from the ball around each image of (B, ...), then clipped to [0, 1]."""
        shape = x.shape[1:]
        if self.norm == "Linf":
            noise = rng.uniform("start", shape, restart=restart).to(x.dtype) * 2 - 1
            return self.project(x + self.epsilon * noise, x)
        radius = rng.uniform("start.radius", restart=restart).to(x.dtype) ** (1 / max(shape.numel(), 1))
        direction = rng.normal("start", shape, restart=restart).to(x.dtype)
        if self.norm == "L1":
            size = rng.exponential("start.size", shape, restart=restart).to(x.dtype)
            direction = direction.sign() * size
        order = 2 if self.norm == "L2" else 1
        length = direction.flatten(1).norm(p=order, dim=1).clamp_min(1e-12)
        return self.project(x + self.epsilon * direction * per_image(radius / length, x), x)

    def step(self, x_adv: Tensor, gradient: Tensor, step_size: float, x: Tensor) -> Tensor:
        """One steepest-ascent step of length `step_size` from `x_adv`, projected back; all tensors (B, ...).

        A zero or non-finite gradient entry moves nothing.
        """
        gradient = gradient.nan_to_num(0, 0, 0)
        if self.norm == "Linf":
            return self.project(x_adv + step_size * gradient.sign(), x)
        if self.norm == "L2":
            return self.project(x_adv + step_size * unit_l2(gradient), x)
        # a pixel at the end of its range cannot move further: spend the step on those that can
        stuck = ((x_adv <= 0) & (gradient < 0)) | ((x_adv >= 1) & (gradient > 0))
        size_BD = gradient.masked_fill(stuck, 0).abs().flatten(1)
        moved = max(1, round(_SPARSITY_L1 * size_BD.shape[1]))
        threshold_B1 = size_BD.topk(moved, dim=1).values[:, -1:]
        chosen_BD = ((size_BD >= threshold_B1) & (size_BD > 0)).to(x.dtype)
        chosen_BD = chosen_BD / chosen_BD.sum(1, keepdim=True).clamp_min(1)
        return self.project(x_adv + step_size * gradient.sign() * chosen_BD.reshape(x.shape), x)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(B,) size of each perturbation in this norm, in float64."""
        delta_BD = (x_adv.double() - x.double()).flatten(1)
        order = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}[self.norm]
        distance_B: Tensor = torch.linalg.vector_norm(delta_BD, ord=order, dim=1)
        return distance_B

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(B,) whether each image lies in the ball and in [0, 1], up to `BALL_TOLERANCE`; non-finite never does."""
        epsilon = self.epsilon
        near = self.distance(x_adv, x) <= epsilon + BALL_TOLERANCE * max(epsilon, 1)
        flat = x_adv.flatten(1)
        return near & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
