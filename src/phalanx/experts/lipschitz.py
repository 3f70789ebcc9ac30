"""Networks that are 1-Lipschitz by construction, but for their normalisation and the scale of their logits: an image
that moves by r in their norm moves every difference of logits by a known multiple of r, which is not vacuous."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from phalanx.nn import LipschitzConv2d, LipschitzLinear, MaxMin, Normalize


def lipschitz_mlp(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    hidden: Sequence[int] = (128, 128),
    norm: str = "L2",
    logit_scale: float = 1.0,
) -> nn.Module:
    """Fully connected layers of even widths `hidden`, orthogonal (`norm` L2) or row-normalised (Linf), MaxMin between.

    `logit_scale` multiplies the logits: the inverse temperature of every cross-entropy they go into. It changes no
    certificate. Raises ValueError for an odd width, an unknown norm, or a scale that is not positive.
    """
    _check(hidden, logit_scale)
    widths = [channels * image_size**2, *hidden]
    layers: list[nn.Module] = [normalize, nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [LipschitzLinear(inputs, outputs, norm=norm), MaxMin()]
    return nn.Sequential(*layers, LipschitzLinear(widths[-1], num_classes, norm=norm, scale=logit_scale))


def lipschitz_cnn(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    width: int = 32,
    hidden: int = 128,
    norm: str = "L2",
    logit_scale: float = 1.0,
) -> nn.Module:
    """Twice a 3x3 convolution (width, then 2 width) and one of 2x2 patches side by side that doubles the width, then a
    layer of `hidden`; MaxMin between. As `lipschitz_mlp` else. Raises ValueError for images of less than 4 pixels, too.
    """
    _check((width, hidden), logit_scale)
    if image_size < 4:
        raise ValueError(f"image_size must be at least 4, got {image_size}; it is halved twice")
    layers: list[nn.Module] = [normalize]
    inputs = channels
    for outputs in (width, 2 * width):
        layers += [LipschitzConv2d(inputs, outputs, 3, patches=False, norm=norm), MaxMin()]
        layers += [LipschitzConv2d(outputs, 2 * outputs, 2, patches=True, norm=norm), MaxMin()]
        inputs = 2 * outputs
    features = inputs * (image_size // 2 // 2) ** 2
    layers += [nn.Flatten(), LipschitzLinear(features, hidden, norm=norm), MaxMin()]
    return nn.Sequential(*layers, LipschitzLinear(hidden, num_classes, norm=norm, scale=logit_scale))


def _check(widths: Sequence[int], logit_scale: float) -> None:
    for width in widths:
        if width < 2 or width % 2:
            raise ValueError(f"widths must be even, MaxMin sorts features in pairs, got {width}")
    if not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale must be positive, got {logit_scale}")
