"""ResNet-18 for small images (He et al. 2016, with the 3x3 stride-1 stem and no pooling of the CIFAR literature)."""

from __future__ import annotations

from torch import Tensor, nn

from phalanx.nn import ConvBN, Normalize

_BLOCKS = (2, 2, 2, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBN(in_channels, out_channels, stride=stride), nn.ReLU(), ConvBN(out_channels, out_channels)
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ConvBN(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.body(x) + self.shortcut(x)).relu()
        return out


def resnet18(normalize: Normalize, *, num_classes: int, image_size: int, channels: int, width: int = 64) -> nn.Module:
    """11.17 M parameters and 0.555 G multiply-adds at width 64, 32x32x3 and 10 classes; stages of width
    (1, 2, 4, 8) x `width`. Global average pooling makes it independent of `image_size`."""
    del image_size
    layers: list[nn.Module] = [normalize, ConvBN(channels, width), nn.ReLU()]
    inputs = width
    for stage, blocks in enumerate(_BLOCKS):
        outputs = width * 2**stage
        for block in range(blocks):
            layers.append(BasicBlock(inputs, outputs, stride=2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
