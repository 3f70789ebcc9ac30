"""RayS against the algorithm written down sample by sample, and against a boundary that is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_samples import Linear, build, images, labels_for
from torch import Tensor

from phalanx.attacks import RayS, Target
from phalanx.rng import SampleRng


def one_by_one(
    label: Callable[[Tensor], int], x: Tensor, y: int, queries: int, eps: float, tolerance: float = 1e-3
) -> tuple[bool, int, float]:
    """Chen & Gu 2020 for one image (D,): whether an error was asked for within eps, queries, the radius found."""
    pixels, spent, hit = len(x), 0, False
    best, best_radius = torch.ones_like(x), math.inf

    def wrong(sign: Tensor, radius: float) -> bool:
        nonlocal spent, hit
        if hit or spent == queries:
            raise StopIteration
        spent += 1
        point = (x + radius * sign).clamp(0, 1)
        error = label(point) != y
        hit = error and float((point.double() - x.double()).abs().max()) <= eps
        return error

    level = block = 0
    try:
        while True:
            size = math.ceil(pixels / 2**level)
            sign = best.clone()
            sign[block * size : (block + 1) * size] *= -1
            radius = min(best_radius, 1.0)
            if wrong(sign, radius):
                low, high = 0.0, radius
                while high - low > tolerance:
                    middle = (low + high) / 2
                    if wrong(sign, middle):
                        high = middle
                    else:
                        low = middle
                if high < best_radius:
                    best, best_radius = sign, high
            block += 1
            if block * size >= pixels:
                level, block = level + 1, 0
    except StopIteration:
        return hit, spent, best_radius


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.1])
def test_it_is_the_published_search(eps: float) -> None:
    model, x = build("top-1"), images(20, torch.float64)
    model.double()
    y = labels_for(model, x)
    result = RayS(eps=eps, queries=300).run(model, x, y)
    right = result.clean_predicted == y
    for image, label, broken, spent in zip(
        x[right], y[right], result.broken[right], result.queries[right], strict=True
    ):
        hit, queries, _ = one_by_one(
            lambda point: int(model(point.reshape(1, 1, 4, 4)).argmax()), image.flatten(), int(label), 300, eps
        )
        assert (hit, queries) == (bool(broken), int(spent) - 2)


def test_it_finds_the_nearest_error_of_a_linear_model() -> None:
    # x in the middle of the range: the distance in Linf is the margin over the L1 norm of the weights
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, generator=generator, dtype=torch.float64)
    model = Linear([weight.tolist(), (-weight).tolist()], [0.05, 0.0])
    x = 0.5 + 0.02 * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    exact = (model(x)[:, 0] - model(x)[:, 1]).abs().detach() / (2 * weight).abs().sum()
    target = Target(model, model, "whole", "margin", x, y)
    found = RayS(eps=0.0, queries=400).perturb(target, SampleRng.for_batch(12))
    distance = (found.x_adv - x).abs().amax(1)
    assert ((distance >= exact - 1e-12) & (distance <= exact + 2e-3)).all()
    # an error within the radius is asked for only if the radius is that large
    assert RayS(eps=float(exact.max()) + 2e-3, queries=400).run(model, x, y).broken.all()
    assert not RayS(eps=float(exact.min()) - 1e-4, queries=400).run(model, x, y).broken.any()


def test_vectors_and_images_of_any_size() -> None:
    model = Linear([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    x = torch.tensor([[0.6, 0.5, 0.1]]).double()
    assert RayS(eps=0.06, queries=60).run(model, x, torch.tensor([0])).broken.all()
    assert not RayS(eps=0.04, queries=60).run(model, x, torch.tensor([0])).broken.any()
