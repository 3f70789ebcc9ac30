from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_samples import Waits
from torch import Tensor

from phalanx.routing import Route
from phalanx.routing.assignment import Assignment, Side, inverse, scaled

FACTORS = (2.0, 3.0, 5.0)
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [lambda x, factor=factor: factor * x for factor in FACTORS]


def route(experts: list[list[int]], weights: list[list[float]] | None = None) -> Route:
    chosen = torch.tensor(experts).reshape(len(experts), -1)
    values = torch.ones(chosen.shape) if weights is None else torch.tensor(weights)
    return Route(torch.zeros(len(experts), 3, dtype=torch.float64), chosen, values.double())


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_sizes_and_order() -> None:
    found = Assignment.of(route([[2], [0], [2], [0]]))
    assert found.sizes == (2, 0, 2) and found.unit
    assert found.order is not None and found.order.tolist() == [1, 3, 0, 2]


def test_rows_of_one_expert_are_sorted_already() -> None:
    found = Assignment.of(route([[1], [1]]))
    assert found.order is None and found.sizes == (0, 2, 0) and found.sort() is None


@pytest.mark.parametrize(
    ("experts", "weights", "unit"),
    [
        ([[0], [1]], [[1.0], [1.0]], True),
        ([[0], [1]], [[1.0], [0.5]], False),
        ([[0], [1]], [[1.0], [float("nan")]], False),
        ([[0, 1]], [[1.0, 1.0]], False),
    ],
)
def test_unit_weights(experts: list[list[int]], weights: list[list[float]], unit: bool) -> None:
    assert Assignment.of(route(experts, weights)).unit is unit


@pytest.mark.parametrize(("selected", "waits"), [(1, ["tolist"]), (2, ["tolist"]), (3, [])])
def test_one_wait(selected: int, waits: list[str]) -> None:
    given = route([list(range(selected))] * 4)
    with Waits() as seen:
        assignment = Assignment.of(given)
        assignment.mix(column(1, 2, 3, 4), FUNCTIONS)
        sorting = assignment.sort()
        if sorting is not None:
            list(sorting[1].by_expert())
    assert seen.calls == waits


def test_mixing_by_hand() -> None:
    x = column(1, 10, 100)
    assert Assignment.of(route([[2], [0], [2]])).mix(x, FUNCTIONS).flatten().tolist() == [5, 20, 500]
    weighted = Assignment.of(route([[2], [0], [2]], [[0.5], [2.0], [-1.0]]))
    assert weighted.mix(x, FUNCTIONS).flatten().tolist() == [2.5, 40, -500]
    pairs = Assignment.of(route([[2, 0], [0, 1], [1, 2]], [[1.0, 0.5], [1.0, 0.0], [2.0, 1.0]]))
    assert pairs.mix(x, FUNCTIONS).flatten().tolist() == [5 + 1, 20, 600 + 500]
    everything = Assignment.of(route([[0, 1, 2]] * 3, [[1.0, 0.0, 2.0]] * 3))
    assert everything.mix(x, FUNCTIONS).flatten().tolist() == [12, 120, 1200]


def test_each_function_runs_once_on_its_rows() -> None:
    seen: dict[int, list[float]] = {}

    def record(expert: int) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            assert expert not in seen
            seen[expert] = x.flatten().tolist()
            return x

        return function

    Assignment.of(route([[2], [0], [2], [0]])).mix(column(1, 2, 3, 4), [record(expert) for expert in range(3)])
    assert seen == {0: [2, 4], 2: [1, 3]}


def test_a_unit_weights_gradient_is_that_of_the_product() -> None:
    chosen = torch.tensor([[2], [0], [2]])
    sides: tuple[Side | None, ...] = ("input", "output", None)
    for gated in sides:
        weights = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        x = column(1, 10, 100).requires_grad_()
        given = Route(torch.zeros(3, 3), chosen, weights)
        y = Assignment.of(given).mix(x, FUNCTIONS, gated=gated)
        found = torch.autograd.grad((y * column(1, 2, 3)).sum(), [x, weights], allow_unused=True)
        assert found[0] is not None and found[0].flatten().tolist() == [5, 4, 15]
        if gated is not None:
            # dL/dy times y
            assert found[1] is not None and found[1].flatten().tolist() == [5, 2 * 20, 3 * 500]
        else:
            assert found[1] is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_does_not_depend_on_the_layout(layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64).to(memory_format=layout)
    weights = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    y = Assignment.of(Route(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64), weights)).mix(x, FUNCTIONS)
    upstream = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((y * upstream).sum(), weights)
    torch.testing.assert_close(found[:, 0], (2 * x * upstream).flatten(1).sum(1))


def test_images_that_were_sorted_go_back() -> None:
    given = route([[2], [0], [1], [0]])
    sorting = Assignment.of(given).sort()
    assert sorting is not None
    order, ordered = sorting
    assert ordered.order is None and ordered.route.experts.flatten().tolist() == [0, 0, 1, 2]
    x = column(1, 2, 3, 4)
    y = ordered.mix(x[order], FUNCTIONS)[inverse(order)]
    assert torch.equal(y, Assignment.of(given).mix(x, FUNCTIONS))


def test_by_expert() -> None:
    sorting = Assignment.of(route([[2], [0], [2], [0]], [[1.0], [2.0], [3.0], [4.0]])).sort()
    assert sorting is not None
    parts = list(sorting[1].by_expert())
    assert [rows for rows, _ in parts] == [slice(0, 2), slice(2, 4)]
    assert [part.sizes for _, part in parts] == [(2, 0, 0), (0, 0, 2)]
    assert [part.route.weights.flatten().tolist() for _, part in parts] == [[2, 4], [1, 3]]


@pytest.mark.parametrize("selected", [1, 2, 3])
def test_no_rows(selected: int) -> None:
    none = Route(torch.zeros(0, 3), torch.zeros(0, selected, dtype=torch.int64), torch.zeros(0, selected))
    assert Assignment.of(none).mix(torch.zeros(0, 4), FUNCTIONS).shape == (0, 4)


def test_one_expert_takes_every_row_and_its_weight() -> None:
    given = Route(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), column(3, 1))
    with Waits() as seen:
        y = Assignment.of(given).mix(column(1, 10), FUNCTIONS[:1])
    assert y.flatten().tolist() == [6, 20] and seen.calls == []


def test_scaled_rows() -> None:
    y = torch.ones(2, 3, 1, 2)
    assert scaled(y, torch.tensor([2.0, 3.0])).flatten(1).sum(1).tolist() == [12, 18]


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(7)))
def test_inverse(order: list[int]) -> None:
    forth = torch.tensor(order)
    assert torch.equal(forth[inverse(forth)], torch.arange(7)) and torch.equal(inverse(forth)[forth], torch.arange(7))
