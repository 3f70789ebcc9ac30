"""CE1 to CE12: where the printed theorems claim more than is true, and what is sound instead."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from phalanx.certification import entry_radii, mixed_low, printed_theorem_5_4, printed_theorem_5_5, soft_low, topn_low
from reference.closed_forms import closed_radius, slope_a1, slope_a2, slope_a3, top1_radius


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_Y = torch.tensor([0])
_NONE = _t(0.0)


def _against(margin: float) -> Tensor:
    """Margins (1, 2) of class 0 against one other."""
    return torch.tensor([[math.inf, margin]], dtype=torch.float64)


def test_ce1_and_ce11_both_classes_move() -> None:
    """Two probability experts of slopes 1 and 1/2, averaged; f^k falls as f^y rises."""
    weights, slopes = _t(0.5, 0.5)[None], _t(1.0, 0.5)
    margin = 0.375
    printed = printed_theorem_5_4(_t(margin), weights, _t(0, 0), _t(1, 1), slopes)
    assert float(printed) == pytest.approx(0.5)
    flips = 0.25
    assert margin - 0.5 * (2 * 1 + 2 * 0.5) * flips == 0
    pair = torch.stack([torch.zeros(2), 2 * slopes], 1)
    ours = closed_radius(_against(margin), slope_a2(_t(0, 0), torch.zeros(2, 2).double(), weights, pair))
    assert float(ours) == pytest.approx(flips)


def test_ce2_an_uncontrolled_class() -> None:
    weights = _t(1.0)[None]
    assert float(printed_theorem_5_4(_t(0.15), weights, _t(0), _t(1), _t(0))) == math.inf
    ours = closed_radius(_against(0.15), slope_a2(_t(0), torch.zeros(1, 2).double(), weights, _t(0, 1)[None]))
    assert float(ours) == pytest.approx(0.15)


def test_ce3_a_bound_of_the_true_class_alone() -> None:
    """A linear gate (1 - t, t) between constant experts (.28, .24, .24, .24) and (0, 1, 0, 0)."""
    printed = printed_theorem_5_4(_t(0.04), _t(1, 0)[None], _t(1, 1), _t(0.28, 0), _t(0, 0))
    flips = 0.04 / 1.04
    assert float(printed) == pytest.approx(1 / 7) and float(printed) > 3 * flips
    ranges = torch.tensor([[0, 0.04], [0, 1.0]], dtype=torch.float64)
    ours = closed_radius(_against(0.04), slope_a2(_t(1, 1), ranges, _t(1, 0)[None], torch.zeros(2, 2).double()))
    assert float(ours) == pytest.approx(flips)


def test_ce3b_with_a_softmax_router() -> None:
    """Constant experts (.95, 0, .05) and (0, 1, 0), weights softmax(4t + c, 0), whose slope is at most 1."""
    start = math.log(0.525 / 0.475)
    margin = 0.525 * 0.95 - 0.475
    printed = float(printed_theorem_5_4(_t(margin), _t(0.525, 0.475)[None], _t(1, 1), _t(0.95, 0), _t(0, 0)))
    flips = (start - math.log(1 / 0.95)) / 4
    assert printed > 1.9 * flips
    gaps = torch.tensor([[[math.inf, 0.95], [math.inf, -1.0]]], dtype=torch.float64)
    rho = torch.tensor([[0, 4.0], [4.0, 0]], dtype=torch.float64)

    def low(radius: float) -> float:
        return float(soft_low(gaps, _t(start, 0)[None], rho, _t(radius), _NONE)[0, 1])

    assert low(0.999 * flips) > 0 >= low(1.001 * flips)


def test_ce4_a_switch_is_not_seen() -> None:
    """Top-1 between constant experts, the boundary at 0.1: r = 0 and L = 0 in each cell."""
    weights = _t(1, 0)[None]
    assert float(printed_theorem_5_4(_t(1.0), weights, _t(0, 0), _t(1, 1), _t(0, 0))) == math.inf
    assert float(printed_theorem_5_5(_t(1.0), weights, _t(0, 0), _t(0, 0), 1.0)) == math.inf
    rho = torch.tensor([[0, 1.0], [1.0, 0]], dtype=torch.float64)
    entries = entry_radii(_t(0.1, 0)[None], rho, _NONE)
    assert entries[0].tolist() == pytest.approx([0, 0.1])
    gaps = torch.tensor([[[math.inf, 1.0], [math.inf, -1.0]]], dtype=torch.float64)
    assert float(top1_radius(gaps, torch.zeros(1, 2, 2).double(), entries)) == pytest.approx(0.1)


def test_ce5_a_bound_of_logits_that_are_not_positive() -> None:
    """f^y <= 0, so M = 0 bounds it from above; the gate is (1 - t, t), the experts' margins 1 and -4."""
    assert float(printed_theorem_5_4(_t(1.0), _t(1, 0)[None], _t(1, 1), _t(0, 0), _t(0, 0))) == math.inf
    ranges = torch.tensor([[0, 1.0], [0, 4.0]], dtype=torch.float64)
    ours = closed_radius(_against(1.0), slope_a2(_t(1, 1), ranges, _t(1, 0)[None], torch.zeros(2, 2).double()))
    assert float(ours) == pytest.approx(0.2) and 1 - 5 * 0.2 == 0


def test_ce6_logits_of_size_ten() -> None:
    """Theorem 5.5's 2 r is right for probabilities only; margins 10 and -10, flipped at t = 1/2."""
    assert float(printed_theorem_5_5(_t(10.0), _t(1, 0)[None], _t(1, 1), _t(0, 0), 1.0)) == pytest.approx(2.5)
    ranges = torch.tensor([[0, 10.0], [0, 10.0]], dtype=torch.float64)
    ours = closed_radius(_against(10.0), slope_a2(_t(1, 1), ranges, _t(1, 0)[None], torch.zeros(2, 2).double()))
    assert float(ours) == pytest.approx(0.5)


def test_ce7_a_standard_half_of_logits_has_no_worst_case() -> None:
    """F_R's margin is 1 everywhere, F_S's falls as -50 t: flipped at 0.18 for alpha = 0.9."""
    assert float(printed_theorem_5_5(_t(1.0), _t(1)[None], _t(0), _t(0), 0.9)) == math.inf
    for eps, certified in ((0.179, True), (0.181, False)):
        low = mixed_low([_against(-50 * eps), _against(1.0)], (0.1, 0.9), _Y, "logits").sum(0)
        assert bool(low[0, 1] > 0) == certified
    nothing = mixed_low([_against(-math.inf), _against(1.0)], (0.1, 0.9), _Y, "logits").sum(0)
    assert nothing[0, 1] == -math.inf


def test_ce8_the_ball_is_open() -> None:
    """Exact: at the radius of Theorem 5.5 there may be a tie, which argmax may give to the other class."""
    alpha, margin, slope = Fraction(2, 3), Fraction(3, 4), Fraction(2)
    radius = (alpha * margin + alpha - 1) / (alpha * slope)
    assert radius == Fraction(1, 8)
    assert (1 - alpha) * -1 + alpha * (margin - slope * radius) == 0
    printed = printed_theorem_5_5(_t(0.75), _t(1)[None], _t(0), _t(2), 2 / 3)
    assert float(printed) == pytest.approx(1 / 8)


def test_ce9_no_radius_is_negative() -> None:
    assert float(printed_theorem_5_5(_t(0.1), _t(1)[None], _t(0), _t(1), 0.6)) == 0
    assert float(printed_theorem_5_4(_t(-1.0), _t(1)[None], _t(0), _t(1), _t(0))) == 0
    assert float(closed_radius(_against(-1.0), _t(0, 0)[None])) == 0
    assert float(closed_radius(_against(1.0), _t(0, 0)[None])) == math.inf


def test_ce10_a_third_expert_enters_the_best_two() -> None:
    """Margins 1, 1 and -100, the third 0.05 away from the second place."""
    gaps = torch.tensor([[[math.inf, 1.0], [math.inf, 1.0], [math.inf, -100.0]]], dtype=torch.float64)
    scores, rho = _t(1.0, 0.05, 0.0)[None], torch.ones(3, 3).double() - torch.eye(3).double()
    inside = printed_theorem_5_4(_t(1.0), scores.softmax(1), _t(0.25, 0.25, 0), _t(1, 1, 1), _t(0, 0, 0))
    assert float(inside) > 1
    for eps, certified in ((0.0499, True), (0.0501, False)):
        assert bool(topn_low(gaps, scores, rho, _t(eps), _NONE, 2)[0, 1] > 0) == certified


def test_ce12_under_the_literal_hypotheses() -> None:
    """Smooth: sigmoid experts of slope 1 in both classes, a softmax router that hardly moves."""
    start = 0.2
    probability = 1 / (1 + math.exp(-start))
    margin, weights = 2 * probability - 1, _t(0.5, 0.5)[None]
    router, slopes = _t(0.05, 0.05), _t(1, 1)
    printed = float(printed_theorem_5_4(_t(margin), weights, router, _t(probability, probability), slopes))
    # both experts fall together along 4 (x - x'), so that the router has no say
    flips = start / 4
    assert printed > 1.8 * flips
    spread = torch.tensor([[0, 0.5], [0, 0.5]], dtype=torch.float64) * 0
    pairs = torch.tensor([[0, 2.0], [0, 2.0]], dtype=torch.float64)
    for slope in (
        slope_a1(router, torch.tensor([[0, 1.0], [0, 1.0]]).double(), weights, pairs),
        slope_a2(router, spread + margin, weights, pairs),
        slope_a3(0.05, _t(0, 2.0), weights, pairs),
    ):
        assert 0.8 * flips < float(closed_radius(_against(margin), slope)) < flips


def test_the_two_theorems_contradict_each_other() -> None:
    """For the same classifier (alpha = 1, M = 1) the one is twice the other."""
    weights, router, slopes = _t(0.3, 0.7)[None], _t(0.4, 0.6), _t(1, 1)
    first = printed_theorem_5_4(_t(0.5), weights, router, _t(1, 1), slopes)
    second = printed_theorem_5_5(_t(0.5), weights, router, 2 * slopes, 1.0)
    assert float(first) == pytest.approx(2 * float(second))


def test_theorem_5_5_wants_its_alpha() -> None:
    for alpha in (0.49, 1.01, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            printed_theorem_5_5(_t(1.0), _t(1)[None], _t(0), _t(1), alpha)
