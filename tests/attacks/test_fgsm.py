from __future__ import annotations

import math

import pytest
import torch
from attack_samples import Linear

from phalanx.attacks import FGSM, FGSMRS, PGD
from phalanx.rng import SampleRng

# logits [2 a - b, 0] on two pixels (a, b): the gradient for label 0 points along -(2, -1)
MODEL = Linear([[2.0, -1.0], [0.0, 0.0]])
X = torch.tensor([[0.5, 0.6]], dtype=torch.float64)  # logit .4
Y = torch.tensor([0])


@pytest.mark.parametrize(
    ("norm", "eps", "expected", "logit"),
    [
        ("Linf", 0.1, (0.4, 0.7), 0.1),  # .4 - .1 * (2 + 1)
        ("Linf", 0.15, (0.35, 0.75), -0.05),
        ("L2", 0.1, (0.5 - 0.2 / math.sqrt(5), 0.6 + 0.1 / math.sqrt(5)), 0.4 - 0.1 * math.sqrt(5)),
        ("L1", 0.1, (0.4, 0.6), 0.2),  # all of it on the steeper pixel
        ("L1", 0.25, (0.25, 0.6), -0.1),
    ],
)
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_by_hand(norm, eps: float, expected: tuple[float, float], logit: float, objective: str) -> None:
    result = FGSM(eps=eps, norm=norm, objective=objective).run(MODEL, X, Y)
    torch.testing.assert_close(result.x_adv, torch.tensor([expected], dtype=torch.float64))
    assert float(MODEL(result.x_adv)[0, 0].detach()) == pytest.approx(logit)
    assert result.broken.tolist() == [logit < 0] and result.predicted.tolist() == [int(logit < 0)]
    # the clean verdict, one gradient, the attacked verdict
    assert result.queries.tolist() == [3] and result.first_success.tolist() == [1 if logit < 0 else -1]


def test_pixels_stop_at_the_edge() -> None:
    x_adv = FGSM(eps=0.8)(MODEL, X, Y)
    assert x_adv.tolist() == [[0.0, 1.0]]


def test_targeted_goes_down_the_loss_of_the_target() -> None:
    # towards class 0 from class 1: along +(2, -1)
    x, y = torch.tensor([[0.25, 0.75]], dtype=torch.float64), torch.tensor([1])
    result = FGSM(eps=0.125, targeted=True).run(MODEL, x, y, target=torch.tensor([0]))
    assert result.x_adv.tolist() == [[0.375, 0.625]] and result.predicted.tolist() == [0]


def test_no_randomness() -> None:
    torch.manual_seed(0)
    first = FGSM(eps=0.1)(MODEL, X, Y)
    assert torch.equal(first, FGSM(eps=0.1)(MODEL, X, Y)) and FGSM().gradient_steps == 1


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("step", [0.5, 1.25])
def test_from_a_random_start_it_is_one_step_of_pgd(norm, step: float) -> None:
    rng, eps = SampleRng.for_batch(1, seed=3), 0.25
    x_adv = FGSMRS(eps=eps, norm=norm, step=step)(MODEL, X, Y, rng=rng)
    start = FGSMRS(eps=eps, norm=norm).threat.random_start(X, rng)
    (gradient,) = torch.autograd.grad(-MODEL(start.requires_grad_()).log_softmax(-1)[0, 0], start)
    expected = FGSMRS(eps=eps, norm=norm).threat.step(start.detach(), gradient, step * eps, X)
    torch.testing.assert_close(x_adv, expected)
    pgd = PGD(eps=eps, norm=norm, steps=1, step_size=step * eps, keep="last", early_drop=False)
    assert torch.equal(x_adv, pgd(MODEL, X, Y, rng=rng))


def test_the_step_is_measured_in_radii() -> None:
    # two radii reach the far corner from anywhere: logit .4 is pushed along -(2, -1)
    x_adv = FGSMRS(eps=0.125, step=2)(MODEL, X, Y)
    torch.testing.assert_close(x_adv, torch.tensor([[0.375, 0.725]], dtype=torch.float64))
    assert FGSMRS().gradient_steps == 1


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_must_be_positive(step: float) -> None:
    with pytest.raises(ValueError, match=r"step must be positive, in multiples of eps, got .*; the paper's is 1\.25"):
        FGSMRS(step=step)
