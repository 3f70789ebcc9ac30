"""ResNet-18 (He et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from phalanx.experts.stems import Stem, stem_layers, stem_width
from phalanx.nn import ConvBN, Layers, Normalize, Plan, RoutedLayer
from phalanx.nn.routed import Chain, Width, conv_norm, follow

_BLOCKS = (2, 2, 2, 2)


class BasicBlock(RoutedLayer):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(
        self, layers: Layers, inputs: Width, outputs: Width, stride: int, *, routed_shortcut: bool = False
    ) -> None:
        super().__init__()
        layers.begin_block(inputs)
        self.body = Chain(
            conv_norm(layers, inputs, outputs, stride=stride), nn.ReLU(), conv_norm(layers, outputs, outputs)
        )
        self.shortcut: nn.Module
        if stride == 1 and inputs.kept == outputs.kept:
            self.shortcut = nn.Identity()
        elif routed_shortcut:
            self.shortcut = conv_norm(layers, inputs, outputs, 1, stride=stride)
        else:
            self.shortcut = ConvBN(inputs.kept, outputs.kept, 1, stride=stride)

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        out: Tensor = (self.body(x, plan) + follow(self.shortcut, x, plan)).relu()
        return out


def resnet18(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    layers: Layers,
    width: int = 64,
    stem: Stem = "small",
    scaled_stem: bool | None = None,
    routed_shortcuts: bool | None = None,
) -> nn.Module:
    """11.17 M parameters and 0.555 G multiply-adds at width 64, 32x32x3 and 10 classes; stages of width
    (1, 2, 4, 8) x `width`. Global average pooling makes it independent of `image_size`.

    Args:
        stem: 3x3 for small images, 7x7 and pooling for those of ImageNet.
        scaled_stem: the stem has its share of channels, as every other layer. By default it has, but for a routed
            network on small images, where AdvMoE's code leaves it whole, which adds a shortcut to the first block.
        routed_shortcuts: the shortcuts' convolutions are routed, too. By default they are behind the ImageNet stem and
            are shared behind the small one (AdvMoE's code).
    """
    del image_size
    imagenet = stem == "imagenet"
    inputs = stem_width(layers, width, (imagenet or not layers.routed) if scaled_stem is None else scaled_stem)
    routed_shortcut = imagenet if routed_shortcuts is None else routed_shortcuts
    chain: list[nn.Module] = [normalize, *stem_layers(stem, channels, inputs)]
    for stage, blocks in enumerate(_BLOCKS):
        outputs = layers.width(width * 2**stage)
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            chain.append(BasicBlock(layers, inputs, outputs, stride, routed_shortcut=routed_shortcut))
            inputs = outputs
    return Chain(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs.kept, num_classes))
