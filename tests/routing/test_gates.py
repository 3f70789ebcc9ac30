from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.routing import gate

LN3 = math.log(3)


def test_top_two_by_hand() -> None:
    # softmax([0, ln 3]) = [1, 3] / 4
    route = gate(torch.tensor([[0.0, LN3]]), 2)
    assert route.experts.tolist() == [[1, 0]]
    torch.testing.assert_close(route.weights, torch.tensor([[0.75, 0.25]]))
    # two of three: the weights are normalised over the selected ones alone
    route = gate(torch.tensor([[0.0, 5.0, LN3 + 5]]), 2)
    assert route.experts.tolist() == [[2, 1]]
    torch.testing.assert_close(route.weights, torch.tensor([[0.75, 0.25]]))


def test_temperature_divides_the_scores() -> None:
    route = gate(torch.tensor([[0.0, 2 * LN3]]), 2, temperature=2.0)
    torch.testing.assert_close(route.weights, torch.tensor([[0.75, 0.25]]))


def test_top_one_weighs_exactly_one_with_the_gradient_of_the_softmax() -> None:
    scores = torch.tensor([[0.0, LN3]], dtype=torch.float64, requires_grad=True)
    route = gate(scores, 1)
    assert route.experts.tolist() == [[1]] and route.weights.tolist() == [[1.0]]
    (gradient,) = torch.autograd.grad(route.weights.sum(), scores)
    # d p_1 / d s = p_1 (1 - p_1) and -p_1 p_0, with p = [.25, .75]
    torch.testing.assert_close(gradient, torch.tensor([[-0.1875, 0.1875]], dtype=torch.float64))
    (halved,) = torch.autograd.grad(gate(2 * scores, 1, temperature=2.0).weights.sum(), scores)
    torch.testing.assert_close(halved, gradient)


@given(st.lists(st.sampled_from([-50.0, -1.0, 0.0, 0.3, 7.0, 80.0]), min_size=1, max_size=8), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_selection_is_a_stable_sort(scores: list[float], top_k: int) -> None:
    top_k = min(top_k, len(scores))
    route = gate(torch.tensor([scores]), top_k)
    assert route.experts[0].tolist() == sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
    assert float(route.weights.sum()) == pytest.approx(1)
    if top_k == 1:
        assert route.weights.item() == 1


@pytest.mark.parametrize("experts", [2, 5, 8, 40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_go_to_the_lower_index(experts: int, top_k: int) -> None:
    assert gate(torch.zeros(3, experts), top_k).experts.tolist() == [list(range(top_k))] * 3


@pytest.mark.parametrize(("top_k", "experts"), [(6, 4), (0, 4), (-1, 2)])
def test_top_k_out_of_range(top_k: int, experts: int) -> None:
    message = f"top_k must be in 1..num_experts={experts}, got {top_k}; lower top_k or add experts"
    with pytest.raises(ValueError, match=re.escape(message)):
        gate(torch.zeros(1, experts), top_k)
