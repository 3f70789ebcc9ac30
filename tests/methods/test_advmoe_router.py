"""AdvMoE's router loss and what is logged of it, on scores where the arithmetic is known."""

# E experts

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phalanx.methods.advmoe_router import RouterLoss, with_scores
from phalanx.routing import Route, load_balance


def _route(*probabilities: tuple[float, ...]) -> Route:
    """One image for each; its best expert answers."""
    scores = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    return Route(scores, scores.argmax(-1, keepdim=True), torch.ones(len(probabilities), 1, dtype=torch.float64))


# labels 4, 5, 7 of two experts: experts 0, 1, 1; the last image is sent to expert 0
Y = torch.tensor([4, 5, 7])
CLEAN = ((0.75, 0.25), (0.5, 0.5), (0.75, 0.25))
ADV = ((0.25, 0.75), (0.5, 0.5), (0.75, 0.25))
# ties go to the lower expert: images 0 and 1 and 2 all go to expert 0, and image 0 to expert 1 once attacked
LABELS = (math.log(4 / 3) + math.log(2) + math.log(4)) / 3
KL = (math.log(3) / 2) / 3


def test_the_loss_by_hand() -> None:
    clean, adv = _route(*CLEAN), _route(*ADV)
    loss = RouterLoss(2.0, 5.0, 0.0)(clean, adv, Y)
    assert loss.value.item() == pytest.approx(2 * LABELS + 5 * KL)
    assert loss.logs["kl"].item() == pytest.approx(KL)
    balanced = RouterLoss(2.0, 5.0, 3.0)(clean, adv, Y)
    torch.testing.assert_close(balanced.value - loss.value, 3 * load_balance(clean))


def test_gradient_flows_through_both_branches() -> None:
    clean, adv = _route(*CLEAN), _route(*ADV)
    RouterLoss(0.0, 1.0, 0.0)(clean, adv, Y).value.backward()
    for route in (clean, adv):
        assert route.scores.grad is not None
        # only the first image's scores differ
        assert [bool(row.abs().max() > 1e-9) for row in route.scores.grad] == [True, False, False]


def test_what_is_logged() -> None:
    logs = RouterLoss(1.0, 1.0, 0.0)(_route(*CLEAN), _route(*ADV), Y).logs
    assert logs["route_accuracy"].item() == pytest.approx(1 / 3)
    assert logs["adversarial_route_accuracy"].item() == pytest.approx(0)
    assert logs["route_flips"].item() == pytest.approx(1 / 3)
    assert logs["score_gap"].item() == pytest.approx(math.log(3))
    assert logs["load"].tolist() == [1.0, 0.0]
    assert not any(log.requires_grad for log in logs.values())


def test_labels_are_those_of_each_gate_and_terms_are_means_over_gates() -> None:
    three = _route((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), (0.2, 0.3, 0.5))
    clean, adv = (_route(*CLEAN), three), (_route(*ADV), three)
    loss = RouterLoss(2.0, 5.0, 0.0)(clean, adv, Y)
    # 4, 5, 7 of three experts: 1, 2, 1
    others = -(2 * math.log(0.3) + math.log(0.5)) / 3
    assert loss.value.item() == pytest.approx(2 * (LABELS + others) / 2 + 5 * KL / 2)
    assert loss.logs["route_accuracy"].item() == pytest.approx(1 / 3)
    assert loss.logs["gate-1.load"].tolist() == [0.0, 0.0, 1.0] and loss.logs["gate-0.load"].tolist() == [1.0, 0.0]
    assert "load" not in loss.logs


def test_scores_of_another_tree_under_its_own_decisions() -> None:
    decided, scored = (_route(*CLEAN), _route(*ADV)), (_route(*ADV), _route(*ADV))
    tree = with_scores(decided, scored)
    assert isinstance(tree, tuple)
    for leaf, own, other in zip(tree, decided, scored, strict=True):
        assert isinstance(leaf, Route)
        parts: list[tuple[Tensor, Tensor]] = [(leaf.experts, own.experts), (leaf.weights, own.weights)]
        assert all(torch.equal(*pair) for pair in [*parts, (leaf.scores, other.scores)])
