from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.attacks import fab_projection
from phalanx.attacks.fab_projection import onto_hyperplane
from phalanx.threat import NORMS
from reference.hyperplane import least_move

ORDER = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}


def problem(seed: int, pixels: int, kind: str, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Six points of the box, the slopes there, and values that `reach` of what the box allows would bring to 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(6, pixels, generator=generator, dtype=torch.float64)

    x, slope = (draw() * 1.4 - 0.2).clamp(0, 1), draw() * 2 - 1
    if kind == "spread":
        slope = slope.sign() * 10 ** (-6 * slope.abs())
    elif kind == "equal":
        slope = slope.sign()
    elif kind == "sparse":
        slope = slope * (draw() < 0.3)
    sign = torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0).double()
    room = torch.where(-slope * sign[:, None] > 0, 1 - x, x)
    return x, slope, sign * reach * (slope.abs() * room).sum(1)


@given(
    st.integers(0, 2**20),
    st.sampled_from([1, 2, 7, 60]),
    st.sampled_from(["plain", "spread", "equal", "sparse"]),
    st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 0.99, 1.01, 50.0]),
    st.sampled_from(NORMS),
)
@settings(max_examples=150, deadline=None)
def test_the_move_is_the_reference_s(seed: int, pixels: int, kind: str, reach: float, norm) -> None:
    x, slope, value = problem(seed, pixels, kind, reach)
    move = onto_hyperplane(x, slope, value, norm)
    assert (x + move >= 0).all() and (x + move <= 1).all()
    expected = torch.stack([least_move(*row[:2], float(row[2]), norm) for row in zip(x, slope, value, strict=True)])
    left, left_expected = (value + (slope * d).sum(1) for d in (move, expected))
    torch.testing.assert_close(left, left_expected, rtol=0, atol=1e-9)
    size, least = (torch.linalg.vector_norm(d, ord=ORDER[norm], dim=1) for d in (move, expected))
    torch.testing.assert_close(size, least, rtol=1e-7, atol=1e-9)
    # in L1 pixels of equal slope may share; elsewhere the point itself is unique
    if norm == "L2" or (norm == "L1" and kind == "plain"):
        torch.testing.assert_close(move, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_single_precision_on_an_image(norm) -> None:
    x, slope, value = problem(3, 3072, "plain", 0.05)
    exact = onto_hyperplane(x, slope, value, norm)
    rounded = onto_hyperplane(x.float(), slope.float(), value.float(), norm)
    # in L1 one pixel moves in part, which costs what all others have lost by rounding
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-3 if norm == "L1" else 3e-7)
    left = value + (slope * rounded).sum(1)
    assert (left.abs() < 2e-6 * (slope.abs() * rounded.abs()).sum(1) + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_function_does_not_matter(norm, scale: float) -> None:
    x, slope, value = (tensor.float() for tensor in problem(5, 40, "plain", 0.4))
    move = onto_hyperplane(x, slope, value, norm)
    torch.testing.assert_close(onto_hyperplane(x, scale * slope, scale * value, norm), move, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_slope_nothing_moves(norm) -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]] * 2)
    move = onto_hyperplane(x, torch.zeros(2, 3), torch.tensor([1.0, 0.0]), norm)
    assert torch.equal(move, torch.zeros(2, 3))


def test_few_passes_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    x, slope, value = problem(1, 3072, "plain", 0.1)
    passes: list[bool] = []
    equal = torch.equal
    monkeypatch.setattr(fab_projection.torch, "equal", lambda a, b: passes.append(True) or equal(a, b))
    onto_hyperplane(x, slope, value, "Linf")
    onto_hyperplane(x, slope, value, "L2")
    assert len(passes) <= 2 * 8
