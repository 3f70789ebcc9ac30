"""Small networks for small images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from phalanx.nn import ConvBN, Normalize


def mlp(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    hidden: Sequence[int] = (128, 64),
) -> nn.Module:
    """Fully connected layers with ReLU on the flattened image."""
    widths = [channels * image_size**2, *hidden]
    layers: list[nn.Module] = [normalize, nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def small_cnn(normalize: Normalize, *, num_classes: int, image_size: int, channels: int, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions (width, 2 width, 2 width; the last two stride 2), then a linear layer on the 4x4-at-most
    feature map: positions are kept, which small images need."""
    pooled = min(4, -(-image_size // 4))
    return nn.Sequential(
        normalize,
        ConvBN(channels, width),
        nn.ReLU(),
        ConvBN(width, 2 * width, stride=2),
        nn.ReLU(),
        ConvBN(2 * width, 2 * width, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(pooled),
        nn.Flatten(),
        nn.Linear(2 * width * pooled**2, num_classes),
    )
