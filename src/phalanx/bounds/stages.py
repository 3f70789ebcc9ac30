"""The layers that bounds are known for, in float64: what a network is read into (`phalanx.bounds.reading`).

A stage maps features (N, *in_shape) to (N, *out_shape). An affine one, x -> L x + b, also gives |L| r for intervals,
the transpose of L for bounds that go backwards, and bounds of ||L|| between norms.
"""

# N samples, M rows, C channels, H height, W width

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.bounds.spectral import ROUNDING, conv_upper, gram_upper
from phalanx.nn.lipschitz import max_min
from phalanx.threat import Norm

Shape: TypeAlias = tuple[int, ...]
Between: TypeAlias = tuple[Norm, Norm]
"""The norm of a layer's input and that of its output."""


class Affine(ABC):
    """x -> L x + b."""

    in_shape: Shape
    out_shape: Shape

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(N, *in_shape) to (N, *out_shape)."""

    @abstractmethod
    def absolute(self, radius: Tensor) -> Tensor:
        """|L| radius, (N, *in_shape) to (N, *out_shape)."""

    @abstractmethod
    def transpose(self, rows: Tensor) -> Tensor:
        """L^T rows, (M, *out_shape) to (M, *in_shape)."""

    @abstractmethod
    def absolute_transpose(self, rows: Tensor) -> Tensor:
        """|L|^T rows."""

    @abstractmethod
    def offset(self, rows: Tensor) -> Tensor:
        """rows . b, (M, *out_shape) to (M,)."""

    @abstractmethod
    def _operator_norms(self) -> dict[Between, float]: ...

    @cached_property
    def operator_norms(self) -> dict[Between, float]:
        """Upper bounds of ||L|| from one norm to another; those not named are unknown."""
        return {between: bound * (1 + ROUNDING) for between, bound in self._operator_norms().items()}

    def row_norms(self, norm: Norm) -> Tensor | None:
        """(1, *out_shape) or what expands to it: how far each output moves at most when the input moves by 1 in `norm`;
        None where that is not known."""
        del norm
        return None


_DUAL: dict[Norm, float] = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}


@dataclass(frozen=True, eq=False)
class Dense(Affine):
    """A linear layer on flattened features."""

    weight: Tensor
    bias: Tensor
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        return (len(self.weight),)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def absolute(self, radius: Tensor) -> Tensor:
        return radius.flatten(1) @ self.weight.abs().T

    def transpose(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight).reshape(-1, *self.in_shape)

    def absolute_transpose(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight.abs()).reshape(-1, *self.in_shape)

    def offset(self, rows: Tensor) -> Tensor:
        return rows @ self.bias

    def row_norms(self, norm: Norm) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(self.weight, ord=_DUAL[norm], dim=1)
        return size[None]

    def _operator_norms(self) -> dict[Between, float]:
        rows, columns = self.weight.abs().sum(1), self.weight.abs().sum(0)
        return {
            ("L2", "L2"): float(gram_upper(self.weight)),
            ("L1", "L2"): float(self.weight.norm(dim=0).max()),
            ("L1", "L1"): float(columns.max()),
            ("L2", "L1"): float(columns.norm()),
            ("Linf", "L2"): float(rows.norm()),
            **{(norm, "Linf"): float(self.row_norms(norm).max()) for norm in _DUAL},
        }


@dataclass(frozen=True, eq=False)
class Convolution(Affine):
    """A zero-padded convolution."""

    kernel: Tensor
    """(O, I, h, w)."""
    bias: Tensor
    stride: int
    padding: int
    in_shape: Shape

    @cached_property
    def out_shape(self) -> Shape:  # type: ignore[override]
        taps = self.kernel.shape[-2:]
        sides = ((n + 2 * self.padding - k) // self.stride + 1 for n, k in zip(self.in_shape[1:], taps, strict=True))
        return (len(self.kernel), *sides)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, self.stride, self.padding)

    def absolute(self, radius: Tensor) -> Tensor:
        return F.conv2d(radius, self.kernel.abs(), None, self.stride, self.padding)

    def _back(self, rows: Tensor, kernel: Tensor) -> Tensor:
        # pixels that the last stride leaves out have no output: they come back as zeros
        covered = [
            (out - 1) * self.stride - 2 * self.padding + taps
            for out, taps in zip(self.out_shape[1:], kernel.shape[-2:], strict=True)
        ]
        left = [size - seen for size, seen in zip(self.in_shape[1:], covered, strict=True)]
        return F.conv_transpose2d(rows, kernel, None, self.stride, self.padding, output_padding=left)

    def transpose(self, rows: Tensor) -> Tensor:
        return self._back(rows, self.kernel)

    def absolute_transpose(self, rows: Tensor) -> Tensor:
        return self._back(rows, self.kernel.abs())

    def offset(self, rows: Tensor) -> Tensor:
        return rows.sum((2, 3)) @ self.bias

    def row_norms(self, norm: Norm) -> Tensor:
        # an output at the border sees a part of the kernel: this bounds it too
        size: Tensor = torch.linalg.vector_norm(self.kernel.flatten(1), ord=_DUAL[norm], dim=1)
        return size[None, :, None, None]

    def _operator_norms(self) -> dict[Between, float]:
        columns = self.kernel.transpose(0, 1).flatten(1)
        pixels_in, pixels_out = math.prod(self.in_shape[1:]), math.prod(self.out_shape[1:])
        rows = self.kernel.flatten(1).abs().sum(1)
        return {
            ("L2", "L2"): conv_upper(self.kernel, self.in_shape[1:], self.stride, self.padding),
            ("L1", "L2"): float(columns.norm(dim=1).max()),
            ("L1", "L1"): float(columns.abs().sum(1).max()),
            ("L2", "L1"): float(columns.abs().sum(1).norm()) * math.sqrt(pixels_in),
            ("Linf", "L2"): float(rows.norm()) * math.sqrt(pixels_out),
            **{(norm, "Linf"): float(self.row_norms(norm).max()) for norm in _DUAL},
        }


@dataclass(frozen=True, eq=False)
class ChannelScale(Affine):
    """scale * x + shift for each channel: a normalisation whose statistics are fixed."""

    scale: Tensor
    """(C,)."""
    shift: Tensor
    """(C,)."""
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        return self.in_shape

    def _wide(self, values_C: Tensor) -> Tensor:
        return values_C.reshape(1, -1, *([1] * (len(self.in_shape) - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._wide(self.scale) + self._wide(self.shift)

    def absolute(self, radius: Tensor) -> Tensor:
        return radius * self._wide(self.scale).abs()

    def transpose(self, rows: Tensor) -> Tensor:
        return rows * self._wide(self.scale)

    def absolute_transpose(self, rows: Tensor) -> Tensor:
        return self.absolute(rows)

    def offset(self, rows: Tensor) -> Tensor:
        return (rows * self._wide(self.shift)).flatten(1).sum(1)

    def row_norms(self, norm: Norm) -> Tensor:
        del norm
        return self._wide(self.scale).abs()

    def _operator_norms(self) -> dict[Between, float]:
        largest = float(self.scale.abs().max())
        return {("Linf", "Linf"): largest, ("L2", "L2"): largest, ("L1", "L1"): largest}


@dataclass(frozen=True, eq=False)
class AveragePool(Affine):
    """Averages over windows, the same for every channel: rows (h, H) and columns (w, W) of averaging weights."""

    rows: Tensor
    columns: Tensor
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        return (self.in_shape[0], len(self.rows), len(self.columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T

    def absolute(self, radius: Tensor) -> Tensor:
        return self.forward(radius)

    def transpose(self, rows: Tensor) -> Tensor:
        return self.rows.T @ rows @ self.columns

    def absolute_transpose(self, rows: Tensor) -> Tensor:
        return self.transpose(rows)

    def offset(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(len(rows))

    def _operator_norms(self) -> dict[Between, float]:
        # a Kronecker product: its norms are the products of its factors'
        return {
            ("L2", "L2"): float(gram_upper(self.rows) * gram_upper(self.columns)),
            ("L1", "L1"): float(self.rows.sum(0).max() * self.columns.sum(0).max()),
            ("Linf", "Linf"): float(self.rows.sum(1).max() * self.columns.sum(1).max()),
        }


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""

    out_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0)


@dataclass(frozen=True)
class MaxPool:
    """The largest of windows that do not overlap: monotone, and 1-Lipschitz in every norm."""

    side: int
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:
        channels, height, width = self.in_shape
        return (channels, height // self.side, width // self.side)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.side)

    def windows(self, x: Tensor) -> Tensor:
        """(M, *in_shape) to (M, *out_shape, side^2): what each output is the largest of."""
        channels, height, width = self.out_shape
        seen = x[..., : height * self.side, : width * self.side]
        split = seen.reshape(-1, channels, height, self.side, width, self.side)
        return split.transpose(3, 4).flatten(4)

    def from_windows(self, values: Tensor) -> Tensor:
        """The transpose of `windows`: zero where no window looks."""
        channels, height, width = self.out_shape
        split = values.reshape(-1, channels, height, width, self.side, self.side).transpose(3, 4)
        seen = split.reshape(-1, channels, height * self.side, width * self.side)
        return F.pad(seen, (0, self.in_shape[2] - seen.shape[3], 0, self.in_shape[1] - seen.shape[2]))


@dataclass(frozen=True)
class SortedPairs:
    """MaxMin: neighbouring features in order of size. Monotone, and 1-Lipschitz in every norm."""

    out_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        return max_min(x)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, *out_shape), flattened or not, to the first and the second of all pairs, flattened."""
        split = x.reshape(len(x), self.out_shape[0] // 2, 2, math.prod(self.out_shape[1:]))
        return split[:, :, 0].flatten(1), split[:, :, 1].flatten(1)

    def from_pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """The inverse of `pairs`: (M, *out_shape)."""
        features = math.prod(self.out_shape[1:])
        halves = (side.reshape(len(side), self.out_shape[0] // 2, features) for side in (first, second))
        return torch.stack([*halves], 2).reshape(-1, *self.out_shape)


@dataclass(frozen=True)
class Residual:
    """body(x) + shortcut(x)."""

    body: tuple[Stage, ...]
    shortcut: tuple[Stage, ...]
    out_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        return forward(self.body, x) + forward(self.shortcut, x)


Stage: TypeAlias = Affine | Relu | MaxPool | SortedPairs | Residual


def forward(stages: tuple[Stage, ...], x: Tensor) -> Tensor:
    """(N, ...) through all stages."""
    for stage in stages:
        x = stage.forward(x)
    return x
