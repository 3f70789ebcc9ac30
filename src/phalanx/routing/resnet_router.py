"""AdvMoE's router: a ResNet-20 on the image."""

# B batch, E experts

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import ConvBN, Normalize, record

_WIDTHS = (16, 32, 64)
_BLOCKS_PER_STAGE = 3
_FULL_RESOLUTION = 64
"""Larger images are reduced to a quarter first: at 224 pixels the router alone would cost more than a ResNet-18."""


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: where the shape changes, every second row and column,
    and zeros for the new channels (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.missing = (out_channels - in_channels) // 2
        self.body = nn.Sequential(
            ConvBN(in_channels, out_channels, stride=self.stride), nn.ReLU(), ConvBN(out_channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.missing, self.missing))
        out: Tensor = (self.body(x) + shortcut).relu()
        return out


class ResNetRouter(nn.Sequential):
    """ResNet-20 for small images (He et al. 2016); (B, *shape) -> (B, num_experts).

    269,202 parameters and 0.041 G multiply-adds at 32x32x3 and two experts. Images of more than 64 pixels are averaged
    to a quarter of their size first (our choice; at full resolution it would cost 1.99 G at 224 pixels).
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_experts: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        channels, height, width = shape
        layers: list[nn.Module] = [Normalize(mean or (0.5,) * channels, std or (0.25,) * channels)]
        if max(height, width) > _FULL_RESOLUTION:
            layers.append(nn.AvgPool2d(4))
        layers += [ConvBN(channels, _WIDTHS[0]), nn.ReLU()]
        inputs = _WIDTHS[0]
        for outputs in _WIDTHS:
            for _ in range(_BLOCKS_PER_STAGE):
                layers.append(_Block(inputs, outputs))
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_experts))
        record(self, "router.resnet20", shape=list(shape), num_experts=num_experts, mean=mean, std=std)
