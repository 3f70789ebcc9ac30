from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_networks import LogOdds, pixel

import tiny
from phalanx.attacks import FGSM, OBJECTIVES, PGD, RouteSteering
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.data import Batch
from phalanx.methods import TRADES, Loss
from phalanx.methods.base import mean_kl
from phalanx.rng import Rng, SampleRng
from phalanx.routing import MixtureOfExperts, Routed, load_balance
from phalanx.threat import ThreatModel

RNG = Rng(3)


class _Shift(PGD):
    """Finds x + eps."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return super().perturb(target, rng)._replace(x_adv=target.x + self.threat.epsilon)


def _loss(method: TRADES, model: Any, batch: Batch, rng: Rng = RNG) -> Loss:
    (update,) = method.updates(model, {"train": batch}, rng)
    return update.loss()


def _digits() -> Batch:
    return next(tiny.digits().train.batches(16))


# weight 4 ln 3: the clean pixel 1/2 has odds 3**2 = 9, p = (9, 1) / 10; at 1/4 more, odds 27, q = (27, 1) / 28
W = 4 * math.log(3)
CE = math.log(10 / 9)
KL = 0.9 * math.log(0.9 / (27 / 28)) + 0.1 * math.log(0.1 / (1 / 28))


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_the_loss_by_hand(beta: float) -> None:
    method = TRADES(attack=_Shift(eps=0.25, steps=1, objective="kl"), beta=beta)
    loss = _loss(method, MixtureOfExperts(None, [LogOdds(W)]), pixel())
    assert loss.value.item() == pytest.approx(CE + beta * KL)
    assert loss.logs["kl"].item() == pytest.approx(KL) and not loss.logs["kl"].requires_grad
    # the clean image is the one that is classified
    assert loss.logs["accuracy"].item() == 1.0 and loss.logs["adversarial_accuracy"].item() == 1.0


def test_gradient_flows_through_both_branches() -> None:
    expert = LogOdds(W)
    method = TRADES(attack=_Shift(eps=0.25, steps=1, objective="kl"))
    _loss(method, MixtureOfExperts(None, [expert]), pixel()).value.backward()
    # with p = sigmoid(s), q = sigmoid(t): dCE/ds = p - 1, dKL/dt = q - p, dKL/ds = p (1 - p) (s - t); s = W/2, t = 3W/4
    p, q = 0.9, 27 / 28
    expected = (p - 1) / 2 + 6 * ((q - p) * 3 / 4 + p * (1 - p) * (-W / 4) / 2)
    assert expert.weight.grad is not None
    assert expert.weight.grad.item() == pytest.approx(expected)


def test_the_balance_is_the_clean_pass() -> None:
    model, batch = tiny.mixture(3), _digits()
    method = TRADES(attack=PGD(objective="kl", steps=2), balance=0.0).within(tiny.THREAT)
    heavy = TRADES(attack=PGD(objective="kl", steps=2), balance=2.0).within(tiny.THREAT)
    difference = _loss(heavy, model, batch).value - _loss(method, model, batch).value
    torch.testing.assert_close(difference, 2 * load_balance(model.gate(batch.x)))


def test_the_divergence_by_hand() -> None:
    # p = (1, 3) / 4, q = (3, 1) / 4 : 1/4 ln 1/3 + 3/4 ln 3 = ln(3) / 2; the second image does not move
    clean = torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
    attacked = torch.log(torch.tensor([[3.0, 1.0], [5.0, 5.0]])).requires_grad_()
    gain = OBJECTIVES["kl"](Routed(attacked, None), Routed(clean.requires_grad_(), None), torch.tensor([0, 0]))
    torch.testing.assert_close(gain.detach(), torch.tensor([math.log(3) / 2, 0.0]))
    torch.testing.assert_close(mean_kl(clean, attacked), gain.mean())
    gain.sum().backward()
    # q - p; the clean answer is fixed
    torch.testing.assert_close(attacked.grad, torch.tensor([[0.5, -0.5], [0.0, 0.0]]))
    assert clean.grad is None


def test_the_divergence_is_not_symmetric() -> None:
    p, q = torch.log(torch.tensor([[1.0, 1.0]])), torch.log(torch.tensor([[9.0, 1.0]]))
    # (1, 1) / 2 against (9, 1) / 10: ln(5 / 9) / 2 + ln(5) / 2
    assert mean_kl(p, q).item() == pytest.approx(math.log(25 / 9) / 2)
    assert mean_kl(q, p).item() == pytest.approx(0.9 * math.log(9 / 5) - 0.1 * math.log(5))


def test_the_divergence_survives_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4]]).requires_grad_()
    value = mean_kl(logits, -logits)
    value.backward()
    assert value.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_the_kl_has_no_gradient_at_the_clean_image() -> None:
    model = tiny.mixture().double().eval()
    x = _digits().x.double()
    clean = model.routed(x)
    target = Target(model, model, "whole", "kl", x, _digits().y, clean=clean)
    gradient, elsewhere = target.climb(x).gradient, target.climb((x + 0.01).clamp(0, 1)).gradient
    assert gradient is not None and elsewhere is not None
    assert gradient.abs().max() < 1e-12 and elsewhere.abs().max() > 1e-4


def test_the_attack_climbs_the_kl() -> None:
    model, batch = tiny.mixture().eval(), _digits()
    clean = model(batch.x).detach()

    def divergence(objective: str) -> Tensor:
        attack = PGD(eps="3/16", steps=10, objective=objective)
        return mean_kl(clean, model(attack(model, batch.x, batch.y, rng=RNG.samples(batch.ids)))).detach()

    assert divergence("kl") > divergence("cross_entropy") > 0


def test_the_same_seed_gives_the_same_loss() -> None:
    method = TRADES(attack=PGD(objective="kl", steps=2)).within(tiny.THREAT)
    first, again, other = (_loss(method, tiny.mixture(), _digits(), rng).value for rng in (RNG, RNG, Rng(4)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_loss_can_be_taken_again() -> None:
    model = tiny.mixture()
    method = TRADES(attack=PGD(objective="kl", steps=2)).within(tiny.THREAT)
    (update,) = method.updates(model, {"train": _digits()}, RNG)
    before = update.loss().value
    with torch.no_grad():
        model.experts[0][-1].weight.mul_(2)
    assert update.loss().value != before
    assert 0 <= update.logs["zero_gradient"] <= 1


def test_the_threat_fills_what_was_left_open() -> None:
    method = TRADES(beta=2.0).within(ThreatModel("L2", "1/2"))
    assert (method.attack.norm, str(method.attack.eps), method.beta) == ("L2", "1/2", 2.0)
    assert method.attack.objective == "kl"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TRADES(beta=-1), "beta must be at least 0, got -1"),
        (lambda: TRADES(balance=-1), "balance must be at least 0, got -1"),
        (lambda: TRADES(attack=PGD()), "attack.objective must be 'kl', .*, got 'cross_entropy'; set it, or use"),
        (lambda: TRADES(attack=RouteSteering()), "attack.objective must be 'kl', .*, got 'steer'"),
        (lambda: TRADES(attack=FGSM(objective="kl")), "start at random, got fgsm .*; use pgd with random_start"),
        (lambda: TRADES(attack=PGD(objective="kl", random_start=False)), "start at random, got pgd .*"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
