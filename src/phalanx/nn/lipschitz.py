"""Layers that are 1-Lipschitz by construction, in L2 or in Linf: their weights are functions of free parameters.

What is certified is the weight itself, measured (`phalanx.bounds`): the construction makes that bound small, not sound.
"""

# O outputs, I inputs, k kernel size

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LipschitzNorm = Literal["L2", "Linf"]
"""In which norm a layer is 1-Lipschitz."""

_LEAST = 1e-12
"""What a row of zeros is divided by."""


def cayley(raw: Tensor) -> Tensor:
    """(O, I) to (O, I) with orthonormal columns, or rows where there are fewer of them, whatever the numbers in `raw`.

    With A = U - U^T + V^T V, U the square part of `raw` and V the rest: [(I - A) (I + A)^-1; -2 V (I + A)^-1], the
    Cayley transform of rectangular matrices (Trockman & Kolter, ICLR 2021). In the precision of `raw`, never autocast.
    """
    if len(raw) < raw.shape[1]:
        return cayley(raw.T).T
    with torch.autocast(raw.device.type, enabled=False):
        square, rest = raw[: raw.shape[1]], raw[raw.shape[1] :]
        skew = square - square.T + rest.T @ rest
        eye = torch.eye(len(skew), dtype=raw.dtype, device=raw.device)
        stacked = torch.cat([eye - skew, -2 * rest])
        found: Tensor = torch.linalg.solve(eye + skew, stacked, left=False)
        return found


def almost_orthogonal(kernel: Tensor) -> Tensor:
    """A kernel (O, I, k, k) with every input channel scaled so that the zero-padded convolution at stride 1, and so at
    any, has a spectral norm of at most 1 on images of every size (AOL; Prach & Lampert, ECCV 2022, theorem 2)."""
    with torch.autocast(kernel.device.type, enabled=False):
        inputs = kernel.transpose(0, 1)
        overlaps = F.conv2d(inputs, inputs, padding=[taps - 1 for taps in kernel.shape[-2:]])
        scale = overlaps.abs().sum((1, 2, 3)).clamp_min(_LEAST).rsqrt()
        return kernel * scale[:, None, None]


def row_normalised(raw: Tensor) -> Tensor:
    """(O, ...) with absolute values that sum to 1 for each output: a layer's norm from Linf to Linf."""
    return raw / raw.abs().flatten(1).sum(1).clamp_min(_LEAST).reshape(-1, *([1] * (raw.dim() - 1)))


class Constrained(nn.Module):
    """A layer whose weight is a function of its free parameters `raw`."""

    raw: nn.Parameter
    prepared = False
    """`raw` holds the weight itself: see `prepared_weights`."""

    @property
    def weight(self) -> Tensor:
        """What the input is multiplied by."""
        return self.raw if self.prepared else self._constrained()

    def _constrained(self) -> Tensor:
        raise NotImplementedError


@contextmanager
def prepared_weights(model: Callable[..., Any]) -> Iterator[None]:
    """Inside, constrained layers use weights made once, as where a network is deployed; on leaving, the free parameters
    are what they were, bit for bit. For evaluation and attacks: no gradient reaches these. A callable that is no module
    is left alone."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    layers = [module for module in modules if isinstance(module, Constrained)]
    before = [(layer.raw.data, layer.prepared) for layer in layers]
    try:
        for layer in layers:
            # another tensor in its place, not other numbers in it: a graph of the training step may hold these
            layer.raw.data = layer.weight.detach()
            layer.prepared = True
        yield
    finally:
        for layer, (raw, prepared) in zip(layers, before, strict=True):
            layer.raw.data, layer.prepared = raw, prepared


def check_norm(norm: str) -> None:
    """Raises ValueError for a norm that no layer here is 1-Lipschitz in."""
    if norm not in get_args(LipschitzNorm):
        raise ValueError(f"norm must be one of {', '.join(get_args(LipschitzNorm))}, got {norm!r}")


class LipschitzLinear(Constrained):
    """A linear layer (B, I) to (B, O): `scale` times an orthogonal one in L2, a row-normalised one in Linf."""

    def __init__(self, inputs: int, outputs: int, *, norm: str = "L2", scale: float = 1.0) -> None:
        super().__init__()
        check_norm(norm)
        self.norm, self.scale = norm, scale
        self.raw = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.raw)

    def _constrained(self) -> Tensor:
        return self.scale * (cayley(self.raw) if self.norm == "L2" else row_normalised(self.raw))

    def extra_repr(self) -> str:
        outputs, inputs = self.raw.shape
        return f"{inputs}, {outputs}, norm={self.norm}, scale={self.scale:g}"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LipschitzConv2d(Constrained):
    """A convolution of features (B, I, H, W): `patches` of k x k side by side, or zero-padded, k odd, at full size.

    In L2 one of patches is orthogonal, the other almost (`almost_orthogonal`); in Linf both are row-normalised.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, patches: bool, norm: str = "L2") -> None:
        super().__init__()
        check_norm(norm)
        self.norm, self.patches = norm, patches
        self.stride, self.padding = (kernel_size, 0) if patches else (1, kernel_size // 2)
        self.raw = nn.Parameter(torch.empty(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.raw)

    def _constrained(self) -> Tensor:
        if self.norm == "Linf":
            return row_normalised(self.raw)
        return cayley(self.raw.flatten(1)).reshape(self.raw.shape) if self.patches else almost_orthogonal(self.raw)

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.raw.shape
        return f"{inputs}, {outputs}, {size}, patches={self.patches}, norm={self.norm}"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def max_min(x: Tensor) -> Tensor:
    """(B, F, ...): of features 0 and 1 the larger one, then the smaller one; of 2 and 3 likewise; and so on."""
    first, second = x.reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:]).unbind(2)
    return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], 2).flatten(1, 2)


class MaxMin(nn.Module):
    """Sorts features in pairs (GroupSort of groups of two; Anil et al., ICML 2019): 1-Lipschitz in every norm, and it
    keeps the gradient's length, which ReLU does not. Their number must be even."""

    def forward(self, x: Tensor) -> Tensor:
        return max_min(x)
