"""Networks of which some layers are routed: the routes of a pass travel as an argument, nothing is kept on modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor, nn


class Plan(Protocol):
    """What one forward pass tells its routed layers."""

    def at(self, site: int, x: Tensor) -> Any:
        """The decision of `site` for features x (B, ...): the first layer of a site that asks has it made."""
        ...


class RoutedLayer(nn.Module):
    """A layer that takes the pass's plan besides the features, because it is routed or holds layers that are.

    Without a plan, a network none of whose layers is routed is an ordinary one.
    """


class FoldableLayer(RoutedLayer, ABC):
    """A routed layer w * f(x), f linear and w the gate's weights, that can take over a BatchNorm after it."""

    out_channels: int

    @abstractmethod
    def fold(self, scale_C: Tensor, shift_C: Tensor) -> None:
        """From now on compute w * (scale * f(x)) + shift, per output channel: exactly scale * (w * f(x)) + shift."""


def follow(layer: nn.Module, x: Tensor, plan: Plan | None) -> Tensor:
    """layer(x), with the plan for a layer that takes one."""
    out: Tensor = layer(x, plan) if isinstance(layer, RoutedLayer) else layer(x)
    return out


class Chain(nn.Sequential, RoutedLayer):
    """One layer after the other; those that are routed get the plan. Called as a whole only: see `fold_batchnorm`."""

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        for layer in self:
            x = follow(layer, x, plan)
        return x


class Width(NamedTuple):
    """How many channels the features between two layers have."""

    full: int
    """In the unscaled network."""
    kept: int
    """In this one: of one expert, where the layer they come from is routed."""

    @classmethod
    def whole(cls, channels: int) -> Self:
        """Features that are no expert's own: every layer that follows reads all of their `channels`."""
        return cls(channels, channels)


class Layers(Protocol):
    """How a backbone makes the layers that may be routed, and how wide they are."""

    @property
    def routed(self) -> bool:
        """Whether they are."""
        ...

    @property
    def overlap(self) -> bool:
        """Whether experts are bands of the unscaled network's channels, so that features joined from several layers
        are no band."""
        ...

    def width(self, channels: int) -> Width:
        """That of a layer with `channels` in the unscaled network. Raises ValueError if none is kept."""
        ...

    def begin_block(self, inputs: Width) -> None:
        """What follows is a new block, on features of width `inputs`."""
        ...

    def conv(self, inputs: Width, outputs: Width, kernel_size: int = 3, *, stride: int = 1) -> nn.Module:
        """A bias-free convolution, padded to keep the size at stride 1."""
        ...

    def norm(self, width: Width) -> nn.Module:
        """A BatchNorm of features that a routed layer made or reads."""
        ...


class PlainLayers:
    """No layer is routed: the network narrowed to `scale` of every width, truncated (S-Dense of the AdvMoE paper)."""

    routed = False
    overlap = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def width(self, channels: int) -> Width:
        """See `Layers`."""
        return Width(channels, scaled_width(channels, self.scale))

    def begin_block(self, inputs: Width) -> None:
        """Nothing depends on it."""

    def conv(self, inputs: Width, outputs: Width, kernel_size: int = 3, *, stride: int = 1) -> nn.Module:
        """See `Layers`."""
        return nn.Conv2d(inputs.kept, outputs.kept, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)

    def norm(self, width: Width) -> nn.Module:
        """See `Layers`."""
        return nn.BatchNorm2d(width.kept)


def scaled_width(channels: int, scale: float) -> int:
    """`scale` of `channels`, truncated. Raises ValueError if none is left, or for a scale outside (0, 1]."""
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    # 0.29 * 100 is 28.999999999999996
    kept = int(scale * channels + 1e-9)
    if kept < 1:
        raise ValueError(f"scale {scale} leaves no channel of a layer of {channels}; raise it, or widen the network")
    return kept


def conv_norm(layers: Layers, inputs: Width, outputs: Width, kernel_size: int = 3, *, stride: int = 1) -> Chain:
    """A convolution that may be routed, and its BatchNorm."""
    return Chain(layers.conv(inputs, outputs, kernel_size, stride=stride), layers.norm(outputs))
