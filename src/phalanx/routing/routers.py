"""Routers: images in [0, 1] to one score per expert. Normalisation is their first layer, as it is an expert's."""

# B batch, E experts

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from phalanx.nn import ConvBN, LipschitzLinear, MaxMin, Normalize, record
from phalanx.routing.resnet_router import ResNetRouter

Shape = Sequence[int]

DEFAULT_MEAN, DEFAULT_STD = 0.5, 0.25


def _normalize(shape: Shape, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    channels = shape[0]
    return Normalize(mean or (DEFAULT_MEAN,) * channels, std or (DEFAULT_STD,) * channels)


def _pixels(shape: Shape) -> int:
    channels, height, width = shape
    return channels * height * width


class LinearRouter(nn.Sequential):
    """One linear layer on the normalised pixels; (B, *shape) -> (B, num_experts)."""

    def __init__(
        self,
        shape: Shape,
        num_experts: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(_normalize(shape, mean, std), nn.Flatten(), nn.Linear(_pixels(shape), num_experts))
        record(self, "router.linear", shape=list(shape), num_experts=num_experts, mean=mean, std=std)


class MLPRouter(nn.Sequential):
    """Fully connected layers with ReLU between; the default widths are Divided We Fall's gate (1024-512-128-E)."""

    def __init__(
        self,
        shape: Shape,
        num_experts: int,
        *,
        hidden: Sequence[int] = (1024, 512, 128),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        widths = [_pixels(shape), *hidden]
        layers: list[nn.Module] = [_normalize(shape, mean, std), nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_experts))
        record(
            self,
            "router.mlp",
            shape=list(shape),
            num_experts=num_experts,
            hidden=list(hidden),
            mean=mean,
            std=std,
        )


class CNNRouter(nn.Sequential):
    """Stride-2 convolutions with BatchNorm and ReLU, global average pooling, one linear layer."""

    def __init__(
        self,
        shape: Shape,
        num_experts: int,
        *,
        hidden: Sequence[int] = (16, 32, 64),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        layers: list[nn.Module] = [_normalize(shape, mean, std)]
        widths = [shape[0], *hidden]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [ConvBN(inputs, outputs, stride=2), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_experts)]
        super().__init__(*layers)
        record(
            self,
            "router.cnn",
            shape=list(shape),
            num_experts=num_experts,
            hidden=list(hidden),
            mean=mean,
            std=std,
        )


class LipschitzRouter(nn.Sequential):
    """Orthogonal (`norm` L2) or row-normalised (Linf) layers with MaxMin between, of even widths `hidden`: normalised
    pixels that move by r in that norm move every difference of two scores by at most sqrt(2) r in L2, 2 r in Linf.

    Certificates know how late another expert can come in; the mixture's temperature says what a score is worth.
    Raises ValueError for an odd width or another norm.
    """

    def __init__(
        self,
        shape: Shape,
        num_experts: int,
        *,
        hidden: Sequence[int] = (64,),
        norm: str = "L2",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        odd = [width for width in hidden if width % 2]
        if odd:
            raise ValueError(f"hidden must hold even widths, MaxMin sorts features in pairs, got {odd[0]}")
        layers: list[nn.Module] = [_normalize(shape, mean, std), nn.Flatten()]
        widths = [_pixels(shape), *hidden]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [LipschitzLinear(inputs, outputs, norm=norm), MaxMin()]
        super().__init__(*layers, LipschitzLinear(widths[-1], num_experts, norm=norm))
        record(
            self,
            "router.lipschitz",
            shape=list(shape),
            num_experts=num_experts,
            hidden=list(hidden),
            norm=norm,
            mean=mean,
            std=std,
        )


class UniformRouter(nn.Module):
    """Scores of zero for every expert, whatever the image: no parameters. With the soft gate all weigh the same."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        record(self, "router.uniform", num_experts=num_experts)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, num_experts)."""
        return x.new_zeros(len(x), self.num_experts)


ROUTERS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearRouter,
    "mlp": MLPRouter,
    "cnn": CNNRouter,
    "resnet20": ResNetRouter,
    "lipschitz": LipschitzRouter,
}


def build_router(name: str, shape: Shape, num_experts: int, **arguments: Any) -> nn.Module:
    """The router registered as `name`; raises ValueError for an unknown one."""
    if name not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {name!r}")
    return ROUTERS[name](shape, num_experts, **arguments)
