"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015)."""

from __future__ import annotations

from torch import nn

from phalanx.experts.stems import check_size, stem_layers, stem_width
from phalanx.nn import Chain, Layers, Normalize
from phalanx.nn.routed import conv_norm

_GROUPS = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
"""Convolutions between two poolings, in multiples of the first width."""


def vgg16(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    layers: Layers,
    width: int = 64,
    hidden: int = 256,
    scaled_stem: bool = True,
) -> nn.Module:
    """15.31 M parameters and 0.3138 G multiply-adds at width 64, 32x32x3 and 10 classes: thirteen 3x3 convolutions, of
    which the first is the stem; four poolings; 2x2 pixels into three linear layers, never narrowed but for what they
    read (the head of AdvMoE's code).

    Args:
        hidden: width of the head's two inner layers.
        scaled_stem: the first convolution has its share of channels, as every other.

    Raises ValueError for images of less than 16 pixels.
    """
    check_size(image_size, 2 ** (len(_GROUPS) - 1))
    inputs = stem_width(layers, width, scaled_stem)
    chain: list[nn.Module] = [normalize, *stem_layers("small", channels, inputs)]
    for number, group in enumerate(_GROUPS):
        if number:
            chain.append(nn.MaxPool2d(2))
        layers.begin_block(inputs)
        for factor in group if number else group[1:]:
            outputs = layers.width(factor * width)
            chain += [conv_norm(layers, inputs, outputs), nn.ReLU()]
            inputs = outputs
    chain += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs.kept, hidden), nn.ReLU()]
    return Chain(*chain, nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
