"""A route is data: which experts answer for each image, with which weights, and the scores that decided it.

A route is a tree. Its leaves are `Route`; a layer-level mixture has a tuple of them, a dual model a pair. Every
function here maps over the tree, so an attack that holds, softens or forces a route is one line for any model.
"""

# B batch, E experts, K selected, C classes

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, Union, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Route:
    """One routing decision for a batch."""

    scores: Tensor
    """(B, E) router logits."""
    experts: Tensor
    """(B, K) int64, the selected experts, distinct within a row."""
    weights: Tensor
    """(B, K) what multiplies each selected expert's logits; carries the router's gradient."""

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]


RouteTree: TypeAlias = Union[Route, "tuple[RouteTree, ...]"]


class Routed(NamedTuple):
    """What a forward pass returns: logits (B, C), and the route they came by (None for a model without one)."""

    logits: Tensor
    route: RouteTree | None


@runtime_checkable
class RoutedModel(Protocol):
    """A classifier that is one function with an optional route (design: "A routed model")."""

    def __call__(self, x: Tensor) -> Any: ...
    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed: ...
    def gate(self, x: Tensor) -> RouteTree: ...
    def players(self) -> Mapping[str, Sequence[nn.Parameter]]: ...


def require_routed(name: str, model: nn.Module) -> RoutedModel:
    """`model`, called `name`. Raises TypeError unless it is a routed model."""
    if not isinstance(model, RoutedModel):
        raise TypeError(
            f"{name} must be a routed model, got {type(model).__name__}; "
            "wrap a single network: MixtureOfExperts(None, [network])"
        )
    return model


def routed(model: Callable[[Tensor], Any], x: Tensor) -> Routed:
    """Decide and compute in one pass; any callable images -> logits is a model without a route."""
    if isinstance(model, RoutedModel):
        return model.routed(x)
    return Routed(model(x), None)


def map_route(function: Callable[[Route], RouteTree], tree: RouteTree) -> RouteTree:
    """The same tree with `function` applied to every leaf."""
    if isinstance(tree, Route):
        return function(tree)
    branches = [map_route(function, branch) for branch in tree]
    # a named pair keeps its names
    return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)  # type: ignore[arg-type]


def leaves(tree: RouteTree) -> Iterator[Route]:
    """The leaves from left to right."""
    if isinstance(tree, Route):
        yield tree
    else:
        for branch in tree:
            yield from leaves(branch)


def dense(tree: RouteTree, temperature: float = 1.0) -> RouteTree:
    """Every expert answers, weighted by softmax(scores / temperature): differentiable through the scores."""

    def soften(leaf: Route) -> Route:
        experts_BE = torch.arange(leaf.num_experts, device=leaf.scores.device).expand_as(leaf.scores)
        return Route(leaf.scores, experts_BE, (leaf.scores / temperature).softmax(-1))

    return map_route(soften, tree)


def only(tree: RouteTree, expert: int) -> RouteTree:
    """Every image goes to `expert` with weight 1, at every leaf; raises ValueError if a leaf has no such expert."""

    def force(leaf: Route) -> Route:
        if not 0 <= expert < leaf.num_experts:
            raise ValueError(f"expert must be in 0..{leaf.num_experts - 1}, got {expert}")
        experts_B1 = torch.full_like(leaf.scores[:, :1], expert, dtype=torch.int64)
        return Route(leaf.scores, experts_B1, torch.ones_like(leaf.scores[:, :1]))

    return map_route(force, tree)


def pin(tree: RouteTree) -> RouteTree:
    """The same decision without gradient: what holds a route while the image moves."""
    return map_route(lambda leaf: Route(leaf.scores.detach(), leaf.experts, leaf.weights.detach()), tree)


def select(tree: RouteTree, index: Tensor) -> RouteTree:
    """The rows `index` (integers or a mask) of every leaf: the route follows the batch as samples drop."""
    return map_route(lambda leaf: Route(leaf.scores[index], leaf.experts[index], leaf.weights[index]), tree)


def flipped(before: RouteTree, after: RouteTree) -> Tensor:
    """(B,) bool: at some leaf the set of selected experts differs."""
    changes = [
        (a.experts.sort(-1).values != b.experts.sort(-1).values).any(-1)
        for a, b in zip(leaves(before), leaves(after), strict=True)
    ]
    return torch.stack(changes).any(0)
