from __future__ import annotations

import pytest
import torch
from known_answers import FIVE, THREAT, Bright, two_experts
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD
from phalanx.errors import InputError
from phalanx.evaluation import evaluate, protocol, validation

ATTACK = PGD(steps=5).within(THREAT)


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_the_numbers_of_a_known_model(batch_size: int) -> None:
    for model in (Bright(), two_experts()):
        numbers = validation(FIVE, ATTACK, batch_size=batch_size)(model)
        assert numbers == {"n": 5, "accuracy": 4 / 5, "robust_accuracy": 2 / 5}


def test_they_are_the_evaluations_own() -> None:
    model, data = tiny.mixture(seed=3), tiny.digits().val
    # random weights in evaluation mode: some digits are right by chance
    numbers = validation(data, PGD(steps=2, random_start=False).within(THREAT))(model)
    found = evaluate(model, data, protocol("pgd-2", THREAT), THREAT)
    assert (numbers["n"], numbers["accuracy"]) == (found.n, found.clean_acc)


class _Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True).expand(-1, 2) * float("nan")


def test_not_a_number_is_neither_right_nor_robust() -> None:
    # argmax of NaN is 0, and two of the five are of class 0
    assert validation(FIVE, ATTACK)(_Nan()) == {"n": 5, "accuracy": 0.0, "robust_accuracy": 0.0}


def test_every_call_searches_alike_and_leaves_no_trace() -> None:
    model, measure = tiny.mixture().train(), validation(tiny.digits().val, PGD(steps=2, eps="1/16"), seed=4)
    torch.manual_seed(0)
    first = measure(model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert measure(model) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nothing_to_validate_on() -> None:
    with pytest.raises(InputError, match=r"validation split is empty; raise data\.val_fraction"):
        validation(FIVE.select([]), ATTACK)
