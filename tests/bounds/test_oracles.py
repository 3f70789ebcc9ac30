"""Nightly: bounds beside other people's, and beside what can be enumerated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.bounds import Ball, conv_upper, forward, gram_upper, output_lipschitz, read_network
from phalanx.experts import build_expert
from phalanx.threat import NORMS, Norm
from reference.crown import crown_lower

pytestmark = pytest.mark.nightly


def _network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    options = {"mlp": {"hidden": [20, 12]}, "small_cnn": {"width": 4}}[name]
    return build_expert(name, num_classes=5, image_size=8, channels=1, **options).double().eval()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["mlp", "small_cnn"])
def test_crown_is_auto_lirpa_s(name: str, norm: Norm) -> None:
    """Theirs knows no pixel range: images far from its ends. Ours intersects with intervals, and so is never looser."""
    lirpa = pytest.importorskip("auto_LiRPA")
    for seed in range(3):
        network = _network(name, seed)
        x = 0.4 + 0.2 * torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        radius = {"Linf": 0.02, "L2": 0.2}[norm]
        bounded = lirpa.BoundedModule(network, torch.empty_like(x), bound_opts={"relu": "adaptive"})
        within = lirpa.PerturbationLpNorm(norm={"Linf": math.inf, "L2": 2.0}[norm], eps=radius)
        theirs = bounded.compute_bounds(x=(lirpa.BoundedTensor(x, within),), method="CROWN")[0]
        rows = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
        ball = Ball(x, torch.full((4,), radius, dtype=torch.float64), norm)
        ours = crown_lower(read_network(network, (1, 8, 8)), rows, ball)
        assert bool((ours >= theirs - 1e-6).all()) and torch.allclose(ours, theirs, atol=0.05)


@pytest.mark.parametrize("stride", [1, 2])
def test_spectral_bounds_are_above_dense_singular_values(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs, taps, size in itertools.product((2, 8), (1, 6), (1, 3, 5), (8, 11)):
        kernel = torch.randn(outputs, inputs, taps, taps, dtype=torch.float64, generator=generator)
        eye = torch.eye(inputs * size * size, dtype=torch.float64).reshape(-1, inputs, size, size)
        dense = F.conv2d(eye, kernel, stride=stride, padding=taps // 2).flatten(1).T
        exact = float(torch.linalg.matrix_norm(dense, 2))
        assert exact <= conv_upper(kernel, (size, size), stride, taps // 2) <= 1.6 * exact
        assert exact <= float(gram_upper(dense)) <= 1.02 * exact


@pytest.mark.parametrize("norm", NORMS)
def test_no_two_of_many_images_are_further_apart_than_the_constant_allows(norm: Norm) -> None:
    order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[norm]
    for name, seed in itertools.product(("mlp", "small_cnn"), range(4)):
        stages = read_network(_network(name, seed), (1, 8, 8))
        constants = output_lipschitz(stages, (1, 8, 8), norm)
        x = torch.rand(2000, 2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x[:, 1] = (x[:, 0] + 1e-3 * (x[:, 1] - 0.5)).clamp(0, 1)
        first, second = forward(stages, x[:, 0]), forward(stages, x[:, 1])
        moved = (first[:, :, None] - first[:, None] - second[:, :, None] + second[:, None]).abs()
        distance = (x[:, 0] - x[:, 1]).flatten(1).norm(p=order, dim=1)
        assert bool(((moved / distance[:, None, None]).amax(0) <= constants + 1e-9).all())


def test_crown_is_below_every_vertex_of_a_small_box() -> None:
    """A network of two pixels is linear between its kinks: the box is looked at on a fine grid, vertices included."""
    for seed in range(20):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        network = network.double().eval()
        x = torch.rand(1, 1, 1, 2, dtype=torch.float64)
        rows = torch.eye(3, dtype=torch.float64)[None]
        low = crown_lower(read_network(network, (1, 1, 2)), rows, Ball(x, torch.tensor([0.1]).double(), "Linf"))
        assert bool((_grid_least(network, x, 0.1) >= low - 1e-9).all())


def _grid_least(network: nn.Module, x: Tensor, radius: float) -> Tensor:
    line = torch.linspace(-radius, radius, 101, dtype=torch.float64)
    with torch.no_grad():
        return network((x + torch.cartesian_prod(line, line).reshape(-1, 1, 1, 2)).clamp(0, 1)).amin(0)[None]
