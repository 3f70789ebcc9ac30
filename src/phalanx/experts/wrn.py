"""Wide residual networks (Zagoruyko and Komodakis 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from phalanx.experts.stems import Stem, stem_layers, stem_width
from phalanx.nn import Layers, Normalize, Plan, RoutedLayer
from phalanx.nn.routed import Chain, Width, follow

_WIDTH = 16


class PreActivationBlock(RoutedLayer):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and a shortcut.

    Where the shape changes the shortcut is a 1x1 convolution of the activated input, elsewhere the input as it is.
    """

    def __init__(self, layers: Layers, inputs: Width, outputs: Width, stride: int, *, routed_shortcut: bool) -> None:
        super().__init__()
        layers.begin_block(inputs)
        self.activation = Chain(layers.norm(inputs), nn.ReLU())
        self.body = Chain(
            layers.conv(inputs, outputs, stride=stride),
            layers.norm(outputs),
            nn.ReLU(),
            layers.conv(outputs, outputs),
        )
        self.shortcut: nn.Module | None = None
        if stride > 1 or inputs.kept != outputs.kept:
            self.shortcut = (
                layers.conv(inputs, outputs, 1, stride=stride)
                if routed_shortcut
                else nn.Conv2d(inputs.kept, outputs.kept, 1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        activated = self.activation(x, plan)
        out: Tensor = self.body(activated, plan)
        return out + (x if self.shortcut is None else follow(self.shortcut, activated, plan))


def wrn(
    normalize: Normalize,
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    layers: Layers,
    depth: int = 28,
    widen: int = 10,
    stem: Stem = "small",
    scaled_stem: bool = True,
    routed_shortcuts: bool = True,
) -> nn.Module:
    """WRN-`depth`-`widen`; at 28-10, 32x32x3 and 10 classes 36.48 M parameters and 5.243 G multiply-adds. Three groups
    of (depth - 4) / 6 blocks, of width (1, 2, 4) x 16 `widen`. Independent of `image_size`.

    Args:
        stem: 3x3 for small images, 7x7 and pooling for those of ImageNet.
        scaled_stem: the stem has its share of channels, as every other layer.
        routed_shortcuts: the shortcuts' convolutions are routed, too, where the others are.

    Raises ValueError for a depth that is not 6n + 4.
    """
    del image_size
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}")
    inputs = stem_width(layers, _WIDTH, scaled_stem)
    chain: list[nn.Module] = [normalize, *stem_layers(stem, channels, inputs, bare=True)]
    for group in range(3):
        outputs = layers.width(_WIDTH * widen * 2**group)
        for block in range(blocks):
            stride = 2 if group and not block else 1
            chain.append(PreActivationBlock(layers, inputs, outputs, stride, routed_shortcut=routed_shortcuts))
            inputs = outputs
    head = [layers.norm(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs.kept, num_classes)]
    return Chain(*chain, *head)
