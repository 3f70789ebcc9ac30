"""The most that a linear function can gain in a ball within the pixel range: exact, or never too little."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.bounds import dual_norm, largest_increase, pairwise_lipschitz
from phalanx.rng import SampleRng
from phalanx.threat import NORMS, Norm, ThreatModel

SEEDS = st.integers(0, 2**31 - 1)
RADII = st.sampled_from([0.0, 1e-3, 0.05, 0.3, 1.0, 2.5])


def _drawn(seed: int, images: int = 3, pixels: int = 6) -> tuple[Tensor, Tensor]:
    """Directions with zeros in them, and images of which many pixels are at an end of their range."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, pixels, generator=generator, dtype=torch.float64)
    directions[torch.rand(4, pixels, generator=generator) < 0.2] = 0
    x = torch.rand(images, pixels, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    return directions, x.clamp(0, 1)


def _threat(norm: Norm, radius: float) -> ThreatModel:
    return ThreatModel(norm, min(radius, 1.0) if norm == "Linf" else radius)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, norm=st.sampled_from(NORMS), radius=RADII)
def test_nothing_in_the_ball_gains_more(seed: int, norm: Norm, radius: float) -> None:
    directions, x = _drawn(seed)
    threat = _threat(norm, radius)
    bound = largest_increase(directions, x, threat)
    corners = [
        threat.project(x + scale * directions[row].sign() * step, x)
        for row in range(len(directions))
        for scale in (1, 5)
        for step in (radius, radius * directions[row].abs())
    ]
    drawn = [threat.random_start(x, SampleRng.for_batch(len(x), seed), restart=restart) for restart in range(10)]
    for point in corners + drawn:
        gain = (point - x) @ directions.T
        assert (gain <= bound + 1e-9).all()
    # and never more than without the pixel range
    assert (bound <= threat.epsilon * dual_norm(directions, norm) + 1e-9).all()


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, norm=st.sampled_from(NORMS), radius=RADII)
def test_ascent_reaches_it(seed: int, norm: Norm, radius: float) -> None:
    """A linear function over a convex set has no local maxima: projected ascent comes to the bound."""
    directions, x = _drawn(seed, images=2)
    threat = _threat(norm, radius)
    bound = largest_increase(directions[:1], x, threat)[:, 0]
    if norm == "L2":
        # the threat's projection is radial: the maximiser is min(s |v|, room) for the right s
        room = torch.where(directions[0] > 0, 1 - x, x)
        low, high = torch.zeros(len(x)).double(), torch.full((len(x),), 1e6).double()
        for _ in range(200):
            middle = (low + high) / 2
            size = torch.minimum(middle[:, None] * directions[0].abs(), room).norm(dim=1)
            low, high = torch.where(size <= radius, middle, low), torch.where(size <= radius, high, middle)
        best = torch.minimum(low[:, None] * directions[0].abs(), room) @ directions[0].abs()
    else:
        point = x.clone()
        for _ in range(400):
            point = threat.project(point + 0.05 * directions[0], x)
        # what is left of a knapsack is filled slowly where slopes are nearly equal
        point = threat.project(point + 1e4 * directions[0], x)
        best = (point - x) @ directions[0]
    torch.testing.assert_close(bound, best, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    # slopes 3, -4, 0; the second pixel may fall by 0.1 only
    v, x = torch.tensor([[3.0, -4.0, 0.0]]).double(), torch.tensor([[0.5, 0.1, 0.5]]).double()
    assert largest_increase(v, x, ThreatModel("Linf", 0.2)).item() == pytest.approx(3 * 0.2 + 4 * 0.1)
    assert largest_increase(v, x, ThreatModel("L1", 0.3)).item() == pytest.approx(4 * 0.1 + 3 * 0.2)
    assert largest_increase(v, x, ThreatModel("L2", 0.2)).item() == pytest.approx(0.4 + 3 * math.sqrt(0.04 - 0.01))
    # far from the ends of the range it is the dual norm
    inside = torch.full((1, 3), 0.5).double()
    for norm, size in (("Linf", 7.0), ("L2", 5.0), ("L1", 4.0)):
        assert largest_increase(v, inside, ThreatModel(norm, 0.1)).item() == pytest.approx(0.1 * size)


@pytest.mark.parametrize("norm", NORMS)
def test_no_radius_or_no_slope_is_no_gain(norm: Norm) -> None:
    directions, x = _drawn(0)
    assert not largest_increase(directions, x, ThreatModel(norm, 0)).any()
    assert not largest_increase(torch.zeros_like(directions), x, ThreatModel(norm, 0.3)).any()
    assert largest_increase(directions[:0], x, ThreatModel(norm, 0.3)).shape == (len(x), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_the_perturbation(norm: Norm) -> None:
    directions, x = _drawn(3, images=1)
    directions = directions[:1].requires_grad_()
    threat = ThreatModel(norm, 0.3)
    bound = largest_increase(directions, x, threat)
    (d,) = torch.autograd.grad(bound.sum(), directions)
    torch.testing.assert_close((d * directions).sum(), bound.sum(), rtol=1e-5, atol=1e-7)
    assert threat.contains((x + d).clamp(0, 1), x).all()


@given(seed=SEEDS, norm=st.sampled_from(NORMS))
@settings(deadline=None, max_examples=20)
def test_rho_is_a_distance(seed: int, norm: Norm) -> None:
    weights, _ = _drawn(seed)
    rho = pairwise_lipschitz(weights, norm)
    torch.testing.assert_close(rho, rho.T)
    assert not rho.diagonal().any()
    assert (rho[:, None] <= rho[:, :, None] + rho[None] + 1e-9).all()
    order = {"Linf": 1, "L2": 2, "L1": np.inf}[norm]
    assert rho[0, 1].item() == pytest.approx(np.linalg.norm((weights[0] - weights[1]).numpy(), order))
