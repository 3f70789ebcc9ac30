"""Small mixtures in float64, and counters of what a forward pass does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from phalanx.routing import LinearRouter, MixtureOfExperts

SHAPE = (1, 4, 4)


def images(size: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(size, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, classes))


def small_mixture(experts: int, top_k: int | str = 1, seed: int = 0, **options: Any) -> MixtureOfExperts:
    torch.manual_seed(seed)
    router = LinearRouter(SHAPE, experts)
    model = MixtureOfExperts(router, [small_network() for _ in range(experts)], top_k, **options)
    return model.double().eval()


class Kernels(TorchDispatchMode):
    """Counts the operators that launch work on a device: views and bare allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith("empty")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


# each of these makes the host wait for the device; bincount does so twice, to size its answer
WAITS = {"tolist", "item", "cpu", "numpy", "nonzero", "bincount", "unique", "masked_select", "repeat_interleave"}
WAITS |= {"__bool__", "__int__", "__float__", "__index__", "where_single"}


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a device, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS or (name == "__getitem__" and _has_mask(args[1])):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def gradients(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of a fixed function of them in the images and in every parameter."""
    leaf = x.clone().requires_grad_()
    logits = function(leaf)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    parts = [leaf, *model.parameters()]
    found = torch.autograd.grad((weights * logits.tanh()).sum(), parts, allow_unused=True)
    return logits.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=True)]
