from __future__ import annotations

import re

import pytest
import torch

from phalanx.nn import ConvBN, Normalize


def test_normalize_by_hand() -> None:
    layer = Normalize([0.5, 0.25], [0.5, 0.25])
    out = layer(torch.tensor([1.0, 0.5]).reshape(1, 2, 1, 1))
    assert out.flatten().tolist() == [1.0, 1.0]  # (1 - .5) / .5, (.5 - .25) / .25
    assert set(layer.state_dict()) == {"mean", "std"} and not list(layer.parameters())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], "mean and std need one value per channel, got 1 and 2"),
        ([], [], "mean and std need one value per channel, got 0 and 0"),
        ([0.5, 0.5], [0.5, 0.0], "std must be positive in every channel, got (0.5, 0.0)"),
    ],
)
def test_normalize_refuses(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Normalize(mean, std)


@pytest.mark.parametrize(("kernel_size", "stride", "side"), [(3, 1, 7), (3, 2, 4), (1, 1, 7), (1, 2, 4)])
def test_conv_bn_keeps_the_size_over_its_stride(kernel_size: int, stride: int, side: int) -> None:
    layer = ConvBN(2, 3, kernel_size, stride=stride)
    assert layer(torch.rand(2, 2, 7, 7)).shape == (2, 3, side, side)
    assert layer[0].bias is None  # the BatchNorm's shift would undo it
