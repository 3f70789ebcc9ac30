"""One routing decision made ready for the layers of a network that follow it."""

# B batch, E experts, K selected, A = B*K assignments

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phalanx.routing.route import Route
from phalanx.routing.stats import assignment_counts, weights_by_expert

Side: TypeAlias = Literal["input", "output"]


class _UnitGate(torch.autograd.Function):
    """x times weights that are exactly 1: x itself, and for the weights the gradient <dL/dx, x>."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights_B: Tensor) -> Tensor:
        del weights_B
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return gradient, _row_products(gradient, x)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """(B,) <a[b], b[b]>, read once from memory where both are laid out alike."""
    if a.dim() == 4 and not (a.is_contiguous() and b.is_contiguous()):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.bmm(a.flatten(1)[:, None], b.flatten(1)[..., None]).flatten()


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which expert computes which row, and what multiplies its output."""

    route: Route
    sizes: tuple[int, ...]
    """Assignments of each expert; empty where every expert computes every row."""
    order: Tensor | None
    """(A,) assignments sorted by expert; None where the rows are sorted already."""
    unit: bool
    """Every row has one expert, of weight exactly 1."""

    @classmethod
    def of(cls, route: Route) -> Assignment:
        """One device-to-host wait, none where every expert computes every row."""
        rows, selected = route.experts.shape
        if route.num_experts == 1:
            return cls(route, (rows,), None, unit=False)
        if selected == route.num_experts:
            return cls(route, (), None, unit=False)
        counts_E = assignment_counts(route.experts, route.num_experts)
        *sizes, ones = torch.cat([counts_E, (route.weights == 1).all()[None]]).tolist()
        sorted_already = selected == 1 and max(sizes) == rows
        order_A = None if sorted_already else route.experts.flatten().argsort(stable=True)
        return cls(route, tuple(sizes), order_A, unit=bool(ones) and selected == 1)

    def sort(self) -> tuple[Tensor, Assignment] | None:
        """The rows' order by expert and the assignment of rows so ordered: what saves every layer its own sorting.
        None where there is nothing to sort, or no one order, an image having several experts."""
        if self.order is None or self.route.experts.shape[1] > 1:
            return None
        return self.order, Assignment(_rows(self.route, self.order), self.sizes, None, self.unit)

    def by_expert(self) -> Iterator[tuple[slice, Assignment]]:
        """Each expert's rows, and its assignment for them alone; of an assignment of sorted rows."""
        assert self.order is None
        start = 0
        for expert, size in enumerate(self.sizes):
            rows = slice(start, start + size)
            if size:
                sizes = tuple(size if other == expert else 0 for other in range(len(self.sizes)))
                yield rows, Assignment(_rows(self.route, rows), sizes, None, self.unit)
            start += size

    def mix(
        self, x: Tensor, functions: Sequence[Callable[[Tensor], Tensor]], *, gated: Side | None = "input"
    ) -> Tensor:
        """sum_k weights[:, k] * functions[experts[:, k]](x), each function once on the rows x (B, ...) of its expert.

        The functions are linear, and may add a constant where all weights are exactly 1. `gated` says where such a
        weight's gradient is taken, which is the same on both sides: <dL/dx, x> = <dL/dy, y> for the linear part y, at
        the "output" only if no constant is added. With None, for functions that are not linear, a weight that is
        exactly 1 passes no gradient to the gate.
        """
        if not self.sizes:
            weights_EB = weights_by_expert(self.route).unbind(1)
            return torch.stack(
                [scaled(function(x), weights_B) for function, weights_B in zip(functions, weights_EB, strict=True)]
            ).sum(0)
        if not (self.unit and self.route.weights.requires_grad and torch.is_grad_enabled()):
            gated = None
        if gated == "input":
            x = _UnitGate.apply(x, self.route.weights[:, 0])
        y = self._grouped(x, functions)
        if gated == "output":
            y = _UnitGate.apply(y, self.route.weights[:, 0])
        if self.unit:
            return y
        y = scaled(y, self.route.weights.flatten())
        selected = self.route.experts.shape[1]
        return y if selected == 1 else y.view(-1, selected, *y.shape[1:]).sum(1)

    def _grouped(self, x: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """(A, ...) each row's image through each of its experts."""
        rows = x if self.order is None else x.index_select(0, self.order // self.route.experts.shape[1])
        if len(rows) in self.sizes:
            # splitting off all of them would copy the gradient on its way back
            return functions[self.sizes.index(len(rows))](rows)
        groups = torch.split(rows, list(self.sizes))
        y = torch.cat([function(group) for function, group in zip(functions, groups, strict=True) if len(group)])
        return y if self.order is None else y.index_select(0, inverse(self.order))


def _rows(route: Route, rows: Tensor | slice) -> Route:
    return Route(route.scores[rows], route.experts[rows], route.weights[rows])


def scaled(y: Tensor, weights_B: Tensor) -> Tensor:
    """Row b of y (B, ...) times weights_B[b]."""
    return y * weights_B.reshape(-1, *[1] * (y.dim() - 1))


def inverse(order_A: Tensor) -> Tensor:
    """(A,) the permutation that undoes `order_A`."""
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    return back_A
