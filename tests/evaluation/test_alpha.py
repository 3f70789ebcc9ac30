"""The weight of the robust half, on a model whose margins are known in advance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD, RouteSteering
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import AlphaChoice, pick_alpha
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", "2/16")
ATTACK = PGD(steps=5, objective="margin").within(THREAT)


class Pixel(nn.Module):
    """Class 1 above 8 sixteenths, with p_1 = sigmoid of the sixteenths above."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        half = (16 * x.flatten(1)[:, 0] - self.middle) / 2
        return torch.stack([-half, half], 1)


def images(levels: list[int], labels: list[int] | None = None) -> ImageSet:
    truth = [int(level > 8) for level in levels] if labels is None else labels
    pixels = np.array(levels, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(pixels, np.array(truth, dtype=np.int64), np.arange(len(levels)), 16)


def margin(above: float) -> float:
    """p_y - p_other = 2 sigmoid(a) - 1 = tanh(a / 2)."""
    return math.tanh(above / 2)


@pytest.mark.parametrize("batch_size", [2, 128])
@pytest.mark.parametrize(("keep", "rank"), [(1, 0), (0.985, 0), (0.75, 1), (0.5, 2), (0.51, 1), (0.2, 3)])
def test_known_margins(keep: float, rank: int, batch_size: int) -> None:
    # two sixteenths closer under attack: 9 falls, 14, 12, 3 and 11 stand with 4, 2, 3 and 1 to spare; 5 is wrong
    data = images([9, 14, 12, 3, 11, 5], [1, 1, 1, 0, 1, 1])
    found = pick_alpha(Pixel(), data, ATTACK, keep=keep, batch_size=batch_size)
    expected = [margin(1), margin(2), margin(3), margin(4)][rank]
    assert found == AlphaChoice(pytest.approx(1 / (1 + expected), abs=1e-6), pytest.approx(expected, abs=1e-6), 4)


def test_decimals_mean_what_they_say() -> None:
    # (1 - 0.9) * 10 is .9999999999999998 in floating point: a tenth of ten is one
    data = images([11] + [16] * 9)
    assert pick_alpha(Pixel(), data, ATTACK, keep=0.9).quantile == pytest.approx(margin(6), abs=1e-6)
    assert pick_alpha(Pixel(), data, ATTACK, keep=0.91).quantile == pytest.approx(margin(1), abs=1e-6)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 16]), min_size=1, max_size=30), st.data())
def test_that_share_is_kept_whatever_the_standard_half_says(levels: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.sampled_from([0.3, 0.5, 0.8, 0.985, 1.0]))
    validation, robust = images(levels), Pixel().double()
    attack = FGSM(objective="margin").within(THREAT)
    choice = pick_alpha(robust, validation, attack, keep=keep)
    assert 0.5 <= choice.alpha <= 1 and choice.n == len(levels)

    class Adversary(nn.Module):
        """Sure of the wrong class at every image."""

        def forward(self, x: Tensor) -> Tensor:
            return -1000 * robust(x).detach()

    # at q itself it is a tie: a hair more than alpha decides it
    model = DualModel(MixtureOfExperts(None, [Adversary()]), MixtureOfExperts(None, [robust]), choice.alpha + 1e-6)
    (batch,) = validation.batches(99)
    x_adv = attack.run(robust, batch.x, batch.y).x_adv
    held = int((model(x_adv).argmax(-1) == batch.y).sum())
    assert held >= math.ceil(keep * len(levels) - 1e-9)


def test_the_worse_of_clean_and_attacked_counts() -> None:
    # a search that cannot move leaves the clean image
    still = replace(ATTACK, eps=0)
    assert pick_alpha(Pixel(), images([12, 3]), still).quantile == pytest.approx(margin(4), abs=1e-6)

    class Away(PGD):
        """Goes to the brightest pixel of the ball, whatever the label."""

        def perturb(self, target, rng):
            return super().perturb(target, rng)._replace(x_adv=torch.ones_like(target.x))

    away = Away(steps=1, objective="margin").within(THREAT)
    # 12 gets safer by it and counts as it was; 3 becomes 5
    assert pick_alpha(Pixel(), images([12, 3]), away).quantile == pytest.approx(margin(3), abs=1e-6)
    assert pick_alpha(Pixel(), images([12]), away).quantile == pytest.approx(margin(4), abs=1e-6)


def test_a_mixture_under_route_steering() -> None:
    model, data = tiny.mixture(2).train(), tiny.digits().val
    before = torch.get_rng_state()
    attacks = [RouteSteering(eps="1/64", steps=4), PGD(eps="1/64", steps=4, objective="margin", surface="pinned")]
    for attack in attacks:
        choice = pick_alpha(model, data, attack, seed=3)
        assert 0 < choice.n <= len(data) and choice == pick_alpha(model, data, attack, seed=3)
        assert choice.alpha == 1 / (1 + choice.quantile)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, math.nan])
def test_keep_is_a_share(keep: float) -> None:
    with pytest.raises(InputError, match=rf"keep must be in \(0, 1\], the share of robust answers to keep, got {keep}"):
        pick_alpha(Pixel(), images([12]), ATTACK, keep=keep)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="got objective 'cross_entropy'; set objective='margin'"):
        pick_alpha(Pixel(), images([12]), PGD(eps=0.1))
    with pytest.raises(InputError, match=r"no images to pick on; raise data\.val_fraction"):
        pick_alpha(Pixel(), images([12]).select([]), ATTACK)


def test_where_nothing_holds_the_robust_half_decides_alone() -> None:
    assert pick_alpha(Pixel(), images([9, 14], [1, 0]), ATTACK) == (1.0, 0.0, 0)
