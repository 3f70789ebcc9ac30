"""DenseNet-BC (Huang et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phalanx.experts.stems import Stem, check_size, stem_layers, stem_width
from phalanx.nn import Layers, Normalize, Plan, RoutedLayer
from phalanx.nn.routed import Chain, Width

_BLOCKS = 3
_BOTTLENECK = 4


class DenseLayer(RoutedLayer):
    """What has been computed so far, and `growth` new channels: BatchNorm and ReLU before a 1x1 convolution to four
    times as many, and before a 3x3 one."""

    def __init__(self, layers: Layers, inputs: Width, growth: Width) -> None:
        super().__init__()
        inner = Width(_BOTTLENECK * growth.full, _BOTTLENECK * growth.kept)
        self.body = Chain(
            layers.norm(inputs),
            nn.ReLU(),
            layers.conv(inputs, inner, 1),
            layers.norm(inner),
            nn.ReLU(),
            layers.conv(inner, growth),
        )

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        return torch.cat([x, self.body(x, plan)], 1)


def densenet(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    layers: Layers,
    depth: int = 40,
    growth: int = 12,
    stem: Stem = "small",
    scaled_stem: bool = True,
) -> nn.Module:
    """DenseNet-BC-`depth`-`growth`; at 40-12, 32x32x3 and 10 classes 0.0724 G multiply-adds. Three blocks of
    (depth - 4) / 6 dense layers; between them a 1x1 convolution to half the channels, never routed, and pooling. What a
    routed layer adds is `growth` channels of the selected expert.

    Args:
        stem: 3x3 to 2 x `growth` channels for small images, 7x7 and pooling for those of ImageNet.
        scaled_stem: the stem has its share of channels, as every other layer.

    Raises ValueError for a depth that is not 6n + 4, for images of less than 4 pixels (13 with the ImageNet stem), and
    for overlapping experts: channels joined from several layers are no band of one.
    """
    dense_layers, rest = divmod(depth - 4, 2 * _BLOCKS)
    if rest or dense_layers < 1:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, ..., 40, ...), got {depth}")
    if layers.overlap:
        raise ValueError("overlap means nothing where layers read channels joined from several others; leave it out")
    check_size(image_size, 2 ** (_BLOCKS - 1), stem)
    inputs, added = stem_width(layers, 2 * growth, scaled_stem), layers.width(growth)
    chain: list[nn.Module] = [normalize, *stem_layers(stem, channels, inputs, bare=True)]
    for block in range(_BLOCKS):
        if block:
            outputs = inputs.kept // 2
            reduction = nn.Conv2d(inputs.kept, outputs, 1, bias=False)
            chain += [layers.norm(inputs), nn.ReLU(), reduction, nn.AvgPool2d(2)]
            inputs = Width.whole(outputs)
        layers.begin_block(inputs)
        for _ in range(dense_layers):
            chain.append(DenseLayer(layers, inputs, added))
            inputs = Width.whole(inputs.kept + added.kept)
    head = [layers.norm(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs.kept, num_classes)]
    return Chain(*chain, *head)
