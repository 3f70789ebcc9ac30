"""A soft gate over linear functions: no point has less than their joint bound, and no bound is worse for it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.bounds import Ball, Planes, pairwise_lipschitz
from phalanx.certification import soft_low, topn_low
from phalanx.certification.joint import Joint
from phalanx.threat import NORMS, Norm

_Y = 0


def _drawn(seed: int, norm: Norm, radius: float) -> tuple[list[Planes], Tensor, Tensor, Tensor, Ball]:
    """Linear experts' margins, a linear router's scores, its weights and its constants, around points of two pixels."""
    generator = torch.Generator().manual_seed(seed)
    n, experts, classes = 3, 3, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = torch.rand(n, 1, 1, 2, dtype=torch.float64, generator=generator)
    planes = []
    for _ in range(experts):
        slopes, constants = normal(1, classes, 2).expand(n, -1, -1).clone(), normal(1, classes).expand(n, -1).clone()
        slopes[:, _Y], constants[:, _Y] = 0, 0
        planes.append(Planes(slopes, constants))
    weights = 3 * normal(experts, 2)
    ball = Ball(x, torch.full((n,), radius, dtype=torch.float64), norm)
    return planes, x.flatten(1) @ weights.T, weights, pairwise_lipschitz(weights, norm), ball


def _margins(planes: list[Planes], ball: Ball) -> Tensor:
    margins = torch.stack([each.least(ball) for each in planes], 1)
    margins[:, :, _Y] = math.inf
    return margins


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), norm=st.sampled_from(NORMS), n=st.sampled_from([2, 3]))
def test_no_point_has_less_and_no_bound_is_worse(seed: int, norm: Norm, n: int) -> None:
    for radius in (0.0, 0.05, 0.4):
        planes, scores, weights, rho, ball = _drawn(seed, norm, radius)
        margins, none = _margins(planes, ball), torch.zeros(3, dtype=torch.float64)
        joint = Joint.of(planes, ball)
        if n == 3:
            plain, low = (soft_low(margins, scores, rho, ball.radius, none, summed) for summed in (None, joint))
        else:
            plain, low = (topn_low(margins, scores, rho, ball.radius, none, n, 1.0, s) for s in (None, joint))
        assert bool((low >= plain).all())
        directions = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[norm]
        directions = directions / directions.norm(p=order, dim=1, keepdim=True)
        for index in range(3):
            points = (ball.x[index].flatten() + radius * directions).clamp(0, 1)
            moved = scores[index] + (points - ball.x[index].flatten()) @ weights.T
            kept = moved.topk(n, 1)
            shares = torch.zeros_like(moved).scatter(1, kept.indices, kept.values.softmax(1))
            values = torch.stack([points @ each.slopes[index].T + each.constants[index] for each in planes], 1)
            assert bool(((shares[..., None] * values).sum(1)[:, 1:] >= low[index, 1:] - 1e-9).all())


def test_what_experts_gain_and_lose_together_cancels() -> None:
    """Margins 1 + 4 t and 1 - 4 t, equally weighted: their sum never moves, each alone may fall to -1."""
    ball = Ball(torch.full((1, 1, 1, 1), 0.5).double(), torch.tensor([0.5]).double(), "Linf")
    planes = [Planes(torch.tensor([[[0.0], [s]]]).double(), torch.tensor([[0.0, 1 - s / 2]]).double()) for s in (4, -4)]
    scores, none = torch.zeros(1, 2).double(), torch.zeros(1).double()
    margins = _margins(planes, ball)
    assert float(soft_low(margins, scores, torch.zeros(2, 2).double(), ball.radius, none)[0, 1]) == -1
    summed = soft_low(margins, scores, torch.zeros(2, 2).double(), ball.radius, none, Joint.of(planes, ball))
    assert float(summed[0, 1]) == pytest.approx(1)


def test_many_experts_are_bounded_one_by_one() -> None:
    planes, *_, ball = _drawn(0, "L2", 0.1)
    assert Joint.of(planes * 2, ball) is not None and Joint.of(planes * 3, ball) is None
