"""MixedNUTS: the map of the logits, what the mixture answers, and the gradient it shows an attacker."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import Tensor, nn

from phalanx.attacks import PGD, JointMargin
from phalanx.evaluation.evaluate import model_sha256
from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import (
    DualModel,
    DualRoute,
    LinearRouter,
    LogitMap,
    MixedNUTS,
    MixtureOfExperts,
    flipped,
    normalised,
)

MAP: dict[str, float] = {"scale": 2.0, "power": 3.0, "bias": -0.5}
ONE = torch.zeros(1, *SHAPE)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits_C: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits_C, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def constant(standard: Any, robust: Any, alpha: float, dtype: torch.dtype = torch.float64) -> MixedNUTS:
    halves = (MixtureOfExperts(None, [Constant(logits, dtype)]) for logits in (standard, robust))
    return MixedNUTS(*halves, alpha, **MAP)


def nuts(alpha: float = 0.7, **change: float) -> MixedNUTS:
    return MixedNUTS(small_mixture(3), small_mixture(2, seed=1), alpha, **{**MAP, **change}).eval()


def gelu(v: float) -> float:
    return v / 2 * (1 + math.erf(v / math.sqrt(2)))


# the map


def test_the_map_by_hand() -> None:
    # mean 2, unbiased variance ((1 - 2)^2 + (5 - 2)^2 + (0 - 2)^2) / 2 = 7
    z = [(value - 2) / math.sqrt(7 + 1e-8) for value in (1, 5, 0)]
    torch.testing.assert_close(normalised(torch.tensor([[1.0, 5.0, 0.0]])), torch.tensor([z], dtype=torch.float64))
    v = [gelu(value - 0.5) for value in z]
    expected = [2 * math.copysign(abs(value) ** 3, value) for value in v]
    found = LogitMap(**MAP)(torch.tensor([[1.0, 5.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
    # bounded below: GELU keeps all small logits together, in (-.17, 0]
    assert v[0] < 0 < v[1] and abs(float(found[0, 0])) < 0.01


def test_only_the_largest_logits_count_in_the_normalisation() -> None:
    logits = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = logits.argsort(-1, descending=True)
    lowered = logits.scatter(-1, order[:, 250:], -1e3)
    kept = order[:, :250]
    torch.testing.assert_close(normalised(lowered).gather(-1, kept), normalised(logits).gather(-1, kept))
    largest = normalised(logits).gather(-1, kept)
    torch.testing.assert_close(largest.mean(-1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(largest.var(-1), torch.ones(2, dtype=torch.float64))


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=6), st.floats(0.05, 5), st.floats(1, 4))
def test_without_bias_no_map_changes_the_answer(logits: list[float], scale: float, power: float) -> None:
    z = torch.tensor([logits], dtype=torch.float64)
    mapped = LogitMap(scale=scale, power=power, bias=0)(z)
    assert float(mapped.max() - mapped[0, z.argmax()]) <= 1e-12


def test_the_map_has_no_infinite_slope() -> None:
    # the middle logit is the mean: GELU(0) = 0, where |v| has a kink
    z = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for power in (1.0, 1.5, 4.0):
        (gradient,) = torch.autograd.grad(LogitMap(scale=1, power=power, bias=0)(z).square().sum(), z)
        assert gradient.isfinite().all()


# what it answers


def test_the_mixture_by_hand() -> None:
    # S says class 2; T(z_R) as above
    z = [(value - 2) / math.sqrt(7 + 1e-8) for value in (1, 5, 0)]
    mapped = [2 * math.copysign(abs(gelu(value - 0.5)) ** 3, gelu(value - 0.5)) for value in z]
    total = sum(math.exp(value) for value in mapped)
    expected = [math.log(0.9 * math.exp(value) / total + 0.1 * (c == 2)) for c, value in enumerate(mapped)]
    answer = constant([0, 1, 1.001], [1, 5, 0], 0.9)(ONE)
    torch.testing.assert_close(answer, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert constant([0, 1, 1.001], [1, 5, 0], 0.9, torch.float32)(ONE).dtype == torch.float32


def test_at_alpha_one_the_mapped_robust_half_answers_alone() -> None:
    model, x = nuts(1.0, scale=50.0), images(50)
    model.standard.experts = nn.ModuleList([nn.Identity()] * 3)
    # to the last bit, whatever carries the gradient
    assert torch.equal(model(x), LogitMap(**{**MAP, "scale": 50.0})(model.robust(x)).log_softmax(-1))


@given(
    st.lists(st.floats(-30, 30), min_size=4, max_size=4), st.floats(0.51, 0.999), st.integers(0, 3), st.floats(0.1, 4)
)
def test_it_holds_what_the_margin_promises(robust: list[float], alpha: float, pushed: int, scale: float) -> None:
    standard = torch.zeros(4).scatter(0, torch.tensor(pushed), 1e-3)
    halves = [MixtureOfExperts(None, [Constant(logits)]) for logits in (standard, robust)]
    found = LogitMap(scale=scale, power=2.0, bias=-0.5)
    p = found(torch.tensor([robust], dtype=torch.float64)).softmax(-1)[0]
    first, second = p.topk(2).values.tolist()
    answer = int(MixedNUTS(*halves, alpha, scale=scale, power=2.0, bias=-0.5)(ONE).argmax())
    if first - second > (1 - alpha) / alpha + 1e-9:
        assert answer == int(p.argmax())
    elif float(p.max() - p[pushed]) < (1 - alpha) / alpha - 1e-9:
        assert answer == pushed


@pytest.mark.parametrize("alpha", [1e-6, 0.5, 1 - 1e-6, 1.0])
def test_finite_for_huge_logits(alpha: float) -> None:
    model = constant([1e30, -1e30, 0], [-1e4, 3e4, 1e4], alpha, torch.float32)
    answer = model(ONE)
    assert answer.dtype == torch.float32 and answer.isfinite().all()
    gradients = torch.autograd.grad(answer.sum(), list(model.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    torch.testing.assert_close(answer.double().exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_a_non_finite_half_is_never_hidden_by_the_one_hot(half: int, bad: float) -> None:
    logits = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    logits[half][2] = bad
    assert constant(*logits, 0.8)(ONE).isnan().all()
    # nor outside the largest 250, which alone decide the surrogate
    many = [[*(row + [0.0] * 300), bad if number == half else 0.0] for number, row in enumerate(([1.0], [2.0]))]
    assert constant(*many, 0.8)(ONE).isnan().all()


# its gradient


def test_the_gradient_is_that_of_the_surrogate() -> None:
    logits = [torch.randn(4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1)]
    model = constant(*logits, 0.8)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    found = torch.autograd.grad((model(ONE)[0] * weights).sum(), list(model.parameters()))
    standard, robust = (part.clone().requires_grad_() for part in logits)
    soft = F.layer_norm(standard, (4,)) * math.sqrt(3 / 4)
    around = 0.9 * robust.softmax(-1) + 0.1 * LogitMap(**MAP)(robust[None])[0].softmax(-1)
    surrogate = (0.2 * soft.softmax(-1) + 0.8 * around).log()
    expected = torch.autograd.grad((surrogate * weights).sum(), [standard, robust])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_steep_map_hides_no_weakness_from_an_attack() -> None:
    # mapped probabilities of 1 and e^-50: their own gradient is 0 in float32 and no search would move
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    halves = [MixtureOfExperts(None, [part]) for part in (small_network().double(), network)]
    model, x = MixedNUTS(*halves, 0.9, scale=50.0, power=4.0, bias=0.0).eval(), images(32)
    y = model(x).argmax(-1)
    own = x.clone().requires_grad_()
    mapped = LogitMap(scale=50.0, power=4.0, bias=0.0)(network(own)).log_softmax(-1)
    (vanished,) = torch.autograd.grad(mapped.gather(-1, y[:, None]).sum(), own)
    assert (vanished.float().flatten(1).abs().amax(-1) < 1e-12).float().mean() > 0.25
    result = PGD(eps=0.5, steps=20).run(model, x, y)
    assert result.broken.float().mean() > 0.9 and not result.zero_gradient.any()


def test_the_surfaces_of_a_dual_model_are_its_own() -> None:
    model, x = nuts(0.8), images(24)
    y = model(x).argmax(-1)
    for attack in (
        PGD(eps=0.3, steps=5, surface="standard"),
        PGD(eps=0.3, steps=5, surface="robust"),
        JointMargin(eps=0.3, steps=5),
    ):
        result = attack.run(model, x, y)
        assert result.broken.any() and not result.invalid.any()


def test_it_is_a_dual_model_in_all_else() -> None:
    model, x = nuts(), images(6)
    assert isinstance(model, DualModel) and isinstance(model.gate(x), DualRoute)
    answer = model.routed(x)
    assert answer.route is not None and not flipped(answer.route, model.gate(x)).any()
    assert torch.equal(model.routed(x, model.gate(x)).logits, model(x))
    assert list(model.players()) == ["standard.experts", "standard.router", "robust.experts", "robust.router"]


# its record


def recorded(alpha: float = 0.7, **change: float) -> MixedNUTS:
    torch.manual_seed(0)
    experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(3)]
    standard = MixtureOfExperts(None, experts[:1])
    return MixedNUTS(standard, MixtureOfExperts(LinearRouter(SHAPE, 2), experts[1:]), alpha, **{**MAP, **change})


def test_built_from_its_record_bit_for_bit() -> None:
    model, x = recorded().eval(), images(6).float()
    spec = spec_of(model)
    assert spec is not None and spec.name == "nuts"
    again = build(json.loads(json.dumps(spec.to_json())))
    assert isinstance(again, MixedNUTS) and (again.alpha, again.map) == (0.7, LogitMap(**MAP))
    assert not torch.equal(again.eval()(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and spec_of(again) == spec
    assert spec_of(nuts()) is None


@pytest.mark.parametrize("make", [recorded, nuts])
def test_another_map_is_another_model(make: Any) -> None:
    changes: list[dict[str, float]] = [{}, {"alpha": 0.8}, {"scale": 3}, {"power": 2}, {"bias": 0}]
    assert len({model_sha256(make(**change)) for change in changes}) == 5
    assert "alpha=0.7, scale=2.0, power=3.0, bias=-0.5" in repr(make())


# mistakes


def test_numbers_that_are_no_map() -> None:
    for change, message in (
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": math.inf}, "scale must be positive and finite, got inf"),
        ({"power": 0.5}, "power must be at least 1 and finite, got 0.5"),
        ({"bias": math.nan}, "bias must be finite, got nan"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], the weight of the robust half, got 0; use the standard half"),
        ({"alpha": 1.2}, r"alpha must be in \[0, 1\], the weight of the robust half, got 1.2"),
    ):
        with pytest.raises(ValueError, match=message):
            nuts(**change)


def test_halves_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"robust must be a routed model, got Sequential"):
        MixedNUTS(small_mixture(2), small_network(), 0.9, **MAP)
    other = MixtureOfExperts(None, [small_network(5).double()])
    with pytest.raises(ValueError, match=r"the same classes, got shapes \(3, 3\) and \(3, 5\)"):
        MixedNUTS(small_mixture(2), other, 0.9, **MAP)(images(3))
