"""Gates: no reachable weights give less than the bound, and the bound behaves as a bound must."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.bounds import pairwise_lipschitz
from phalanx.certification import entry_radii, soft_low, top1_low, topn_low
from phalanx.threat import NORMS, Norm
from reference.closed_forms import closed_radius, slope_a1, slope_a2, slope_a3, top1_radius

SEEDS = st.integers(0, 2**31 - 1)


class _Drawn:
    """Linear experts and a linear router on two pixels, at a few points; class 0 is y."""

    def __init__(self, seed: int, norm: Norm, *, n: int = 4, experts: int = 4, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.norm: Norm = norm
        self.x, self.pixels = normal(n, 2), normal(200, 2)
        self.router, self.offsets = normal(experts, 2), normal(experts)
        self.experts = normal(experts, classes, 2)
        # y leads on the whole, so that there is something to certify
        self.biases = normal(experts, classes) + torch.tensor([2.0] + [0.0] * (classes - 1))
        self.rho = pairwise_lipschitz(self.router, norm)
        pairs = torch.stack([pairwise_lipschitz(expert, norm)[0] for expert in self.experts])
        self.constants = pairs
        self.scores = self.x @ self.router.T + self.offsets
        self.gaps = self.gaps_at(self.x)
        self.slack = torch.zeros(n, dtype=torch.float64)

    def gaps_at(self, x: Tensor) -> Tensor:
        logits = torch.einsum("nd,ecd->nec", x, self.experts) + self.biases
        gaps = logits[..., :1] - logits
        gaps[..., 0] = math.inf
        return gaps

    def low(self, radius: Tensor, n: int) -> Tensor:
        margins = self.gaps - self.constants * radius[:, None, None]
        if n == len(self.router):
            return soft_low(margins, self.scores, self.rho, radius, self.slack)
        return topn_low(margins, self.scores, self.rho, radius, self.slack, n)

    def true(self, x: Tensor, n: int) -> Tensor:
        scores = x @ self.router.T + self.offsets
        kept = scores.topk(n, 1)
        weights = torch.zeros_like(scores).scatter(1, kept.indices, kept.values.softmax(1))
        return (weights[..., None] * self.gaps_at(x).masked_fill(self.gaps_at(x) == math.inf, 0)).sum(1)

    def around(self, index: int, radius: float) -> Tensor:
        order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[self.norm]
        return self.x[index] + radius * self.pixels / self.pixels.norm(p=order, dim=1, keepdim=True)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, norm=st.sampled_from(NORMS), n=st.sampled_from([1, 2, 3, 4]))
def test_no_point_of_the_ball_has_less(seed: int, norm: Norm, n: int) -> None:
    drawn = _Drawn(seed, norm)
    for radius in (0.0, 0.03, 0.3):
        low = drawn.low(torch.full((4,), radius, dtype=torch.float64), n)
        for index in range(4):
            points = drawn.around(index, radius)
            assert bool((drawn.true(points, n)[:, 1:] >= low[index, 1:] - 1e-9).all())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, norm=st.sampled_from(NORMS), n=st.sampled_from([1, 2, 4]))
def test_a_larger_ball_has_no_more(seed: int, norm: Norm, n: int) -> None:
    drawn = _Drawn(seed, norm)
    lows = [drawn.low(torch.full((4,), radius, dtype=torch.float64), n) for radius in (0.0, 0.01, 0.1, 0.5, 2.0)]
    assert all(bool((b <= a + 1e-12).all()) for a, b in itertools.pairwise(lows))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, norm=st.sampled_from(NORMS))
def test_the_closed_form_is_where_the_bound_ends(seed: int, norm: Norm) -> None:
    drawn = _Drawn(seed, norm)
    entries = entry_radii(drawn.scores, drawn.rho, drawn.slack)
    radius = top1_radius(drawn.gaps, drawn.constants[None], entries)
    finite = radius.isfinite() & (radius > 0)
    inside, outside = radius.masked_fill(~finite, 0) * 0.999, radius.masked_fill(~finite, 0) * 1.001
    for ball, certified in ((inside, True), (outside, False)):
        margins = drawn.gaps - drawn.constants * ball[:, None, None]
        assert bool((((top1_low(margins, entries, ball) > 0).all(1)) == certified)[finite].all())
        assert bool((((drawn.low(ball, 1) > 0).all(1)) == certified)[finite].all())
    # it is at least the smaller of how long the route holds and how long its expert does
    answering = drawn.scores.argmax(1)
    route = entries.scatter(1, answering[:, None], math.inf).amin(1)
    alone = top1_radius(
        drawn.gaps, drawn.constants[None], torch.full_like(entries, math.inf).scatter(1, answering[:, None], 0)
    )
    assert bool((radius >= torch.minimum(route, alone) - 1e-12).all())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, n=st.sampled_from([1, 2, 4]))
def test_symmetries(seed: int, n: int) -> None:
    drawn = _Drawn(seed, "L2")
    radius = torch.full((4,), 0.1, dtype=torch.float64)
    before = drawn.low(radius, n)
    # a common affine function of all scores
    drawn.scores = drawn.scores + 3.0
    assert torch.allclose(drawn.low(radius, n), before)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    drawn.scores, drawn.rho = drawn.scores[:, order], drawn.rho[order][:, order]
    drawn.gaps, drawn.constants, drawn.router = drawn.gaps[:, order], drawn.constants[order], drawn.router[order]
    assert torch.allclose(drawn.low(radius, n), before)
    if n == 1:
        drawn.scores, drawn.rho = drawn.scores * 7, drawn.rho * 7
        assert torch.allclose(drawn.low(radius, n), before)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_a_copy_of_an_expert_changes_nothing(seed: int) -> None:
    drawn = _Drawn(seed, "L2", experts=3)
    radius = torch.full((4,), 0.1, dtype=torch.float64)
    before = drawn.low(radius, 3)
    twice = torch.tensor([0, 0, 1, 2])
    shift = torch.tensor([math.log(2), math.log(2), 0, 0], dtype=torch.float64)
    margins = (drawn.gaps - drawn.constants * 0.1)[:, twice]
    after = soft_low(margins, drawn.scores[:, twice] - shift, drawn.rho[twice][:, twice], radius, drawn.slack)
    assert torch.allclose(after, before)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_one_expert_is_a_plain_lipschitz_bound(seed: int) -> None:
    drawn = _Drawn(seed, "Linf", experts=1)
    radius = torch.full((4,), 0.1, dtype=torch.float64)
    plain = (drawn.gaps - drawn.constants * 0.1)[:, 0]
    assert torch.allclose(drawn.low(radius, 1), plain)
    entries = entry_radii(drawn.scores, drawn.rho, drawn.slack)
    expected = closed_radius(drawn.gaps[:, 0], drawn.constants[0][None])
    assert torch.allclose(top1_radius(drawn.gaps, drawn.constants[None], entries), expected)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_reachable_weights_certify_most(seed: int) -> None:
    """For probabilities A2 >= A1, A4 >= A3 >= 0."""
    generator = torch.Generator().manual_seed(seed)
    experts, classes = 3, 3
    answers = torch.randn(1, experts, classes, dtype=torch.float64, generator=generator)
    answers[..., 0] += 1.5
    probabilities = answers.softmax(2)
    gaps = probabilities[..., :1] - probabilities
    gaps[..., 0] = math.inf
    constants = torch.rand(experts, classes, dtype=torch.float64, generator=generator) + 0.1
    constants[:, 0] = 0
    router = torch.randn(experts, 2, dtype=torch.float64, generator=generator)
    rho, scores = pairwise_lipschitz(router, "L2"), torch.randn(1, experts, dtype=torch.float64, generator=generator)
    weights, slopes = scores.softmax(1), rho.amax(1) / 4
    margin = (weights[..., None] * gaps.masked_fill(gaps == math.inf, 0)).sum(1)
    margin[:, 0] = math.inf
    one = torch.ones(experts, classes, dtype=torch.float64)
    first = closed_radius(margin, slope_a1(slopes, 2 * one, weights, constants))
    second = closed_radius(margin, slope_a2(slopes, one, weights, constants))
    third = closed_radius(margin, slope_a3(float(rho.max()) / 4, 2 * one[0], weights, constants))
    assert bool((second >= first).all() and (third >= 0).all())
    held = gaps - constants * third[:, None, None] * 0.9999
    # an expert's margin of probabilities is never below -1
    low = soft_low(held.clamp_min(-1), scores, rho, third * 0.9999, torch.zeros(1, dtype=torch.float64))
    assert bool(((low > 0).all(1) | (third == 0)).all())


def test_constants_of_a_linear_router() -> None:
    weights = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm in NORMS:
        rho = pairwise_lipschitz(weights, norm)
        assert torch.equal(rho, rho.T) and bool((rho.diagonal() == 0).all())
        assert bool((rho[:, None] <= rho[:, :, None] + rho[None] + 1e-12).all())


def test_ties_and_slack_count_as_reachable() -> None:
    rho = torch.tensor([[0, 1.0], [1.0, 0]], dtype=torch.float64)
    tied = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    none, some = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.2, dtype=torch.float64)
    assert entry_radii(tied, rho, none).tolist() == [[0, 0]]
    assert entry_radii(tied + torch.tensor([[0.3, 0]]), rho, some)[0].tolist() == pytest.approx([0, 0.1])
    # nothing moves a constant gap, and nothing breaks a constant tie
    assert entry_radii(torch.tensor([[1.0, 0.0]]).double(), 0 * rho, none).tolist() == [[0, math.inf]]
    assert entry_radii(tied, 0 * rho, none).tolist() == [[0, 0]]


def test_many_sets_are_bounded_by_their_worst_member() -> None:
    drawn = _Drawn(3, "L2", experts=10)
    radius = torch.full((4,), 0.05, dtype=torch.float64)
    for index in range(4):
        points = drawn.around(index, 0.05)
        assert bool((drawn.true(points, 5)[:, 1:] >= drawn.low(radius, 5)[index, 1:] - 1e-9).all())
