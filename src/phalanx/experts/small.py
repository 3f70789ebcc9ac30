"""Small networks for small images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from phalanx.experts.stems import stem_layers, stem_width
from phalanx.nn import Chain, Layers, Normalize
from phalanx.nn.routed import conv_norm


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


def small_cnn(
    normalize: Normalize, *, num_classes: int, image_size: int, channels: int, layers: Layers, width: int = 16
) -> nn.Module:
    """Three 3x3 convolutions (width, 2 width, 2 width; the last two stride 2), then a linear layer on the 4x4-at-most
    feature map: positions are kept, which small images need. The first convolution is the stem, never routed."""
    pooled = min(4, -(-image_size // 4))
    stem, wide = stem_width(layers, width, scaled=True), layers.width(2 * width)
    first = stem_layers("small", channels, stem)
    layers.begin_block(stem)
    second = conv_norm(layers, stem, wide, stride=2)
    layers.begin_block(wide)
    third = conv_norm(layers, wide, wide, stride=2)
    return Chain(
        normalize,
        *first,
        second,
        nn.ReLU(),
        third,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(pooled),
        nn.Flatten(),
        nn.Linear(wide.kept * pooled**2, num_classes),
    )
