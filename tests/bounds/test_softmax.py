"""Minima over boxes are those over the box's vertices."""

from __future__ import annotations

import itertools

import pytest
import torch

from phalanx.bounds import prob_margin_low, softmax_min


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_the_least_average_is_at_a_vertex(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    low = scale * torch.randn(6, 4, dtype=torch.float64, generator=generator)
    high = low + scale * torch.rand(6, 4, dtype=torch.float64, generator=generator)
    vertices = [torch.where(torch.tensor(up), high, low) for up in itertools.product((False, True), repeat=4)]
    least = torch.stack([(vertex.softmax(1) * values).sum(1) for vertex in vertices]).amin(0)
    assert torch.allclose(softmax_min(values, low, high), least, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_the_least_difference_of_probabilities_is_at_a_vertex(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (20,), generator=generator)
    low = scale * torch.randn(20, 4, dtype=torch.float64, generator=generator)
    high = low + scale * torch.rand(20, 4, dtype=torch.float64, generator=generator)
    own = torch.nn.functional.one_hot(y, 4).bool()
    found = prob_margin_low(low, high, y)
    assert bool((found[own] == torch.inf).all())
    points = []
    for up in itertools.product((False, True), repeat=4):
        p = torch.where(torch.tensor(up), high, low).masked_fill(own, 0).softmax(1)
        points.append(p.gather(1, y[:, None]) - p)
    least = torch.stack(points).amin(0)
    assert torch.allclose(found[~own], least[~own], rtol=1e-9, atol=1e-12)


def test_exponents_are_not_clamped() -> None:
    """A clamp at 60 once turned -1 into -1/2: two classes both far ahead of y."""
    y = torch.zeros(1, dtype=torch.int64)
    edges = torch.tensor([[0.0, 1e3, 70.0]], dtype=torch.float64)
    assert prob_margin_low(edges, edges, y)[0, 1] == -1
    assert prob_margin_low(-edges, -edges, y)[0, 1] == pytest.approx(1)


def test_nothing_known_is_the_worst_case() -> None:
    y = torch.zeros(1, dtype=torch.int64)
    unknown = torch.full((1, 3), torch.inf, dtype=torch.float64)
    assert prob_margin_low(-unknown, unknown, y)[0, 1:].tolist() == [-1, -1]
