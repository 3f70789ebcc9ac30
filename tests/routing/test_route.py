from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from routing_samples import images, small_mixture
from torch import Tensor

from phalanx.routing import Route, Routed, RouteTree, dense, flipped, gate, leaves, map_route, only, pin, routed, select


class Pair(NamedTuple):
    standard: RouteTree
    robust: RouteTree


def route(*rows: list[float], top_k: int = 1) -> Route:
    return gate(torch.tensor(rows), top_k)


A = route([1.0, 0.0], [0.0, 1.0], [3.0, 2.0])
B = route([0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [0.0, 4.0, 0.0], top_k=2)
TREES = {"leaf": A, "tuple": (A, B), "pair": Pair(A, (B, A)), "nested": ((A,), Pair(B, B))}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> RouteTree:
    return TREES[request.param]


def same_shape(one: RouteTree, other: RouteTree) -> bool:
    if isinstance(one, Route):
        return isinstance(other, Route)
    return type(one) is type(other) and all(same_shape(a, b) for a, b in zip(one, other, strict=True))


def test_leaves_run_from_left_to_right() -> None:
    assert list(leaves(Pair(A, (B, A)))) == [A, B, A]
    assert list(leaves(A)) == [A]


def test_a_map_keeps_the_tree_and_its_names(tree: RouteTree) -> None:
    seen: list[Route] = []
    mapped = map_route(lambda leaf: seen.append(leaf) or leaf, tree)
    assert seen == list(leaves(tree)) == list(leaves(mapped)) and same_shape(mapped, tree)
    assert map_route(lambda leaf: leaf, Pair(A, B)).robust is B


@pytest.mark.parametrize("change", [dense, pin, lambda t: only(t, 1), lambda t: select(t, torch.tensor([2, 0]))])
def test_every_function_keeps_the_tree(tree: RouteTree, change) -> None:
    assert same_shape(change(tree), tree)


def test_dense_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    soft = dense(gate(scores, 1))
    assert soft.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(soft.weights, torch.tensor([[0.25, 0.75]]))
    assert soft.weights.requires_grad
    # at temperature 1/2 the odds are squared: 1 to 9
    torch.testing.assert_close(dense(gate(scores, 1), 0.5).weights, torch.tensor([[0.1, 0.9]]))


def test_only_sends_everything_to_one_expert(tree: RouteTree) -> None:
    for leaf in leaves(only(tree, 1)):
        assert leaf.experts.tolist() == [[1]] * 3 and leaf.weights.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("expert", [2, -1])
def test_only_needs_that_expert_in_every_leaf(expert: int) -> None:
    with pytest.raises(ValueError, match=rf"expert must be in 0\.\.1, got {expert}"):
        only((A, B), expert)


def test_pin_holds_the_decision_without_gradient() -> None:
    scores = torch.tensor([[0.0, 1.0]], requires_grad=True)
    free = gate(scores, 2)
    held = pin(free)
    assert free.weights.requires_grad and not held.weights.requires_grad and not held.scores.requires_grad
    assert torch.equal(held.weights, free.weights) and torch.equal(held.experts, free.experts)


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([False, True, True])])
def test_select_follows_the_batch(tree: RouteTree, index: Tensor) -> None:
    for leaf, part in zip(leaves(tree), leaves(select(tree, index)), strict=True):
        for name in ("scores", "experts", "weights"):
            assert torch.equal(getattr(part, name), getattr(leaf, name)[index])


def test_flipped_compares_sets_at_every_leaf() -> None:
    before = route([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], top_k=2)
    after = route([2.0, 3.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0], top_k=2)
    # the first row only changes order within the selected pair, the second changes the pair
    assert flipped(before, after).tolist() == [False, True, False]
    same = route([1.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    other = route([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    assert flipped(Pair(before, same), Pair(after, other)).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="shorter"):
        flipped((before, same), (before,))


def test_routed_calls_anything() -> None:
    x = images(3)
    plain = routed(lambda images: images.flatten(1)[:, :2], x)
    assert isinstance(plain, Routed) and plain.route is None and plain.logits.shape == (3, 2)
    model = small_mixture(3)
    ours = routed(model, x)
    assert torch.equal(ours.logits, model(x)) and torch.equal(ours.route.experts, model.gate(x).experts)
