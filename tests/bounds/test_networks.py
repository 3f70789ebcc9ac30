"""Networks are read exactly, and no sampled output, derivative or distance leaves its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phalanx.bounds import (
    Ball,
    Stage,
    crown_planes,
    forward,
    interval_features,
    output_lipschitz,
    read_network,
    slopes_of,
)
from phalanx.bounds.stages import Affine, AveragePool, Convolution, MaxPool
from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.experts.resnet import BasicBlock
from phalanx.nn import PlainLayers
from phalanx.nn.routed import Width
from phalanx.rng import SampleRng
from phalanx.threat import NORMS, Norm, ThreatModel
from reference.crown import crown_lower

_BLOCKS = {BasicBlock: lambda block: (block.body, block.shortcut)}
_EXPERTS = {
    "mlp": ({"hidden": [12, 8], "mean": (0.3,), "std": (0.2,)}, (1, 8, 8)),
    "small_cnn": ({"width": 3, "mean": (0.3, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}, (3, 9, 9)),
    "vgg16": ({"width": 2, "hidden": 6}, (1, 16, 16)),
    "resnet18": ({"width": 2}, (1, 8, 8)),
}


_NETWORKS = (*_EXPERTS, "pooled", "residual")


def _pooled() -> nn.Module:
    # of 9 pixels a pool leaves one out
    layers = [nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(16, 4))


def _residual() -> nn.Module:
    narrow, wide = Width.whole(3), Width.whole(4)
    blocks = [BasicBlock(PlainLayers(), narrow, wide, 2), BasicBlock(PlainLayers(), wide, wide, 1)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *blocks, *head)


def _network(name: str) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    torch.manual_seed(0)
    if name in _EXPERTS:
        options, shape = _EXPERTS[name]
        network = build_expert(name, num_classes=4, image_size=shape[1], channels=shape[0], **options)
    else:
        network, shape = {"pooled": _pooled, "residual": _residual}[name](), (1, 9, 9)
    for _ in range(3):
        network(torch.rand(16, *shape))
    # BatchNorm's factors away from one
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    network = network.eval().double()
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(2)).double()
    return network, read_network(network, shape, blocks=_BLOCKS), x


def _points(x: Tensor, norm: Norm, radius: float) -> list[Tensor]:
    threat = ThreatModel(norm, radius)
    return [threat.random_start(x, SampleRng.for_batch(len(x), 3), restart=restart) for restart in range(20)]


@pytest.mark.parametrize("name", _NETWORKS)
def test_stages_compute_what_the_network_does(name: str) -> None:
    network, stages, x = _network(name)
    assert torch.allclose(forward(stages, x), network(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", _NETWORKS)
def test_nothing_in_the_ball_leaves_the_intervals_or_moves_faster(name: str, norm: Norm) -> None:
    _, stages, x = _network(name)
    radius = {"Linf": 0.05, "L2": 0.3, "L1": 2.0}[norm]
    final = interval_features(stages, Ball(x, torch.full((len(x),), radius).double(), norm))[-1]
    constants = output_lipschitz(stages, tuple(x.shape[1:]), norm)
    clean = forward(stages, x)
    for point in [*_points(x, norm, radius), *_points(x, norm, 1e-3)]:
        out = forward(stages, point)
        assert bool((out >= final.low - 1e-9).all() and (out <= final.high + 1e-9).all())
        moved = (out[:, :, None] - out[:, None]) - (clean[:, :, None] - clean[:, None])
        distance = ThreatModel(norm, 1.0).distance(point, x)
        assert bool((moved.abs() <= constants * distance[:, None, None] * (1 + 1e-9) + 1e-12).all())


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "pooled", "residual"])
def test_crown_and_the_derivatives_hold(name: str, norm: Norm, size: float) -> None:
    """In small balls hardly a layer may switch: a bound that forgets a part is then wrong."""
    _, stages, x = _network(name)
    radius = size * {"Linf": 0.05, "L2": 0.3, "L1": 2.0}[norm]
    ball = Ball(x, torch.full((len(x),), radius).double(), norm)
    rows = torch.randn(len(x), 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    planes = crown_planes(stages, rows, ball)
    low, slopes = planes.least(ball), slopes_of(stages, interval_features(stages, ball), rows, norm)
    clean = (rows @ forward(stages, x)[..., None])[..., 0]
    dual: float = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}[norm]
    for point in _points(x, norm, radius):
        point = point.requires_grad_()
        values = (rows @ forward(stages, point)[..., None])[..., 0]
        linear = (planes.slopes @ point.detach().flatten(1)[..., None])[..., 0] + planes.constants
        assert bool((values >= linear - 1e-9).all() and (linear >= low - 1e-9).all())
        assert bool(((values - clean).abs() <= slopes * radius + 1e-9).all())
        gradient = torch.autograd.grad(values[:, 0].sum(), point)[0].flatten(1).norm(p=dual, dim=1)
        assert bool((gradient <= slopes[:, 0] + 1e-9).all())


def test_a_ball_of_nothing_is_the_image() -> None:
    _, stages, x = _network("small_cnn")
    nothing = Ball(x, torch.zeros(len(x), dtype=torch.float64), "L2")
    rows = torch.eye(4, dtype=torch.float64).expand(len(x), 4, 4)
    assert torch.allclose(crown_lower(stages, rows, nothing), forward(stages, x))
    assert torch.allclose(interval_features(stages, nothing)[-1].high, forward(stages, x))


def test_balls_of_one_batch_are_apart() -> None:
    _, stages, x = _network("mlp")
    rows = torch.eye(4, dtype=torch.float64).expand(len(x), 4, 4)
    radius = torch.linspace(0, 0.1, len(x), dtype=torch.float64)
    together = crown_lower(stages, rows, Ball(x, radius, "Linf"))
    for index in range(len(x)):
        part = slice(index, index + 1)
        alone = crown_lower(stages, rows[part], Ball(x[part], radius[part], "Linf"))
        assert torch.allclose(together[part], alone, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposes_are_transposes(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator)
    pool = torch.rand(2, 7, dtype=torch.float64, generator=generator)
    layers: list[Affine] = [
        Convolution(kernel, torch.zeros(3, dtype=torch.float64), stride, 1, (2, 7, 8)),
        AveragePool(pool, torch.rand(3, 8, dtype=torch.float64, generator=generator), (2, 7, 8)),
    ]
    for layer in layers:
        x = torch.randn(4, *layer.in_shape, dtype=torch.float64, generator=generator)
        rows = torch.randn(4, *layer.out_shape, dtype=torch.float64, generator=generator)
        forth, back = (rows * layer.forward(x)).sum(), (layer.transpose(rows) * x).sum()
        assert torch.allclose(forth, back)


def test_constants_between_norms_fit() -> None:
    """A constant for Linf is at most sqrt(D) times one for L2, which is at most that for Linf."""
    for name in _NETWORKS:
        _, stages, x = _network(name)
        shape = tuple(x.shape[1:])
        linf, l2, l1 = (output_lipschitz(stages, shape, norm) for norm in ("Linf", "L2", "L1"))
        assert bool((linf <= x[0].numel() ** 0.5 * l2 + 1e-9).all() and (l2 <= linf + 1e-9).all())
        assert bool((l1 <= l2 + 1e-9).all())


class _Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.GELU(), "1.1"),
        (_Own(4, 4), "1.1"),
        (nn.Conv2d(1, 4, 3, groups=1, dilation=2), "1.1"),
        (nn.MaxPool2d(3, stride=2), "1.1"),
        (nn.Flatten(2), "1.1"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "1.1"),
    ],
)
def test_an_unknown_layer_is_named_with_its_path(layer: nn.Module, named: str) -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), layer)).eval()
    with pytest.raises(InputError, match=rf"experts\.0\.{named}"):
        read_network(network, (1, 8, 8), where="experts.0")


def test_training_mode_and_hooks_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(InputError, match="training mode"):
        read_network(network, (1, 8, 8))
    network.eval()[1].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="1 has a forward hook"):
        read_network(network, (1, 8, 8))


@pytest.mark.parametrize("name", ["pooled", "residual"])
def test_crown_says_more_than_intervals_and_constants(name: str) -> None:
    _, stages, x = _network(name)
    ball = Ball(x, torch.full((len(x),), 0.01, dtype=torch.float64), "Linf")
    rows = torch.eye(4, dtype=torch.float64).expand(len(x), 4, 4)
    crown = forward(stages, x) - crown_lower(stages, rows, ball)
    intervals = forward(stages, x) - interval_features(stages, ball)[-1].low
    constants = output_lipschitz(stages, (1, 9, 9), "Linf").amax() * 0.01
    assert 0 < float(crown.mean()) < 0.7 * float(intervals.mean()) and float(crown.max()) < 0.5 * float(constants)


def test_the_largest_of_a_window_is_bounded_on_both_sides() -> None:
    """One window, its largest sure and not sure: by hand."""
    pool = MaxPool(2, (1, 2, 2))
    point = torch.tensor([0.1, 0.2, 0.3, 0.6], dtype=torch.float64).reshape(1, 1, 2, 2)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    for radius, expected in ((0.1, [0.5, -0.7]), (0.2, [0.4, -0.8])):
        ball = Ball(point, torch.tensor([radius], dtype=torch.float64), "Linf")
        assert crown_lower([pool], rows, ball)[0].tolist() == pytest.approx(expected)


def test_bounds_refuse_a_stage_that_they_do_not_know() -> None:
    class Cube:
        in_shape = out_shape = (1, 9, 9)

    _, _, x = _network("pooled")
    ball = Ball(x, x.new_zeros(len(x)), "L2")
    strange: list[Any] = [Cube()]
    with pytest.raises(InputError, match="CROWN is not known for Cube"):
        crown_lower(strange, x.new_zeros(len(x), 1, 81), ball)
    with pytest.raises(InputError, match="derivative is known for Cube"):
        slopes_of(strange, [ball.pixels, ball.pixels], x.new_zeros(len(x), 1, 81), "L2")
