from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.rng import SampleRng
from phalanx.threat import NORMS, Norm, ThreatModel, parse_epsilon, parse_norm, unit_l2
from reference.projection import nearest_in_l1_ball

norms = st.sampled_from(NORMS)
radii = st.one_of(st.just("8/255"), st.sampled_from([0.0, 1e-4, 0.03, 0.5, 1.0, 3.0, 40.0]))
# an Linf radius above 1 is refused
threats = st.tuples(norms, radii).filter(lambda pair: pair[0] != "Linf" or pair[1] not in (3.0, 40.0))
threats = threats.map(lambda pair: ThreatModel(*pair))
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31)


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Pixels in [0, 1], about a fifth of them exactly 0 and a fifth exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=dtype) * 1.7 - 0.35).clamp(0, 1)


def points(x: Tensor, seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)


@given(threats, shapes, dtypes, seeds, st.sampled_from([1e-3, 0.1, 1.0, 30.0]))
@example(ThreatModel("L1", 0.5), (1, 1, 3, 5), torch.float32, 1, 30.0)  # float32 sums left the ball by 3e-6
@settings(max_examples=200, deadline=None)
def test_projection_stays_in_the_ball_and_is_idempotent(threat, shape, dtype, seed, scale) -> None:
    x = images(shape, seed, dtype)
    once = threat.project(points(x, seed, scale), x)
    assert once.dtype == dtype and threat.contains(once, x).all()
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=2e-6)


@given(threats, shapes, dtypes, seeds)
@settings(max_examples=100, deadline=None)
def test_projection_leaves_what_is_inside(threat, shape, dtype, seed) -> None:
    x = images(shape, seed, dtype)
    assert torch.equal(threat.project(x, x), x)
    inside = x + 0.5 * (threat.project(points(x, seed, 0.3), x) - x)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-6)


@given(threats, shapes, dtypes, seeds, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_random_starts_lie_in_the_ball(threat, shape, dtype, seed, restart) -> None:
    x = images(shape, seed, dtype)
    start = threat.random_start(x, SampleRng.for_batch(len(x), seed), restart=restart)
    assert start.dtype == dtype and threat.contains(start, x).all()


@given(threats, shapes, dtypes, seeds, st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=100, deadline=None)
def test_steps_stay_in_the_ball(threat, shape, dtype, seed, scale) -> None:
    x = images(shape, seed, dtype)
    x_adv = threat.project(points(x, seed, 0.1), x)
    gradient = scale * points(torch.zeros_like(x), seed, 1.0)
    assert threat.contains(threat.step(x_adv, gradient, threat.epsilon / 4, x), x).all()


@pytest.mark.parametrize("size", [3 * 32 * 32, 3 * 64 * 64])
@pytest.mark.parametrize("eps", [0.5, 12.0, 300.0])
def test_a_large_image_stays_in_the_l1_ball(size: int, eps: float) -> None:
    # thousands of float32 terms are summed on the way: their rounding must not show
    threat, x = ThreatModel("L1", eps), images((8, size), 5, torch.float32)
    projected = threat.project(points(x, 5, 0.5), x)
    assert threat.contains(projected, x).all()
    assert threat.distance(projected, x).min() > 0.999 * eps


@given(st.integers(1, 12), seeds, st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.5, 20.0]), st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=150, deadline=None)
def test_l1_projection_is_the_nearest_point(size: int, seed: int, radius: float, scale: float) -> None:
    x = images((3, size), seed, torch.float64)
    x_adv = points(x, seed, scale)
    for tensor in (x, x_adv):  # ties among the kinks
        tensor[:, ::3] = tensor[:, :1].clone()
    projected = ThreatModel("L1", radius).project(x_adv, x)
    expected = torch.stack([a + nearest_in_l1_ball(b - a, -a, 1 - a, radius) for a, b in zip(x, x_adv, strict=True)])
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-9)


def test_projections_by_hand() -> None:
    x = torch.tensor([[0.5, 0.5, 0.9]], dtype=torch.float64)
    x_adv = torch.tensor([[0.8, 0.1, 1.3]], dtype=torch.float64)  # delta (.3, -.4, .4), room above the last pixel .1
    # Linf .2: (.2, -.2, .2), the last pixel stops at 1
    torch.testing.assert_close(ThreatModel("Linf", 0.2).project(x_adv, x), torch.tensor([[0.7, 0.3, 1.0]]).double())
    # L1 .4: the last pixel is full at .1; the other two share .3 after a shift of .2: .1 + .2
    torch.testing.assert_close(ThreatModel("L1", 0.4).project(x_adv, x), torch.tensor([[0.6, 0.3, 1.0]]).double())
    # L2: (.3, -.4, .0) has length .5, radius .25 halves it
    flat = torch.tensor([[0.8, 0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(ThreatModel("L2", 0.25).project(flat, x), torch.tensor([[0.65, 0.3, 0.9]]).double())


@given(st.sampled_from(["Linf", "L2"]), shapes, seeds)
@settings(max_examples=60, deadline=None)
def test_a_step_climbs_a_linear_function_as_steeply_as_any(norm: Norm, shape: tuple[int, ...], seed: int) -> None:
    # the best gain of a step of length s is s * |gradient| in the dual norm, far from the edges of ball and box
    x, gradient = torch.full(shape, 0.5, dtype=torch.float64), points(torch.zeros(shape).double(), seed, 1.0)
    moved = ThreatModel(norm, 0.4).step(x, gradient, 0.01, x) - x
    gain = (moved * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).norm(p={"Linf": 1, "L2": 2}[norm], dim=1)
    torch.testing.assert_close(gain, 0.01 * dual)


def test_l1_steps_move_the_steepest_pixels_that_can_move() -> None:
    threat, x = ThreatModel("L1", 1.0), torch.full((1, 4), 0.5)
    # 5 % of 4 pixels is less than one: the single steepest gets the whole step
    moved = threat.step(x, torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 0.25, x)
    torch.testing.assert_close(moved, torch.tensor([[0.5, 0.25, 0.5, 0.5]]))
    # it stands at 0 already, so the next one moves
    edge = torch.tensor([[0.5, 0.0, 0.5, 0.5]])
    torch.testing.assert_close(
        threat.step(edge, torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 0.25, edge), torch.tensor([[0.5, 0.0, 0.75, 0.5]])
    )
    # 5 % of 40 pixels is two: they share the step
    wide, gradient = torch.full((1, 40), 0.5), torch.arange(40.0)[None]
    moved = threat.step(wide, gradient, 0.25, wide) - wide
    torch.testing.assert_close(moved[0, -3:], torch.tensor([0.0, 0.125, 0.125]))
    assert not moved[0, :-2].any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_a_zero_or_non_finite_gradient_moves_nothing(norm: Norm, bad: float) -> None:
    threat, x = ThreatModel(norm, 0.5), torch.full((2, 3), 0.4)
    gradient = torch.full((2, 3), bad)
    assert torch.equal(threat.step(x, gradient, 0.1, x), x)
    gradient[:, 1] = 2.0
    moved = threat.step(x, gradient, 0.1, x)
    torch.testing.assert_close(moved, torch.tensor([[0.4, 0.5, 0.4]] * 2))


@pytest.mark.parametrize("norm", NORMS)
def test_tiny_and_huge_gradients_give_whole_steps(norm: Norm) -> None:
    threat, x = ThreatModel(norm, 0.5), torch.full((1, 3), 0.4)
    for scale in (1e-37, 1e-20, 1e37):
        moved = threat.step(x, torch.tensor([[0.0, scale, 0.0]]), 0.1, x)
        torch.testing.assert_close(moved, torch.tensor([[0.4, 0.5, 0.4]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_l2_direction_has_length_one_in_every_precision(dtype: torch.dtype) -> None:
    size = torch.finfo(dtype)
    for scale in (size.smallest_normal / 32, 1.0, size.max / 4):
        gradient = torch.tensor([[3 * scale, 4 * scale, 0.0], [0.0] * 3], dtype=torch.float64).to(dtype)
        found = unit_l2(gradient).double()
        torch.testing.assert_close(found[0].norm().item(), 1.0, rtol=size.eps * 4, atol=0)
        assert not found[1].any()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_uniformly(norm: Norm) -> None:
    # in d dimensions the norm of a uniform point is R * u**(1/d): its mean is R * d / (d + 1), here .3 * 3/4
    x = torch.full((20_000, 3), 0.5, dtype=torch.float64)
    threat = ThreatModel(norm, 0.3)
    delta = threat.random_start(x, SampleRng.for_batch(len(x), 3)) - x
    assert float(threat.distance(x + delta, x).mean()) == pytest.approx(0.225, abs=0.002)
    assert delta.mean(0).abs().max() < 0.005
    # a variance per coordinate: Linf R^2/3, L2 R^2/(d+2), L1 2 R^2/((d+1)(d+2))
    variance = 0.09 * {"Linf": 1 / 3, "L2": 1 / 5, "L1": 2 / 20}[norm]
    torch.testing.assert_close(delta.var(0), torch.full((3,), variance).double(), rtol=0.05, atol=0)


def test_random_starts_differ_between_restarts_and_follow_the_key() -> None:
    x, threat = torch.full((4, 3), 0.5), ThreatModel("Linf", 0.1)
    rng = SampleRng.for_batch(4, 1)
    first, second = (threat.random_start(x, rng, restart=restart) for restart in (0, 1))
    assert (first != second).any(1).all()
    assert torch.equal(threat.random_start(x[2:], rng[2:]), first[2:])


def test_contains_judges_ball_box_and_finiteness() -> None:
    x = torch.tensor([[0.5, 0.5]] * 5)
    x_adv = torch.tensor([[0.6, 0.4], [0.602, 0.5], [math.nan, 0.5], [0.5, 0.5], [math.inf, 0.5]])
    assert ThreatModel("Linf", 0.1).contains(x_adv, x).tolist() == [True, False, False, True, False]
    # the ball reaches beyond the box, the box decides
    assert ThreatModel("Linf", 1).contains(torch.tensor([[1.01, 0.5]]), x[:1]).tolist() == [False]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("Linf", 0.4), ("L2", 0.5), ("L1", 0.7)],  # of (.3, -.4)
)
def test_distance_by_hand(norm: Norm, expected: float) -> None:
    distance = ThreatModel(norm, 1).distance(torch.tensor([[0.8, 0.1]]), torch.tensor([[0.5, 0.5]]))
    assert distance.dtype == torch.float64 and float(distance) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", Fraction(8, 255)),
        (" 3 / 16 ", Fraction(3, 16)),
        ("0.03", Fraction(3, 100)),
        ("1e-3", Fraction(1, 1000)),
        ("0", Fraction(0)),
        (0, Fraction(0)),
        (0.5, Fraction(1, 2)),
        (1, Fraction(1)),
    ],
)
def test_epsilon_is_exact(text: str | float, value: Fraction) -> None:
    assert parse_epsilon(text) == value
    assert ThreatModel("Linf", text).epsilon == float(value)


@pytest.mark.parametrize("text", ["8/0", "nan", "inf", "", "a/b", "8//255", math.nan, math.inf, -math.inf])
def test_epsilon_that_is_no_number(text: str | float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a fraction such as '8/255', got {text!r}")):
        parse_epsilon(text)
    with pytest.raises(ValueError, match="eps must be a number"):
        ThreatModel("Linf", text)


@pytest.mark.parametrize("text", [-1, "-8/255", -0.5])
def test_negative_epsilon(text: str | float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"eps must be at least 0, got {text!r}; pixels lie in [0, 1]")):
        parse_epsilon(text)


@pytest.mark.parametrize(
    ("text", "norm"),
    [
        ("Linf", "Linf"),
        ("linf", "Linf"),
        ("inf", "Linf"),
        (math.inf, "Linf"),
        ("L2", "L2"),
        (2, "L2"),
        (2.0, "L2"),
        ("l1", "L1"),
        (1, "L1"),
    ],
)
def test_norm_spellings(text: str | float, norm: Norm) -> None:
    assert parse_norm(text) == norm


@pytest.mark.parametrize("text", ["L3", 0, "", "nuclear"])
def test_unknown_norm(text: str | float) -> None:
    with pytest.raises(ValueError, match=f"norm must be one of Linf, L2, L1, got {text!r}"):
        parse_norm(text)


def test_threat_names_its_norms() -> None:
    with pytest.raises(ValueError, match="norm must be one of Linf, L2, L1, got 'linf'"):
        ThreatModel("linf", 0.1)  # type: ignore[arg-type]
    assert str(ThreatModel("L2", "128/255")) == "L2 128/255"


def test_an_linf_radius_above_one_is_a_forgotten_255() -> None:
    with pytest.raises(ValueError, match=r"eps must be at most 1 for Linf.*got '8'; is it 8/255\?"):
        ThreatModel("Linf", "8")
    assert ThreatModel("L2", "8").epsilon == 8
    with pytest.raises(ValueError, match="eps must be a number"):
        parse_epsilon("1 0")


@pytest.mark.parametrize("eps", ["1/20", "1/2", "12"])
def test_rounding_leaves_the_l1_ball_to_no_image(eps: str) -> None:
    threat, generator = ThreatModel("L1", eps), torch.Generator().manual_seed(0)
    x = torch.rand(50, 3, 32, 32, generator=generator)
    far = x + torch.randn(x.shape, generator=generator) * 0.02
    projected = threat.project(far, x)
    excess = threat.distance(projected, x) - threat.epsilon
    assert excess.max() <= 0 and excess.min() >= -threat.epsilon / 500
