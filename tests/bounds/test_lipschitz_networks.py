"""Networks made to be certified: read exactly, bounded soundly, and not vacuously."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phalanx.bounds import (
    Ball,
    Stage,
    forward,
    interval_features,
    output_lipschitz,
    read_network,
    slopes_of,
)
from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.nn import MaxMin
from phalanx.rng import SampleRng
from phalanx.threat import NORMS, Norm, ThreatModel
from reference.crown import crown_lower

_NETWORKS: dict[str, dict[str, Any]] = {
    "lipschitz_mlp": {"hidden": [12, 8]},
    "lipschitz_cnn": {"width": 4, "hidden": 6},
}
_RADIUS: dict[Norm, float] = {"Linf": 0.05, "L2": 0.3, "L1": 2.0}


def _network(name: str, kind: str) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    torch.manual_seed(0)
    options = {**_NETWORKS[name], "norm": kind, "logit_scale": 5.0, "mean": (0.3,), "std": (0.2,)}
    network = build_expert(name, num_classes=4, image_size=8, channels=1, **options).eval().double()
    for layer in network.modules():
        if hasattr(layer, "bias"):
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    return network, read_network(network, (1, 8, 8)), torch.rand(5, 1, 8, 8).double()


@pytest.mark.parametrize("kind", ["L2", "Linf"])
@pytest.mark.parametrize("name", _NETWORKS)
def test_stages_compute_what_the_network_does(name: str, kind: str) -> None:
    network, stages, x = _network(name, kind)
    values = forward(stages, x)
    assert torch.allclose(values, network(x), atol=1e-10, rtol=1e-10)
    # a certificate's stages carry no gradient, a loss's do
    assert not values.requires_grad and forward(read_network(network, (1, 8, 8), trained=True), x).requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["L2", "Linf"])
@pytest.mark.parametrize("name", _NETWORKS)
def test_nothing_in_the_ball_leaves_any_bound(name: str, kind: str, norm: Norm) -> None:
    _, stages, x = _network(name, kind)
    radius = _RADIUS[norm]
    ball = Ball(x, torch.full((len(x),), radius).double(), norm)
    rows = torch.randn(len(x), 5, 4, generator=torch.Generator().manual_seed(0)).double()
    features = interval_features(stages, ball)
    low, slopes = crown_lower(stages, rows, ball), slopes_of(stages, features, rows, norm)
    constants = output_lipschitz(stages, (1, 8, 8), norm)
    clean = forward(stages, x)
    for restart in range(20):
        point = ThreatModel(norm, radius).random_start(x, SampleRng.for_batch(len(x), 3), restart=restart)
        out = forward(stages, point)
        assert bool((out >= features[-1].low - 1e-9).all() and (out <= features[-1].high + 1e-9).all())
        values, before = ((rows @ each[..., None])[..., 0] for each in (out, clean))
        assert bool((values >= low - 1e-9).all())
        distance = ThreatModel(norm, 1.0).distance(point, x)[:, None]
        assert bool(((values - before).abs() <= slopes * distance + 1e-9).all())
        moved = (out[:, :, None] - out[:, None]) - (clean[:, :, None] - clean[:, None])
        assert bool((moved.abs() <= constants * distance[:, :, None] * (1 + 1e-9) + 1e-12).all())


def test_the_constant_is_what_the_construction_says() -> None:
    # orthonormal rows differ by sqrt 2, those of absolute sum 1 by at most 2; pixels are divided by 0.2
    _, stages, _ = _network("lipschitz_mlp", "L2")
    constants = output_lipschitz(stages, (1, 8, 8), "L2")
    assert float(constants.max()) == pytest.approx(5 * 2**0.5 / 0.2, rel=1e-6)
    for name in _NETWORKS:
        _, stages, _ = _network(name, "Linf")
        assert float(output_lipschitz(stages, (1, 8, 8), "Linf").max()) <= 5 * 2 / 0.2 * (1 + 1e-6)
    _, stages, _ = _network("lipschitz_cnn", "L2")
    assert 1 < float(output_lipschitz(stages, (1, 8, 8), "L2").max()) <= 5 * 2**0.5 / 0.2 * 1.001


def test_crown_is_tight_where_it_is_known_which_feature_is_larger() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), MaxMin(), nn.Linear(4, 2)).eval().double()
    network[1].bias.data = torch.tensor([9.0, -9.0, -9.0, 9.0]).double()
    network.requires_grad_(False)
    stages, x = read_network(network, (1, 2, 2)), torch.full((1, 1, 2, 2), 0.5).double()
    rows = torch.tensor([[[1.0, -1.0]]]).double()
    # linear in this ball: the last layer over the first with two of its rows swapped
    slope = (rows[0] @ network[3].weight @ network[1].weight[[0, 1, 3, 2]]).detach()
    ball = Ball(x, torch.tensor([0.1]).double(), "Linf")
    expected = (rows @ forward(stages, x)[..., None])[0, 0, 0] - 0.1 * slope.abs().sum()
    assert float(crown_lower(stages, rows, ball)) == pytest.approx(float(expected), abs=1e-7)
    features = interval_features(stages, ball)
    assert float(slopes_of(stages, features, rows, "Linf")) == pytest.approx(float(slope.abs().sum()), abs=1e-7)


def test_an_odd_number_of_features_is_no_pairs() -> None:
    with pytest.raises(InputError, match="no bound is known for 1, which is MaxMin"):
        read_network(nn.Sequential(nn.Flatten(), MaxMin()).eval(), (3, 1, 1))


@pytest.mark.parametrize("row", [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (1.0, -1.0), (-2.0, 1.0)])
def test_where_it_is_not_known_which_feature_is_larger(row: tuple[float, float]) -> None:
    # one pair of pixels, the first of which moves four times as far: every point of the ball can be tried
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), MaxMin()).eval().requires_grad_(False)
    network[1].weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    network[1].bias.copy_(torch.tensor([0.0, 0.8]))
    stages = read_network(network, (2, 1, 1))
    x, radius = torch.tensor([[0.3, 0.5], [0.35, 0.5], [0.75, 0.25]]).double().reshape(3, 2, 1, 1), 0.2
    ball = Ball(x, torch.full((3,), radius).double(), "Linf")
    rows = torch.tensor(row).double().expand(3, 1, 2)
    steps = torch.cartesian_prod(*[torch.linspace(-radius, radius, 21).double()] * 2)
    values = torch.stack([forward(stages, x + step.reshape(1, 2, 1, 1)).flatten(1) @ rows[0, 0] for step in steps])
    low = crown_lower(stages, rows, ball)[:, 0]
    assert bool((low <= values.amin(0) + 1e-9).all())
    assert bool((low >= values.amin(0) - 5 * radius * abs(row[0] - row[1])).all())
    assert float(low[2]) == pytest.approx(float(values[:, 2].min()))
    features = interval_features(stages, ball)
    clean, slopes = forward(stages, x).flatten(1) @ rows[0, 0], slopes_of(stages, features, rows, "Linf")[:, 0]
    assert bool(((values - clean).abs() <= slopes * steps.abs().amax(1)[:, None] + 1e-9).all())
