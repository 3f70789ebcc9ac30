"""Auto-PGD as printed, one image at a time in float64, every index written out (Croce & Hein 2020 and 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reference.projection import nearest_in_l1_ball

Function = Callable[[Tensor], tuple[float, Tensor]]
"""An image (D,) to the objective and its gradient there."""


class Run(NamedTuple):
    best: Tensor
    value: float
    sizes: list[float]
    """The step sizes in the order they were used."""
    sparsity: list[float]
    """Of L1, the pixels to move."""


def projected(z: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "Linf":
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    if norm == "L2":
        length = float((z - x).norm())
        return (x + (z - x) * min(1.0, eps / length) if length else x).clamp(0, 1)
    return x + nearest_in_l1_ball(z - x, -x, 1 - x, eps)


def checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j steps) with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] <= 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({int(-(-round(100 * share) * steps // 100)) for share in shares[1:] if round(100 * share) <= 100})


def with_momentum(f: Function, x: Tensor, start: Tensor, norm: str, eps: float, steps: int) -> Run:
    """Algorithm 1 for Linf and L2."""

    def ascent(z: Tensor, gradient: Tensor, size: float) -> Tensor:
        direction = gradient.sign() if norm == "Linf" else gradient / max(float(gradient.norm()), 1e-300)
        return projected(z + size * direction, x, norm, eps)

    size, previous, point = 2 * eps, start, start
    value, gradient = f(start)
    best = (start, value, gradient)
    sizes, marks, rises = [], checkpoints(steps), 0
    at_mark, halved, last = value, False, 0
    for k in range(1, steps + 1):
        sizes.append(size)
        z = ascent(point, gradient, size)
        new = z if k == 1 else projected(point + 0.75 * (z - point) + 0.25 * (point - previous), x, norm, eps)
        previous, before = point, value
        point = new
        value, gradient = f(point)
        rises += value > before
        if value > best[1]:
            best = (point, value, gradient)
        if k in marks:
            few, no_better = rises < 0.75 * (k - last), not halved and best[1] == at_mark
            halved = few or no_better
            if halved:
                size /= 2
                point, value, gradient = best
            at_mark, last, rises = best[1], k, 0
    return Run(best[0], best[1], sizes, [])


def sparse(f: Function, x: Tensor, start: Tensor, eps: float, steps: int, *, fresh: bool) -> Run:
    """The 2021 paper's Algorithm 1, for L1."""
    period, count = max(int(0.04 * steps), 1), float((start != x).sum())
    moved = 0.2 * len(x) if fresh else count / 1.5
    changed = float(len(x)) if fresh else count
    size, point = eps, start
    value, gradient = f(start)
    best = (start, value, gradient)
    sizes, sparsity = [], []
    for k in range(1, steps + 1):
        sizes.append(size)
        sparsity.append(moved)
        chosen = gradient.abs().argsort(descending=True)[: min(max(round(moved), 1), len(x))]
        direction = torch.zeros_like(x)
        direction[chosen] = gradient[chosen].sign()
        direction /= max(float(direction.abs().sum()), 1.0)
        point = projected(point + size * direction, x, "L1", eps)
        value, gradient = f(point)
        if value > best[1]:
            best = (point, value, gradient)
        if k % period == 0:
            now = float((best[0] != x).sum())
            if now < 0.95 * changed:
                size, (point, value, gradient) = eps, best
            else:
                size = max(size / 1.5, eps / 10)
            changed, moved = now, now / 1.5
    return Run(best[0], best[1], sizes, sparsity)
