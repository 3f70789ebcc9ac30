"""The walk of Auto-PGD against a one-sample transcription of its algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_samples import build, images
from torch import Tensor

from phalanx.attacks import Target
from phalanx.attacks.apgd import auto_pgd, checkpoints
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.3)


def test_checkpoints_by_hand() -> None:
    # p = .22, .41, .57, .70, .80, .87, .93, .99
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == [1]


def one_by_one(target: Target, steps: int) -> tuple[Tensor, list[float]]:
    """Algorithm 1 for a single sample, every index written out: the best point and the step sizes."""
    center = target.x

    def f(x: Tensor) -> float:
        return float(target.look(x).gain)

    def ascent(x: Tensor, size: float) -> Tensor:
        gradient = target.climb(x).gradient
        assert gradient is not None
        return THREAT.project(x + size * gradient.sign(), center)

    sizes = [2 * THREAT.epsilon]
    points = [center, ascent(center, sizes[0])]
    values, raised = [f(x) for x in points], []
    raised.append(values[1] > values[0])
    best, best_value = (points[1], values[1]) if values[1] > values[0] else (points[0], values[0])
    at_mark, halved, last = values[0], False, 0

    def check(done: int) -> None:
        nonlocal at_mark, halved, last
        if done not in checkpoints(steps):
            return
        few = sum(raised[last:done]) < 0.75 * (done - last)
        halved = few or (not halved and best_value == at_mark)
        if halved:
            sizes.append(sizes[-1] / 2)
            points[-1], values[-1] = best, best_value
        at_mark, last = best_value, done

    check(1)
    while len(points) <= steps:
        z = ascent(points[-1], sizes[-1])
        moved = points[-1] + 0.75 * (z - points[-1]) + 0.25 * (points[-1] - points[-2])
        new = THREAT.project(moved, center)
        raised.append(f(new) > values[-1])
        points.append(new)
        values.append(f(new))
        if values[-1] > best_value:
            best, best_value = new, values[-1]
        check(len(points) - 1)
    return best, sizes


def assert_walks_as_each_alone(model: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> set[int]:
    """How often the step was halved."""
    y = torch.zeros(len(x), dtype=torch.int64)
    target = Target(model, model, "whole", "cross_entropy", x, y)
    found = auto_pgd(target, THREAT, steps, lambda gradient: gradient)
    halvings = set()
    for row in range(len(x)):
        index = torch.tensor([row])
        best, sizes = one_by_one(target[index], steps)
        torch.testing.assert_close(found.x_adv[index], best, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.loss[index], target[index].look(best).gain)
        halvings.add(len(sizes) - 1)
    assert (found.queries == steps + 1).all()
    return halvings


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_batch_walks_as_each_sample_alone(steps: int) -> None:
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


def test_a_gain_that_is_no_number_is_never_the_best() -> None:
    def model(x: Tensor) -> Tensor:
        logits = torch.stack([x.sum(1), 0 * x.sum(1)], 1)
        return torch.where((x < 0.5).all(1, keepdim=True), math.nan, logits)

    x, y = torch.full((1, 2), 0.6), torch.tensor([0])
    found = auto_pgd(Target(model, model, "whole", "cross_entropy", x, y), THREAT, 8, lambda gradient: gradient)
    assert found.loss.isfinite().all() and (found.x_adv >= 0.5).any()
