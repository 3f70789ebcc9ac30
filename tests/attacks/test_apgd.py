"""The walks of Auto-PGD against a one-sample transcription of the papers' algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from attack_samples import build, images
from torch import Tensor

import reference.autopgd as reference
from phalanx.attacks import Climb, Target
from phalanx.attacks.autopgd import MakePace, MomentumPace, Pace, Point, checkpoints, walk
from phalanx.attacks.autopgd_l1 import SparsePace, phases
from phalanx.attacks.released import auto_pgd
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.3)


def test_checkpoints_by_hand() -> None:
    # p = .22, .41, .57, .70, .80, .87, .93, .99
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == [1]
    assert all(checkpoints(steps) == reference.checkpoints(steps) for steps in range(1, 200))


def test_phases_by_hand() -> None:
    assert phases(100) == [(3, 30), (2, 30), (1, 40)]
    assert phases(7) == [(3, 2), (2, 2), (1, 3)]
    assert phases(2) == [(1, 2)] and phases(1) == [(1, 1)]


def function_of(target: Target) -> reference.Function:
    """The objective of a target of one sample."""

    def f(image: Tensor) -> tuple[float, Tensor]:
        climb = target.climb(image.reshape(target.x.shape))
        assert climb.gradient is not None
        return float(climb.gain), climb.gradient.flatten()

    return f


def hilly(x: Tensor) -> Tensor:
    """Logits [5 - waves, 0]: the cross-entropy has many maxima, and nothing ever breaks."""
    flat = x.flatten(1)
    waves = (torch.arange(3, 3 + flat.shape[1], dtype=x.dtype) * flat * 2).sin().sum(1) / flat.shape[1] ** 0.5
    return torch.stack([5 - waves, 0 * waves], 1)


def target_on(model: Callable[[Tensor], Tensor], x: Tensor) -> Target:
    return Target(model, model, "whole", "cross_entropy", x, torch.zeros(len(x), dtype=torch.int64))


class Watched:
    """What a walk reports; drops the samples that `drops` names, each at its step."""

    def __init__(self, drops: dict[int, int] | None = None) -> None:
        self.drops = drops or {}
        self.paces: list[Pace] = []
        self.sizes: list[Tensor] = []

    def pace(self, make: MakePace, start: Point) -> Pace:
        self.paces.append(make(start))
        return self.paces[0]

    def evaluate(self, target: Target, x_adv: Tensor, last: bool) -> Climb:
        return target.look(x_adv) if last else target.climb(x_adv)

    def observe(self, target: Target, x_adv: Tensor, climb: Climb, step: int) -> Tensor | None:
        assert x_adv.shape == target.x.shape and climb.gain.shape == (len(target),)
        if step not in self.drops:
            return None
        stay = torch.ones(len(target), dtype=torch.bool)
        stay[self.drops[step]] = False
        return stay


BALLS = [ThreatModel("Linf", 0.3), ThreatModel("L2", 0.6), ThreatModel("L1", 1.5)]


def walks(threat: ThreatModel, x: Tensor, start: Tensor, steps: int, watch: Watched, *, fresh: bool = True) -> Point:
    make: MakePace = partial(MomentumPace, threat, x, steps)
    if threat.norm == "L1":
        make = partial(SparsePace, threat, x, steps, fresh=fresh)
    return walk(target_on(hilly, x), start, steps, partial(watch.pace, make), watch.evaluate, watch.observe)


def alone(threat: ThreatModel, x: Tensor, start: Tensor, steps: int, *, fresh: bool = True) -> reference.Run:
    f, flat = function_of(target_on(hilly, x[None])), (x.flatten(), start.flatten())
    if threat.norm == "L1":
        return reference.sparse(f, *flat, threat.epsilon, steps, fresh=fresh)
    return reference.with_momentum(f, *flat, threat.norm, threat.epsilon, steps)


@pytest.mark.parametrize("threat", BALLS, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 40])
def test_a_batch_walks_as_each_sample_alone(threat: ThreatModel, steps: int) -> None:
    x = images(8, torch.float64)
    start = threat.random_start(x, SampleRng.for_batch(8))
    best = walks(threat, x, start, steps, Watched())
    runs = [alone(threat, x[row], start[row], steps) for row in range(8)]
    torch.testing.assert_close(best.gain, torch.tensor([run.value for run in runs], dtype=torch.float64))
    torch.testing.assert_close(best.x_adv.flatten(1), torch.stack([run.best for run in runs]), rtol=0, atol=1e-8)
    # the rules that shorten a step were at work, and not the same for all
    assert steps < 40 or len({tuple(run.sizes) for run in runs}) > 1


@pytest.mark.parametrize("threat", BALLS, ids=str)
def test_what_is_dropped_changes_nothing_for_the_others(threat: ThreatModel) -> None:
    x = images(8, torch.float64)
    start = threat.random_start(x, SampleRng.for_batch(8))
    best = walks(threat, x, start, 40, Watched({0: 2, 1: 0, 9: 3, 22: 0, 39: 1}))
    rows = [index for index in range(8) if index not in (2, 0, 5, 1, 4)]
    whole = walks(threat, x, start, 40, Watched())
    for mine, other in zip(best, whole, strict=True):
        assert torch.equal(mine, other[rows])


def test_in_l1_a_later_phase_moves_as_many_pixels_as_its_start_says() -> None:
    threat, x = BALLS[2], images(8, torch.float64)
    start = x.clone()
    start.flatten(1)[:, 3:9] = 0.4
    runs = [alone(threat, x[row], start[row], 30, fresh=False) for row in range(8)]
    best = walks(threat, x, start, 30, Watched(), fresh=False)
    torch.testing.assert_close(best.gain, torch.tensor([run.value for run in runs], dtype=torch.float64))
    assert {run.sparsity[0] for run in runs} == {6 / 1.5}


def test_in_l1_a_step_reaches_its_length_and_its_pixels_and_no_further() -> None:
    threat, x = ThreatModel("L1", 0.5), torch.full((1, 20), 0.5, dtype=torch.float64)
    here = Point(x, torch.zeros(1, dtype=torch.float64), torch.linspace(-1, 2, 20, dtype=torch.float64)[None])
    moved = SparsePace(threat, x, 10, here, fresh=True).advance(here) - x
    # a fifth of the pixels, the largest entries, a quarter of eps each
    assert moved[0, :16].eq(0).all() and moved[0, 16:].tolist() == pytest.approx([0.125] * 4)


def assert_walks_as_each_alone(model: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> set[int]:
    """How often the step was halved, from the clean images in the order of the released attack."""
    target = target_on(model, x)
    found = auto_pgd(target, THREAT, steps, lambda gradient: gradient)
    halvings = set()
    for row in range(len(x)):
        index = torch.tensor([row])
        run = reference.with_momentum(
            function_of(target[index]), x[row].flatten(), x[row].flatten(), "Linf", THREAT.epsilon, steps
        )
        torch.testing.assert_close(found.x_adv[row].flatten(), run.best, rtol=0, atol=1e-9)
        assert float(found.loss[row]) == pytest.approx(run.value)
        halvings.add(len(set(run.sizes)) - 1)
    assert (found.queries == steps + 1).all()
    return halvings


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_run_from_the_clean_images(steps: int) -> None:
    halvings = assert_walks_as_each_alone(build("float64"), images(12, torch.float64), steps)
    assert steps < 20 or len(halvings) > 1


def test_a_step_just_halved_gets_a_second_chance() -> None:
    def wavy(x: Tensor) -> Tensor:
        hills = (torch.tensor([40.0, 80.0], dtype=x.dtype) * x).sin().sum(1)
        return torch.stack([hills, 0 * hills], 1)

    # found by search: here a best point that stays the same after a halving is no reason to halve again
    x = torch.tensor([[0.7983738762488439, 0.5563491861040468]], dtype=torch.float64)
    assert assert_walks_as_each_alone(wavy, x, 100) == {7}


def test_the_first_step_is_twice_the_radius_long() -> None:
    model = build("float64")
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    target = Target(model, model, "whole", "cross_entropy", x, model(x).argmax(-1))
    found = auto_pgd(target, THREAT, 1, lambda gradient: gradient)
    torch.testing.assert_close((found.x_adv - x).abs(), torch.full_like(x, 0.3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gain_that_is_no_number_is_never_the_best(bad: float) -> None:
    def model(x: Tensor) -> Tensor:
        logits = torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        return torch.where((x < 0.5).all(1, keepdim=True), torch.tensor([-bad, 0.0]), logits)

    x = torch.full((1, 2), 0.6)
    found = auto_pgd(target_on(model, x), THREAT, 8, lambda gradient: gradient)
    assert found.loss.isfinite().all() and (found.x_adv >= 0.5).any()
