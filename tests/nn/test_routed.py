from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.nn import Chain, PlainLayers, RoutedLayer
from phalanx.nn.routed import FoldableLayer, Width, conv_norm, follow, scaled_width


class Asks(RoutedLayer):
    """Adds what the plan says."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor, plan: Any) -> Tensor:
        return x + plan.at(self.site, x)


class Tens:
    def at(self, site: int, x: Tensor) -> float:
        return 10.0**site


def test_a_chain_hands_the_plan_to_who_takes_one() -> None:
    chain = Chain(nn.Identity(), Asks(1), Chain(nn.ReLU(), Asks(2)))
    assert float(chain(torch.tensor(-1.0), Tens())) == 9 + 100
    assert float(follow(nn.ReLU(), torch.tensor(-1.0), Tens())) == 0


def test_a_chain_without_routed_layers_needs_no_plan() -> None:
    layers = [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)]
    x = torch.rand(4, 2)
    assert torch.equal(Chain(*layers)(x), nn.Sequential(*layers)(x))


@pytest.mark.parametrize(
    ("channels", "scale", "kept"),
    [(64, 0.5, 32), (64, 0.8, 51), (64, 0.2, 12), (100, 0.29, 29), (512, 0.8, 409), (7, 1.0, 7)],
)
def test_widths_are_truncated(channels: int, scale: float, kept: int) -> None:
    assert scaled_width(channels, scale) == kept


@given(channels=st.integers(1, 4096), parts=st.integers(1, 100))
def test_a_scale_in_hundredths_is_exact(channels: int, parts: int) -> None:
    expected = channels * parts // 100
    if expected:
        assert scaled_width(channels, parts / 100) == expected
    else:
        with pytest.raises(ValueError, match="leaves no channel"):
            scaled_width(channels, parts / 100)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.01, float("nan")])
def test_scales_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"scale must be in (0, 1], got {scale}")):
        PlainLayers(scale).width(8)


def test_widths() -> None:
    assert Width.whole(5) == Width(5, 5)
    assert PlainLayers(0.5).width(9) == Width(9, 4)


def test_plain_layers_are_torchs() -> None:
    layers = PlainLayers(0.5)
    pair = conv_norm(layers, Width.whole(3), layers.width(8), 1, stride=2)
    conv, norm = pair
    assert type(conv) is nn.Conv2d and conv.weight.shape == (4, 3, 1, 1)
    assert conv.bias is None and conv.stride == (2, 2) and conv.padding == (0, 0)
    assert type(norm) is nn.BatchNorm2d and norm.num_features == 4
    assert conv_norm(layers, Width.whole(3), layers.width(8))(torch.rand(2, 3, 5, 5)).shape == (2, 4, 5, 5)


def test_a_foldable_layer_must_say_how() -> None:
    class Silent(FoldableLayer):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()  # type: ignore[abstract]
