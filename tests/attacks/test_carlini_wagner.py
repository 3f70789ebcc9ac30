"""Carlini & Wagner's attack against boundaries that are known, and its Adam against torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_samples import Linear, build, images, labels_for
from torch import Tensor

from phalanx.attacks import CarliniWagner, Target
from phalanx.attacks.carlini_wagner import _Adam, _Weight
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel


def linear() -> tuple[Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    model = Linear(weight.tolist())
    x = 0.5 + 0.05 * torch.randn(10, 16, generator=generator, dtype=torch.float64)
    return model, x, model(x).argmax(1), weight[0] - weight[1]


def test_the_least_l2_perturbation_of_a_linear_model() -> None:
    model, x, y, weight = linear()
    exact = (x @ weight).abs() / weight.norm()
    target = Target(model, model, "whole", "margin", x, y)
    attack = CarliniWagner(eps=0.0, norm="L2", steps=200)
    distance = (attack.perturb(target, SampleRng.for_batch(10)).x_adv - x).norm(dim=1)
    assert ((distance >= exact - 1e-9) & (distance <= 1.05 * exact)).all()
    assert replace(attack, eps=float(1.05 * exact.max())).run(model, x, y).broken.all()
    assert not replace(attack, eps=float(0.99 * exact.min())).run(model, x, y).broken.any()


def test_inside_the_cube_it_reaches_what_is_in_reach() -> None:
    model, x, y, weight = linear()
    exact = (x @ weight).abs() / weight.norm(p=1)
    result = CarliniWagner(eps=float(1.02 * exact.median()), steps=50).run(model, x, y)
    assert torch.equal(result.broken, exact <= 1.02 * exact.median()) and 4 < result.broken.sum() < 7


def test_a_pixel_at_the_end_of_its_range_can_leave_it() -> None:
    model = Linear([[1.0, 0.0], [0.0, 1.0]], [-0.4, 0.0])
    x = torch.tensor([[1.0, 0.0], [0.7, 0.1]]).double()
    # they are .42 and .14 away
    result = CarliniWagner(eps=0.5, norm="L2", steps=100).run(model, x, torch.zeros(2, dtype=torch.int64))
    assert result.broken.tolist() == [True, True]


def test_walks_after_the_first_start_elsewhere_and_on_what_stands() -> None:
    model, x = build("callable"), images(30)
    y = labels_for(model, x)
    once, thrice = (CarliniWagner(eps=0.05, steps=5, searches=count).run(model, x, y) for count in (1, 3))
    assert not (once.broken & ~thrice.broken).any()
    assert torch.equal(once.queries[once.broken], thrice.queries[once.broken])
    standing = ~(thrice.broken | once.broken)
    assert standing.any() and (thrice.queries[standing] == 2 + 3 * 6).all()
    # other starts end elsewhere: some of them higher
    assert (thrice.loss[standing] >= once.loss[standing]).all() and (thrice.loss > once.loss)[standing].any()


def test_adam_is_torch_s() -> None:
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.03)
    mine, adam = start.clone(), _Adam.zero(start)
    for step in range(20):
        gradient = (mine * (step + 1)).sin()
        leaf.grad = gradient.clone()
        optimizer.step()
        adam, move = adam.step(gradient)
        mine = mine - 0.03 * move
        torch.testing.assert_close(mine, leaf.detach())


def test_the_search_for_c_by_hand() -> None:
    weight = _Weight.first(torch.zeros(2, 3, dtype=torch.float64))
    seen = [weight.c.tolist()]
    for erred in ([False, True], [True, True], [False, False]):
        weight = weight.next(torch.tensor(erred))
        seen.append(weight.c.tolist())
    first, second = zip(*seen, strict=True)
    assert first == pytest.approx((0.001, 0.01, 0.0055, 0.00775))
    assert second == pytest.approx((0.001, 0.0005, 0.00025, 0.000375))


def test_the_number_of_searches_follows_the_norm() -> None:
    attack = CarliniWagner(steps=10)
    assert attack.within(ThreatModel("L2", 0.5)).searches == 9 and attack.within(ThreatModel("Linf", 0.1)).searches == 1
    assert attack.within(ThreatModel("L2", 0.5)).gradient_steps == 90
    assert replace(attack, searches=4).within(ThreatModel("L2", 0.5)).searches == 4
