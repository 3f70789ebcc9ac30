"""The first layers of a backbone, which no router ever chooses."""

from __future__ import annotations

from typing import Literal

from torch import nn

from phalanx.nn import ConvBN, Layers
from phalanx.nn.routed import Width

Stem = Literal["small", "imagenet"]


def stem_width(layers: Layers, channels: int, scaled: bool) -> Width:
    """That of a stem with `channels` in the unscaled network; all experts read all of it."""
    return Width.whole(layers.width(channels).kept if scaled else channels)


def stem_layers(stem: Stem, channels: int, width: Width, *, bare: bool = False) -> list[nn.Module]:
    """A 3x3 convolution at full resolution ("small", for 32 and 64 pixels), or 7x7 and max-pooling down to a quarter
    ("imagenet", for 224); with BatchNorm and ReLU, which a `bare` small stem leaves to the pre-activation after it.

    Raises ValueError for another stem.
    """
    if stem == "imagenet":
        return [ConvBN(channels, width.kept, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    if stem != "small":
        raise ValueError(f"stem must be small or imagenet, got {stem!r}")
    if bare:
        return [nn.Conv2d(channels, width.kept, 3, padding=1, bias=False)]
    return [ConvBN(channels, width.kept), nn.ReLU()]


def check_size(image_size: int, least: int, stem: Stem = "small") -> None:
    """Raises ValueError for images that would shrink to nothing: what follows the stem needs `least` pixels."""
    # 7x7 and max-pooling both halve, rounding up
    needed = 4 * (least - 1) + 1 if stem == "imagenet" else least
    if image_size < needed:
        raise ValueError(f"image_size must be at least {needed}, got {image_size}; its pooling would leave no pixel")
