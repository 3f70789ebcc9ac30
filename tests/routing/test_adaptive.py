"""Adaptive smoothing: what it answers, whose gradient it shows, and what never moves."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import Tensor, nn

from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import fold_batchnorm, spec_of
from phalanx.routing import (
    AdaptiveSmoothing,
    DualModel,
    DualRoute,
    LinearRouter,
    MixtureOfExperts,
    Route,
    SynergyOfExperts,
    dense,
    only,
)

# B batch, C classes, H hidden


def adaptive(standard: int = 3, robust: int = 2, top_k: int | str = 1, **options: Any) -> AdaptiveSmoothing:
    halves = small_mixture(standard, top_k), small_mixture(robust, top_k, seed=1)
    return AdaptiveSmoothing(*halves, **{"hidden": 5, **options}).eval()


def gamma_by_hand(model: AdaptiveSmoothing, image: Tensor) -> Tensor:
    """Of one image (1, C, H, W), expert by expert."""
    hidden: Tensor | float = 0.0
    for name, half in (("standard", model.standard), ("robust", model.robust)):
        route = half.gate(image)
        for expert, weight in zip(route.experts[0].tolist(), route.weights[0], strict=True):
            features = half.experts[expert][:-1](image)
            hidden = hidden + weight * model.readers[name][expert](features)  # type: ignore[index]
    assert isinstance(hidden, Tensor)
    return model.mixing[1](hidden.relu())[0, 0]


@pytest.mark.parametrize("top_k", [1, 2, "all"])
def test_the_mixture_image_by_image(top_k: int | str) -> None:
    model, x = adaptive(top_k=top_k, scales=(2.0, 0.5), alpha_range=(0.6, 0.9)), images(12)
    answer, gammas, route = model.smoothed(x)
    for row, image in enumerate(x.split(1)):
        gamma = gamma_by_hand(model, image)
        alpha = 0.6 + 0.3 / (1 + math.exp(-float(gamma.detach())))
        standard, robust = (2.0 * model.standard(image)).softmax(-1), (0.5 * model.robust(image)).softmax(-1)
        torch.testing.assert_close(gammas[row], gamma)
        torch.testing.assert_close(answer[row].exp(), ((1 - alpha) * standard + alpha * robust)[0])
    assert len(gammas.unique()) == 12
    assert torch.equal(model(x), answer) and torch.equal(model.routed(x).logits, answer)
    assert isinstance(route, DualRoute) and torch.equal(route.robust.experts, model.robust.gate(x).experts)
    torch.testing.assert_close(model.routed(x, model.gate(x)).logits, answer)


def test_in_training_alpha_is_not_squeezed() -> None:
    model, x = adaptive(alpha_range=(0.8, 0.9), scales=(1.0, 1.0)), images(6)
    squeezed = model(x)
    free, gamma, _ = model.train().smoothed(x)
    alpha = gamma.sigmoid()[:, None]
    halves = model.standard(x).softmax(-1), model.robust(x).softmax(-1)
    torch.testing.assert_close(free.exp(), (1 - alpha) * halves[0] + alpha * halves[1])
    assert (free - squeezed).abs().max() > 1e-3


def forced(model: AdaptiveSmoothing, gamma: float) -> AdaptiveSmoothing:
    with torch.no_grad():
        model.mixing[1].weight.zero_()
        model.mixing[1].bias.fill_(gamma)
    return model


@given(st.floats(-1e4, 1e4), st.sampled_from([(0.0, 1.0), (0.8, 1.0), (0.0, 0.5), (0.8, 0.9)]))
def test_every_gamma_gives_a_distribution_with_a_gradient(gamma: float, alpha_range: tuple[float, float]) -> None:
    model = forced(adaptive(alpha_range=alpha_range, scales=(1.0, 1.0)), gamma)
    x = images(3).requires_grad_()
    answer = model(x)
    torch.testing.assert_close(answer.logsumexp(-1), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    low, high = alpha_range
    alpha = low + (high - low) * float(torch.tensor(gamma, dtype=torch.float64).sigmoid())
    constant = DualModel(model.standard, model.robust, alpha)
    torch.testing.assert_close(answer, constant(x))
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    assert gradient.isfinite().all()


def test_the_least_alpha_bounds_the_standard_half() -> None:
    model = forced(adaptive(alpha_range=(0.8, 1.0)), -50.0)
    assert model.alpha == 0.8 and model.alpha_range == (0.8, 1.0) and isinstance(model, DualModel)
    x = images(30)
    p = model.robust(x).softmax(-1)
    first, second = p.topk(2).values.unbind(-1)
    safe = first - second > 0.25
    # whatever the standard half says
    with torch.no_grad():
        for expert in model.standard.experts:
            expert[-1].bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    assert torch.equal(model(x).argmax(-1)[safe], p.argmax(-1)[safe])


def test_the_mixing_network_is_in_the_gradient() -> None:
    model = adaptive(alpha_range=(0.0, 1.0))
    x = images(4).requires_grad_()
    answer, gamma, _ = model.smoothed(x)
    (slope,) = torch.autograd.grad(gamma.sum(), x, retain_graph=True)
    assert (slope.abs().flatten(1).amax(1) > 0).all()
    (whole,) = torch.autograd.grad(answer[:, 0].sum(), x)
    step = 1e-6
    for pixel in range(0, 16, 5):
        moved = [x.detach().clone(), x.detach().clone()]
        moved[0].flatten(1)[:, pixel] += step
        moved[1].flatten(1)[:, pixel] -= step
        # straight-through gates show a gradient that the values do not have: hold the route's weights
        numeric = (pinned(model, moved[0], x)[:, 0] - pinned(model, moved[1], x)[:, 0]) / (2 * step)
        (exact,) = torch.autograd.grad(pinned(model, x, x)[:, 0].sum(), x)
        torch.testing.assert_close(exact.flatten(1)[:, pixel], numeric, atol=1e-6, rtol=1e-5)
    assert whole.isfinite().all()


def pinned(model: AdaptiveSmoothing, x: Tensor, at: Tensor) -> Tensor:
    held = [Route(leaf.scores.detach(), leaf.experts, leaf.weights.detach()) for leaf in model.gate(at.detach())]
    return model.routed(x, DualRoute(*held)).logits


def test_only_the_mixing_network_can_move() -> None:
    model, x = adaptive().train(), images(40)
    assert model.training and not model.standard.training and not model.robust.experts[0].training
    (name,) = model.players()
    own = {id(parameter) for parameter in model.players()[name]}
    assert name == "mixing"
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (id(parameter) in own) == key.startswith(("readers.", "mixing.")) == parameter.requires_grad, key
        assert (parameter.grad is not None) == parameter.requires_grad, key
    # every expert that answers has a reader that learns
    used = set(model.gate(x).standard.experts.flatten().tolist())
    assert {number for number in range(3) if model.readers["standard"][number].weight.grad.abs().sum() > 0} == used  # type: ignore[index,union-attr]


def test_routes_are_taken_as_given() -> None:
    model, x = adaptive(), images(8)
    gate = model.gate(x)
    one = model.routed(x, DualRoute(only(gate.standard, 2), only(gate.robust, 0)))
    alone = AdaptiveSmoothing(
        MixtureOfExperts(None, [model.standard.experts[2]]), MixtureOfExperts(None, [model.robust.experts[0]]), hidden=5
    ).double()
    alone.readers["standard"][0], alone.readers["robust"][0] = model.readers["standard"][2], model.readers["robust"][0]  # type: ignore[index]
    alone.mixing = model.mixing
    torch.testing.assert_close(one.logits, alone.eval()(x))
    assert (model.routed(x, dense(gate)).logits - one.logits).abs().max() > 1e-3
    with pytest.raises(TypeError, match="a dual model takes a DualRoute"):
        model.routed(x, gate.standard)


def networks(kind: str, count: int, **options: Any) -> list[nn.Module]:
    return [build_expert(kind, num_classes=3, image_size=4, channels=1, **options) for _ in range(count)]


def built() -> AdaptiveSmoothing:
    torch.manual_seed(0)
    standard = MixtureOfExperts(
        LinearRouter(SHAPE, 2), [*networks("mlp", 1, hidden=[5]), *networks("small_cnn", 1, width=2)]
    )
    return AdaptiveSmoothing(standard, MixtureOfExperts(None, networks("resnet18", 1, width=2)), alpha_range=(0.7, 0.9))


def test_built_from_its_record_bit_for_bit() -> None:
    model, x = built().eval(), images(20).float()
    spec = spec_of(model)
    assert spec is not None and spec.name == "adaptive"
    again = build(json.loads(json.dumps(spec.to_json()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and spec_of(again) == spec
    # also with experts of every backbone, folded as an attack searches it
    folded = fold_batchnorm(model)
    assert folded is not None
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.smoothed(x).gamma, model.smoothed(x).gamma, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_the_seed_is_that_of_the_mixing_network() -> None:
    state = torch.get_rng_state()
    one, same, other = (adaptive(seed=seed) for seed in (1, 1, 2))
    x = images(4)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    half = small_mixture(2), small_mixture(2, seed=1)
    state = torch.get_rng_state()
    AdaptiveSmoothing(*half)
    assert torch.equal(torch.get_rng_state(), state)


def test_non_finite_stays_non_finite() -> None:
    model, x = adaptive(1, 1), images(2)
    with torch.no_grad():
        model.robust.experts[0][-1].bias[0] = float("inf")
    assert not model(x).isfinite().all(-1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (1.0,)}, "scales must be two positive numbers"),
        ({"scales": (1.0, 0.0)}, "scales must be two positive numbers"),
        ({"alpha_range": (0.9, 0.9)}, r"alpha_range must be two numbers, 0 <= low < high <= 1, got \(0.9, 0.9\)"),
        ({"alpha_range": (0.5, 1.1)}, "alpha_range"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_what_is_no_adaptive_smoothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveSmoothing(small_mixture(2), small_mixture(2, seed=1), **options)


def test_halves_that_cannot_be_read() -> None:
    whole = small_mixture(2)
    dual = DualModel(small_mixture(2), small_mixture(2, seed=1), 0.7)
    with pytest.raises(TypeError, match="standard must be a MixtureOfExperts, got DualModel"):
        AdaptiveSmoothing(dual, whole)
    odd = MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh())])
    with pytest.raises(TypeError, match=r"robust must have experts that are an nn\.Sequential ending in"):
        AdaptiveSmoothing(whole, odd)
    assert not issubclass(SynergyOfExperts, MixtureOfExperts)
    other = MixtureOfExperts(None, [small_network(4).double()])
    with pytest.raises(ValueError, match="must answer with logits for the same classes"):
        AdaptiveSmoothing(whole, other)(images(2))
