"""The least move onto a hyperplane inside the box, one image at a time in float64, by bisection and by a sort."""

from __future__ import annotations

import torch
from torch import Tensor


def least_move(x: Tensor, slope: Tensor, value: float, norm: str) -> Tensor:
    """The move d (D,) of least norm with value + <slope, d> = 0 and 0 <= x + d <= 1; where there is none, the corner of
    the box nearest to the hyperplane."""
    x, slope = x.double(), slope.double()
    downhill = -slope if value > 0 else slope
    room = torch.where(downhill > 0, 1 - x, x) * (slope != 0)
    steep, needed = slope.abs(), abs(value)
    if float((steep * room).sum()) <= needed:
        return downhill.sign() * room
    if norm == "L1":
        return downhill.sign() * _steepest_first(steep, room, needed)

    def at(level: float) -> Tensor:
        return torch.minimum(level * (torch.ones_like(steep) if norm == "Linf" else steep), room)

    below, above = 0.0, 1.0
    while float((steep * at(above)).sum()) < needed:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if float((steep * at(middle)).sum()) < needed else (below, middle)
    return downhill.sign() * at(above)


def _steepest_first(steep: Tensor, room: Tensor, needed: float) -> Tensor:
    """A fractional knapsack: the pixels in falling order of their slope, each moved all the way while it is needed."""
    size = torch.zeros_like(room)
    for pixel in steep.argsort(descending=True).tolist():
        size[pixel] = min(float(room[pixel]), needed / float(steep[pixel])) if steep[pixel] else 0.0
        needed -= float(steep[pixel] * size[pixel])
        if needed <= 0:
            break
    return size
