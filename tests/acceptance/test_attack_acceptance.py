"""What a sound attack must show on trained models, and what the released attacks show instead.

The networks are small and trained here, in seconds, on real digits: a standard mixture, an adversarially trained one
and the dual model of both.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD, Attack, JointMargin, ReleasedAPGD, ReleasedPGD, RouteSteering
from phalanx.data import Splits, load_data
from phalanx.evaluation import evaluate, protocol
from phalanx.experts import build_expert
from phalanx.rng import SampleRng
from phalanx.routing import DualModel, LinearRouter, MixtureOfExperts, load_balance
from phalanx.threat import ThreatModel

EPS = 3 / 16
PGD_50 = PGD(eps=EPS, steps=50)


@dataclass(frozen=True)
class Trained:
    """Models that see 600 digits in training, and 150 others."""

    standard: MixtureOfExperts
    robust: MixtureOfExperts
    data: Splits
    x: Tensor
    y: Tensor

    @property
    def dual(self) -> DualModel:
        return DualModel(self.standard, self.robust, 0.7).eval()


def _mixture(seed: int) -> MixtureOfExperts:
    torch.manual_seed(seed)
    experts = [build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[32]) for _ in range(4)]
    return MixtureOfExperts(LinearRouter((1, 8, 8), 4), experts)


def _fit(model: MixtureOfExperts, data: Splits, epochs: int, attack: Attack | None = None) -> MixtureOfExperts:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    (everything,) = data.train.batches(len(data.train))
    for epoch in range(epochs):
        for rows in torch.randperm(len(data.train), generator=order).split(128):
            x, y = everything.x[rows], everything.y[rows]
            if attack is not None:
                x = attack(model, x, y, rng=SampleRng(epoch, rows))
            logits, route = model.routed(x)
            loss = F.cross_entropy(logits, y) + 0.5 * load_balance(route)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def trained() -> Trained:
    data = load_data("digits", train_limit=600, test_limit=150)
    (test,) = data.test.batches(150)
    standard = _fit(_mixture(1), data, 25)
    robust = _fit(_mixture(2), data, 40, PGD(eps=EPS, steps=5))
    found = Trained(standard, robust, data, test.x, test.y)
    for model in (standard, robust, found.dual):
        assert (model(test.x).argmax(-1) == test.y).float().mean() > 0.85
    return found


def broken_by(attack: Attack, model: Callable[[Tensor], Tensor], trained: Trained) -> Tensor:
    """(150,) bool; images that are wrong already are broken."""
    result = attack.run(model, trained.x, trained.y)
    return result.broken | result.invalid


def robust_accuracy(attack: Attack, model: Callable[[Tensor], Tensor], trained: Trained) -> float:
    return 1 - float(broken_by(attack, model, trained).float().mean())


# T3 to T6


def test_nothing_stands_in_a_ball_that_holds_other_digits(trained: Trained) -> None:
    for model in (trained.standard, trained.robust, trained.dual):
        assert robust_accuracy(replace(PGD_50, eps=0.5), model, trained) <= 0.01


def test_training_made_a_difference(trained: Trained) -> None:
    standard, robust = (robust_accuracy(PGD_50, model, trained) for model in (trained.standard, trained.robust))
    assert standard < 0.15 and robust > standard + 0.15


def nested(attacks: list[Attack], model: Callable[[Tensor], Tensor], trained: Trained) -> None:
    """Whatever one attack breaks, the next one breaks too; the last breaks more than the first."""
    found = [broken_by(attack, model, trained) for attack in attacks]
    for less, more in itertools.pairwise(found):
        assert not (less & ~more).any()
    assert found[0].sum() < found[-1].sum()


def test_more_steps_break_no_less(trained: Trained) -> None:
    # from the same start, with the same step size, a longer walk begins with the shorter one
    for model in (trained.standard, trained.robust, trained.dual):
        nested([replace(PGD_50, steps=steps) for steps in (1, 3, 10, 50)], model, trained)


def test_more_restarts_break_no_less(trained: Trained) -> None:
    nested([PGD(eps=EPS, steps=5, restarts=restarts) for restarts in (1, 2, 8)], trained.robust, trained)


def test_more_aims_break_no_less(trained: Trained) -> None:
    nested([JointMargin(eps=EPS, steps=10, classes=classes) for classes in (1, 2, 4)], trained.dual, trained)


def test_a_larger_radius_breaks_no_less(trained: Trained) -> None:
    for attack in (PGD_50, RouteSteering(eps=EPS, steps=10)):
        radii = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
        robust = [robust_accuracy(replace(attack, eps=eps), trained.robust, trained) for eps in radii]
        assert robust == sorted(robust, reverse=True) and robust[0] > 0.85


def test_hardly_any_gradient_is_zero(trained: Trained) -> None:
    for model in (trained.standard, trained.robust, trained.dual):
        assert PGD_50.run(model, trained.x, trained.y).zero_gradient.float().mean() < 0.01


@pytest.mark.parametrize("name", ["routing-10", "fgsm,pgd-10x2@robust,steer-5x2"])
def test_the_union_is_no_better_than_any_component(trained: Trained, name: str) -> None:
    threat = ThreatModel("Linf", "3/16")
    tried = protocol(name, threat, halves=True)
    found = evaluate(trained.dual, trained.data.test, tried, threat)
    held = {member.name: 0 for member in tried.members}
    for row in found.rows:
        if row.attack in held:
            held[row.attack] += row.verdict == "held"
    assert set(held) == {member.name for member in tried.members} and min(held.values()) < max(held.values())
    assert found.robust_acc <= min(held.values()) / found.n < found.clean_acc


def test_the_joint_attack_sees_more_of_a_dual_model_than_its_gradient_or_its_halves(trained: Trained) -> None:
    joint = broken_by(JointMargin(eps=EPS), trained.dual, trained).sum()
    for surface in ("whole", "standard", "robust"):
        assert joint > broken_by(replace(PGD_50, surface=surface), trained.dual, trained).sum(), surface


def test_a_dual_model_of_the_robust_half_alone_is_as_robust_as_it(trained: Trained) -> None:
    alone = DualModel(trained.standard, trained.robust, 1.0).eval()
    of_dual, of_half = (robust_accuracy(PGD_50, model, trained) for model in (alone, trained.robust))
    assert abs(of_dual - of_half) <= 0.02


# T11 and T12, and the released bugs


def test_the_start_is_spread_evenly_over_the_ball() -> None:
    threat, x = ThreatModel("Linf", "8/255"), torch.full((200, 3, 8, 8), 0.5, dtype=torch.float64)
    for seed in (0, 1):
        delta = threat.random_start(x, SampleRng.for_batch(200, seed)) - x
        assert delta.abs().max() <= threat.epsilon
        # uniform: standard deviation eps / sqrt(3), over 38400 pixels
        assert abs(float(delta.mean())) < 4 * threat.epsilon / (3 * 38_400) ** 0.5
        assert float((delta.abs() > 0.99 * threat.epsilon).double().mean()) < 0.02


def test_our_first_step_is_no_corner_and_the_released_one_is_for_every_seed(trained: Trained) -> None:
    corner = (trained.x - EPS).clamp_min(0)
    ours, released = (
        [attack(trained.robust, trained.x, trained.y, rng=SampleRng.for_batch(150, seed)) for seed in (0, 1)]
        for attack in (PGD(eps=EPS, steps=1), ReleasedPGD(eps=EPS, steps=1))
    )
    for x_adv in released:
        torch.testing.assert_close(x_adv, corner, rtol=0, atol=1e-6)
    inside = trained.x > EPS
    for x_adv in ours:
        assert ((x_adv - corner).abs()[inside] < 1e-6).float().mean() < 0.4
    assert not torch.equal(*ours)


class Sharp(nn.Module):
    """The same classifier, surer of itself: its logits times a number."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


def test_a_sure_classifier_looks_robust_to_the_released_attacks_alone(trained: Trained) -> None:
    sure = Sharp(trained.standard, 4).eval()
    assert robust_accuracy(PGD_50, sure, trained) < 0.2
    for attack in (ReleasedPGD(eps=EPS), ReleasedAPGD(eps=EPS)):
        found = attack.run(sure, trained.x, trained.y)
        assert 1 - float(found.broken.float().mean()) > 0.4 and found.zero_gradient.float().mean() > 0.3
        # not for want of steps: what is not sure of itself falls
        assert robust_accuracy(attack, trained.standard, trained) < 0.15


def test_the_gradient_does_not_vanish_with_the_batch_size(trained: Trained) -> None:
    sure = Sharp(copy.deepcopy(trained.standard).double(), 4).eval()
    x, attack = trained.x.double(), PGD(eps=EPS, steps=5, early_drop=False)
    rng = SampleRng.for_batch(150)
    whole = attack.run(sure, x, trained.y, rng=rng)
    assert not whole.zero_gradient.any()
    for row in range(0, 150, 30):
        rows = slice(row, row + 1)
        alone = attack.run(sure, x[rows], trained.y[rows], rng=rng[rows])
        torch.testing.assert_close(alone.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "attack",
    [
        PGD_50,
        RouteSteering(eps=EPS, steps=5),
        JointMargin(eps=EPS, steps=3),
        ReleasedPGD(eps=EPS),
        ReleasedAPGD(eps=EPS),
    ],
    ids=lambda attack: type(attack).__name__,
)
@pytest.mark.parametrize("call", ["run", "search"])
def test_an_attack_leaves_batchnorm_and_mode_as_they_were(attack: Attack, call: str) -> None:
    def half(seed: int) -> MixtureOfExperts:
        torch.manual_seed(seed)
        experts = [tiny.noisy_cnn(10, 8, 1) for _ in range(2)]
        return MixtureOfExperts(LinearRouter((1, 8, 8), 2), experts)

    model = DualModel(half(0), half(1), 0.7)
    (batch,) = tiny.digits().test.batches(40)
    model.train()(batch.x)
    # one frozen norm in a model that is being trained
    frozen = model.robust.get_submodule("experts.1.1")
    frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    getattr(attack, call)(model, batch.x, batch.y)
    assert {module for module in model.modules() if not module.training} == {frozen}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
