from __future__ import annotations

import math

import pytest
import torch
from routing_samples import Waits, images
from torch import nn

from phalanx.routing import LinearRouter, dense, gate, gate_entropy, load_balance, load_per_expert
from phalanx.routing.stats import assignment_counts
from reference.mixture import entropy

LN3 = math.log(3)


def test_load_by_hand() -> None:
    # rows prefer experts 0, 0, 2: of three assignments 2, 0, 1
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    assert assignment_counts(gate(scores, 1).experts, 3).tolist() == [2, 0, 1]
    torch.testing.assert_close(load_per_expert(gate(scores, 1))[0], torch.tensor([2.0, 0.0, 1.0]) / 3)
    # with two of three: pairs (0, 2), (0, 1), (2, 1)
    one, two = load_per_expert((gate(scores, 2), gate(scores, 1)))
    torch.testing.assert_close(one, torch.tensor([2.0, 2.0, 2.0]) / 6)
    torch.testing.assert_close(two, torch.tensor([2.0, 0.0, 1.0]) / 3)


def test_load_balance_by_hand() -> None:
    # probabilities [.25, .75] twice and [.75, .25] once: shares [1/3, 2/3], mean probabilities [5/12, 7/12]
    scores = torch.tensor([[0.0, LN3], [0.0, LN3], [LN3, 0.0]], dtype=torch.float64)
    expected = 2 * (1 / 3 * 5 / 12 + 2 / 3 * 7 / 12)  # 19/18
    assert float(load_balance(gate(scores, 1))) == pytest.approx(expected)
    # averaged over the leaves; a dense leaf has equal shares, hence exactly 1
    assert float(load_balance((gate(scores, 1), dense(gate(scores, 1))))) == pytest.approx((expected + 1) / 2)


def test_collapse_costs_the_number_of_experts() -> None:
    assert float(load_balance(gate(torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 5), 1))) == pytest.approx(4)


def test_gradient_by_hand() -> None:
    # L = E sum_e f_e mean_b p_be with f constant: dL/ds_0 = 2 (f_0 - f_1) p_0 p_1 / B = 2 * (-1) * 3/16 for B = 1
    scores = torch.tensor([[0.0, LN3]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(load_balance(gate(scores, 1)), scores)
    torch.testing.assert_close(gradient, torch.tensor([[-0.375, 0.375]], dtype=torch.float64))


def test_gradient_is_finite_at_perfect_balance() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = load_balance(gate(scores, 1))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(1) and gradient.isfinite().all()


def test_gradient_is_finite_for_a_router_of_zeros() -> None:
    router = LinearRouter((1, 4, 4), 3)
    nn.init.zeros_(router[2].weight)
    nn.init.zeros_(router[2].bias)
    loss = load_balance(gate(router(images(6).float()), 1))
    loss.backward()
    # ties send all to expert 0: 3 * (1 * 1/3), and the gradient drains it
    assert loss.item() == pytest.approx(1)
    assert router[2].bias.grad.isfinite().all() and router[2].bias.grad[0] > 0 > router[2].bias.grad[1]


def test_entropy_by_hand() -> None:
    scores = torch.tensor([[0.0, LN3], [0.0, 0.0], [0.0, 500.0]])
    expected = torch.tensor([entropy([0.25, 0.75]), math.log(2), 0.0])
    torch.testing.assert_close(gate_entropy(gate(scores, 1)), expected)
    torch.testing.assert_close(
        gate_entropy((gate(scores, 1), gate(torch.zeros(3, 4), 1))), (expected + math.log(4)) / 2
    )


def test_training_with_the_loss_never_waits_for_the_device() -> None:
    with Waits() as seen:
        load_balance(gate(torch.zeros(3, 4), 1))
    assert not seen.calls
