"""The search for the four numbers of a MixedNUTS, on robust halves whose logits are known in advance."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD, Found, RouteSteering, Target
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import NutsChoice, NutsGrid, pick_nuts
from phalanx.rng import SampleRng
from phalanx.routing import LogitMap, MixedNUTS, MixtureOfExperts, normalised

# B batch, C classes, L grey levels

STILL = FGSM(eps="2/16", objective="margin")
"""On a `Table` it has no gradient, so every image stays as it is."""


class Table(nn.Module):
    """One row of logits for each of 17 grey levels of a single pixel."""

    def __init__(self, logits_LC: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits_LC)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[(16 * x.flatten(1)[:, 0]).round().long()]


class Pixel(nn.Module):
    """Class 1 above 8 sixteenths, 0 below. The third is out of the question: of two alone the layer norm is always
    (-1, 1) / sqrt(2)."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        above = 16 * x.flatten(1)[:, 0] - self.middle
        return torch.stack([-above, above, above * 0 - 20], 1)


class Away(PGD):
    """Goes to the brightest pixel of the ball, whatever the label."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return super().perturb(target, rng)._replace(x_adv=torch.ones_like(target.x))


def images(levels: list[int], labels: list[int]) -> ImageSet:
    pixels = np.array(levels, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(pixels, np.array(labels, dtype=np.int64), np.arange(len(levels)), 16)


def table(classes: int = 4, seed: int = 0) -> tuple[Table, ImageSet]:
    """17 images, four of which, clear ones and less clear ones, carry another label than the table gives them."""
    logits = 3 * torch.randn(17, classes, generator=torch.Generator().manual_seed(seed))
    first, second = normalised(logits).topk(2).values.unbind(-1)
    labels = logits.argmax(-1)
    doubtful = (first - second).argsort()[[1, 4, 8, 14]]
    labels[doubtful] = (labels[doubtful] + 1) % classes
    return Table(logits), images(list(range(17)), labels.tolist())


def mapped(row: list[float], scale: float, power: float, bias: float) -> list[float]:
    """softmax(T(row)), the slow and obvious way."""
    mean, deviation = statistics.mean(row), math.sqrt(statistics.variance(row) + 1e-8)
    clamped = [(u := (value - mean) / deviation + bias) / 2 * (1 + math.erf(u / math.sqrt(2))) for value in row]
    exponentials = [math.exp(scale * math.copysign(abs(v) ** power, v)) for v in clamped]
    return [value / sum(exponentials) for value in exponentials]


def by_hand(model: Table, data: ImageSet, grid: NutsGrid, kept_rank: int) -> tuple[float, float, list[tuple]]:
    """The smallest share out of reach, the largest, and every (share, quantile, scale, power, bias)."""
    rows, answers = model.logits.tolist(), model.logits.argmax(-1).tolist()
    n = range(grid.points)
    (low, high), (p0, p1), (b0, b1) = grid.scale, grid.power, grid.bias
    found = []
    for i, j, k in itertools.product(n, n, n):
        steps = grid.points - 1
        numbers = (low * (high / low) ** (i / steps), p0 + (p1 - p0) * j / steps, b0 + (b1 - b0) * k / steps)
        held, leads = [], []
        for level, label in enumerate(data.labels.tolist()):
            p = mapped(rows[level], *numbers)
            others = max(value for c, value in enumerate(p) if c != label)
            if answers[level] == label:
                held.append(p[label] - others)
            else:
                first, second = sorted(p)[:-3:-1]
                leads.append(first - second)
        quantile = sorted(held)[kept_rank]
        found.append((sum(lead >= quantile for lead in leads) / len(leads), quantile, *numbers))
    return min(f[0] for f in found), max(f[0] for f in found), found


# 13 right: (1 - .75) * 13 = 3.25 and (1 - .5) * 13 = 6.5
CASES = [(1, 1, 0), (2, 1, 0), *((seed, *kept) for seed in (0, 1, 3, 5) for kept in ((0.75, 3), (0.5, 6)))]


@pytest.mark.parametrize(("seed", "keep", "rank"), CASES)
def test_the_best_of_the_grid(seed: int, keep: float, rank: int) -> None:
    model, data = table(seed=seed)
    grid = NutsGrid(points=3)
    choice = pick_nuts(model, data, STILL, keep=keep, grid=grid)
    least, most, found = by_hand(model, data, grid, rank)
    assert (choice.held, choice.wrong) == (13, 4) and least < most
    assert choice.out_of_reach == least and choice.alpha == 1 / (1 + choice.quantile)
    mine = min(found, key=lambda f: sum(abs(a - b) for a, b in zip(f[2:], choice[1:4], strict=True)))
    assert mine == pytest.approx((choice.out_of_reach, choice.quantile, *choice[1:4]), abs=1e-9)
    # among equals the clearest
    equals = [min(q, 1 - q) for share, q, *_ in found if share == least]
    assert min(choice.quantile, 1 - choice.quantile) == pytest.approx(max(equals), abs=1e-9)


@pytest.mark.parametrize("keep", [0.5, 0.9, 1.0])
def test_that_share_is_kept_whatever_the_standard_half_says(keep: float) -> None:
    robust, data = table(classes=6, seed=1)
    choice = pick_nuts(robust, data, STILL, keep=keep, grid=NutsGrid(points=4))
    (batch,) = data.batches(99)

    def held(standard: Tensor, alpha: float) -> int:
        halves = (MixtureOfExperts(None, [part]) for part in (Table(standard), robust))
        numbers = {"scale": choice.scale, "power": choice.power, "bias": choice.bias}
        return int((MixedNUTS(*halves, alpha, **numbers)(batch.x).argmax(-1) == batch.y).sum())

    # at q itself it is a tie; S is sure of each wrong class in turn
    fooled = [torch.zeros(17, 6).scatter(1, ((batch.y + shift) % 6)[:, None], 50.0) for shift in range(1, 6)]
    assert min(held(standard, choice.alpha + 1e-6) for standard in fooled) >= math.ceil(keep * choice.held)
    # and not for nothing: a little below the chosen alpha one more falls
    runner_up = robust.logits.detach().scatter(1, batch.y[:, None], -99).argmax(-1)
    lower = held(torch.zeros(17, 6).scatter(1, runner_up[:, None], 50.0), choice.alpha - 1e-4)
    assert lower < math.ceil(keep * choice.held) or keep < 1


def test_a_standard_half_corrects_what_is_within_reach() -> None:
    robust, data = table(classes=6, seed=1)
    choice = pick_nuts(robust, data, STILL, keep=0.5)
    assert 0 < choice.out_of_reach < 1
    (batch,) = data.batches(99)
    wrong = robust.logits.argmax(-1) != batch.y
    numbers = {"scale": choice.scale, "power": choice.power, "bias": choice.bias}

    def answers(wanted: Tensor) -> Tensor:
        sure = Table(torch.zeros(17, 6).scatter(1, wanted[:, None], 50.0))
        halves = (MixtureOfExperts(None, [part]) for part in (sure, robust))
        return MixedNUTS(*halves, choice.alpha, **numbers)(batch.x).argmax(-1)

    within = round((1 - choice.out_of_reach) * choice.wrong)
    runner_up = LogitMap(**numbers)(robust.logits).topk(2).indices[:, 1]
    assert int((answers(runner_up) == runner_up)[wrong].sum()) == within
    # a perfect one corrects no more: the label need not be the runner-up
    assert int((answers(batch.y) == batch.y)[wrong].sum()) <= within


def test_the_worse_of_clean_and_attacked_counts() -> None:
    # two sixteenths closer: 9 falls, 14 and 12 stand with 4 and 2 to spare; 5 is wrong and 3 below
    attack, grid = (
        PGD(eps="2/16", steps=5, objective="margin"),
        NutsGrid(scale=(1, 1), power=(1, 1), bias=(0, 0), points=1),
    )
    choice = pick_nuts(Pixel(), images([9, 14, 12, 5], [1, 1, 1, 1]), attack, keep=1, grid=grid, batch_size=2)
    p = mapped([-2.0, 2.0, -20.0], 1, 1, 0)
    assert (choice.held, choice.wrong) == (2, 1)
    assert choice.quantile == pytest.approx(p[1] - p[0], abs=1e-5)
    p = mapped([3.0, -3.0, -20.0], 1, 1, 0)
    assert choice.out_of_reach == float(p[0] - p[1] >= choice.quantile)
    # a search that leads away counts as if it had stayed: 12, not 14, is 4 above
    choice = pick_nuts(Pixel(), images([12], [1]), Away(steps=1, objective="margin", eps="2/16"), grid=grid)
    p = mapped([-4.0, 4.0, -20.0], 1, 1, 0)
    assert choice.quantile == pytest.approx(p[1] - p[0], abs=1e-5)


def test_evaluation_mode_is_what_counts() -> None:
    model, data = tiny.mixture(2, expert="tiny:noisy_cnn"), tiny.digits().val
    attack, grid = PGD(eps="1/64", steps=2, objective="margin"), NutsGrid(points=2)
    assert pick_nuts(model.train(), data, attack, grid=grid) == pick_nuts(model.eval(), data, attack, grid=grid)


def test_no_error_to_correct() -> None:
    choice = pick_nuts(Pixel(), images([16, 0, 12], [1, 0, 1]), PGD(eps="2/16", objective="margin"))
    assert choice.wrong == 0 and choice.out_of_reach == 0 and 0.5 < choice.alpha < 1


def test_a_mixture_under_route_steering_is_left_as_it_was() -> None:
    model, data = tiny.mixture(2).train(), tiny.digits().val
    before = torch.get_rng_state()
    for attack in (RouteSteering(eps="1/64", steps=4), PGD(eps="1/64", steps=4, objective="margin")):
        choice = pick_nuts(model, data, attack, seed=3, grid=NutsGrid(points=2))
        assert isinstance(choice, NutsChoice) and 0 < choice.held <= len(data)
        again = pick_nuts(model, data, attack, seed=3, grid=NutsGrid(points=2), batch_size=7)
        assert again == pytest.approx(choice, abs=1e-5)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_grid() -> None:
    grid = NutsGrid()
    maps = grid.maps()
    assert len(set(maps)) == 8**3 and maps[0] == LogitMap(scale=0.05, power=1, bias=-1.1)
    assert maps[-1] == LogitMap(scale=5.0, power=4, bias=0)
    # CIFAR-100's published numbers are points of such a grid: .05 * 80^(4/7), 1 + 3 * 6/7, -2.5 + 2.5 / 7
    wide = NutsGrid(scale=(0.05, 4), bias=(-2.5, 0)).maps()
    near = [m for m in wide if abs(m.scale - 0.6116) < 1e-4 and abs(m.power - 3.571) < 1e-3]
    assert any(abs(m.bias + 2.143) < 1e-3 for m in near)


def test_mistakes() -> None:
    data, attack = images([12], [1]), PGD(eps=0.1, objective="margin")
    with pytest.raises(InputError, match="got objective 'cross_entropy'; set objective='margin'"):
        pick_nuts(Pixel(), data, PGD(eps=0.1))
    with pytest.raises(InputError, match=r"keep must be in \(0, 1\], the share of robust answers to keep, got nan"):
        pick_nuts(Pixel(), data, attack, keep=math.nan)
    with pytest.raises(InputError, match=r"no images to pick on; raise data\.val_fraction"):
        pick_nuts(Pixel(), data.select([]), attack)
    with pytest.raises(InputError, match=r"answers none of 2 images correctly under attack, .* smaller eps"):
        pick_nuts(Pixel(), images([9, 14], [1, 0]), PGD(eps="2/16", objective="margin"))
    with pytest.raises(InputError, match=r"grid\.power must go from low to high, got 4 to 1; swap them"):
        NutsGrid(power=(4, 1))
    with pytest.raises(InputError, match="the grid has an end that is no map: scale must be positive"):
        NutsGrid(scale=(0, 1))
    with pytest.raises(InputError, match=r"grid\.points must be at least 1, got 0"):
        NutsGrid(points=0)
    # two nearly equal classes far below GELU's least value change places
    turned = Table(torch.tensor([[1.0, 0.0]]).repeat(17, 1))
    with pytest.raises(InputError, match=r"every map of the grid turns answers of the robust half; let grid\.bias"):
        pick_nuts(turned, images([3], [0]), STILL, grid=NutsGrid(bias=(-1.8, -1.8)))
