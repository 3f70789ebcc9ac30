"""The gate that knows the label: on experts whose every answer can be worked out by hand, and beside real gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from known_answers import THREAT, Bright, images
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import OracleResult, oracle_accuracy
from phalanx.routing import DualModel, LinearRouter, MixtureOfExperts, with_gate

ATTACK = PGD(steps=20, objective="margin").within(THREAT)
"""Two grey levels a pixel: four on the sum of two."""


class Answer(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


def mixture(*experts: nn.Module) -> MixtureOfExperts:
    return MixtureOfExperts(LinearRouter((1, 1, 2), len(experts)) if len(experts) > 1 else None, experts)


def accuracy_of_gate(model: nn.Module, data: ImageSet, attack: Any) -> tuple[float, float]:
    (batch,) = data.batches(10**6)
    result = attack.run(model, batch.x, batch.y)
    return float((result.clean_predicted == batch.y).float().mean()), float((~result.broken).float().mean())


def test_one_expert_that_stands_is_enough() -> None:
    # bright images are held by the first down to 13, dark ones by the second up to 19
    data = images(((12, 12), 1), ((9, 9), 1), ((8, 8), 1), ((8, 8), 0), ((7, 7), 0), ((5, 6), 1), ((10, 10), 0))
    # 24 and 18 are held as class 1, 14 as class 0; 16 falls as either, taken to 12 and 20; 11 and 20 are wrong already
    assert oracle_accuracy(mixture(Bright(12.5), Bright(19.5)), data, ATTACK) == OracleResult(7, 5 / 7, 3 / 7)


def test_experts_must_err_at_one_common_image() -> None:
    # each can be broken, at opposite ends of the ball, and so never both
    class Window(nn.Module):
        """Class 1 wherever the first pixel is on this side of the middle."""

        def __init__(self, side: int) -> None:
            super().__init__()
            self.side = nn.Parameter(torch.tensor(float(side)))

        def forward(self, x: Tensor) -> Tensor:
            lead = self.side * (16 * x.flatten(1)[:, 0] - 8) + 1
            return torch.stack([-lead, lead], 1)

    pair = mixture(Window(1), Window(-1))
    data = images(((8, 8), 1))
    for expert in pair.experts:
        assert accuracy_of_gate(MixtureOfExperts(None, [expert]), data, ATTACK) == (1.0, 0.0)
    assert oracle_accuracy(pair, data, ATTACK) == OracleResult(1, 1.0, 1.0)
    # the other label: neither says 0 in the middle, and either can be held to it at an end
    assert oracle_accuracy(pair, images(((8, 8), 0)), ATTACK) == OracleResult(1, 0.0, 0.0)


def test_two_experts_that_fall_together_are_broken() -> None:
    data = images(((9, 9), 1), ((12, 12), 1), ((7, 7), 0))
    assert oracle_accuracy(mixture(Bright(16.0), Bright(17.0)), data, ATTACK) == OracleResult(3, 1.0, 1 / 3)


@pytest.mark.parametrize("batch_size", [3, 128])
def test_no_gate_that_picks_one_expert_does_better(batch_size: int) -> None:
    torch.manual_seed(0)
    model, data = tiny.mixture(3), tiny.digits().train
    attack = PGD(eps="1/16", steps=10, objective="margin")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    (batch,) = data.batches(10**6)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    found = oracle_accuracy(model, data, attack, batch_size=batch_size)
    gates = [model, *(with_gate(model, "random", seed=seed) for seed in range(2))]
    gates += [MixtureOfExperts(None, [expert]) for expert in model.experts]
    numbers = [accuracy_of_gate(gate, data, attack) for gate in gates]
    assert all(found.clean >= clean and found.robust >= robust for clean, robust in numbers)
    assert 0 < found.robust < found.clean <= 1 and found.robust > numbers[0][1]


def test_of_one_expert_it_is_that_expert() -> None:
    model, data = tiny.mixture(1), tiny.digits().val
    attack = PGD(eps="1/64", steps=3, objective="margin")
    (batch,) = data.batches(99)
    result = attack.run(model, batch.x, batch.y)
    correct = int((result.clean_predicted == batch.y).sum())
    assert oracle_accuracy(model, data, attack) == OracleResult(30, correct / 30, int((~result.broken).sum()) / 30)


def test_a_tie_that_the_label_wins_is_right() -> None:
    # of two equal logits the lower class is the answer: the first expert says 0, the second 1, both with a lead of 0
    pair = mixture(Answer(1, 1, 0), Answer(0, 1, 1))
    assert oracle_accuracy(pair, images(((8, 8), 1)), ATTACK).clean == 1
    assert oracle_accuracy(pair, images(((8, 8), 2)), ATTACK).clean == 0


def test_non_finite_experts_are_passed_over_and_alone_never_right() -> None:
    sick = Answer(math.nan, 1)
    data = images(((8, 8), 1), ((8, 8), 0))
    assert oracle_accuracy(mixture(sick, Answer(0, 1)), data, ATTACK) == OracleResult(2, 0.5, 0.5)
    assert oracle_accuracy(mixture(sick, Answer(math.inf, 0)), data, ATTACK) == OracleResult(2, 0.0, 0.0)


def test_the_mixture_is_left_as_it_was() -> None:
    model = tiny.mixture(2).train()
    model.experts[1].eval()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    first = oracle_accuracy(model, tiny.digits().val, PGD(eps="1/64", steps=2), seed=1)
    assert first == oracle_accuracy(model, tiny.digits().val, PGD(eps="1/64", steps=2), seed=1, batch_size=4)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_mistakes() -> None:
    model, data = mixture(Bright(), Bright(17.0)), images(((8, 8), 1))
    dual = DualModel(mixture(Bright()), mixture(Bright()), 0.7)
    with pytest.raises(InputError, match="chooses among a mixture's experts, got a DualModel"):
        oracle_accuracy(dual, data, ATTACK)
    with pytest.raises(InputError, match="has no parts to attack, got surface 'expert-0'; use 'whole'"):
        oracle_accuracy(model, data, PGD(eps=0.1, surface="expert-0"))
    with pytest.raises(InputError, match="there are no images to ask the oracle about; give some"):
        oracle_accuracy(model, data.select([]), ATTACK)
    with pytest.raises(InputError, match=r"labels must be in 0\.\.1, the experts' classes, got 5; use the data"):
        oracle_accuracy(model, images(((8, 8), 5)), ATTACK)
