"""The dual model: what it answers, what it guarantees, and its pair of routes."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import Tensor, nn

from phalanx.evaluation.evaluate import model_sha256
from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import fold_batchnorm, spec_of
from phalanx.routing import (
    DualModel,
    DualRoute,
    MixtureOfExperts,
    RoutedModel,
    build_router,
    dense,
    flipped,
    leaves,
    load_balance,
    only,
    pin,
    select,
)
from phalanx.training.players import moving


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits_C: Any) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits_C))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def constant(standard: Any, robust: Any, alpha: float, **options: Any) -> DualModel:
    halves = (MixtureOfExperts(None, [Constant(logits)]) for logits in (standard, robust))
    return DualModel(*halves, alpha, **options)


def dual(alpha: float = 0.7, experts: tuple[int, int] = (3, 2), **options: Any) -> DualModel:
    return DualModel(small_mixture(experts[0]), small_mixture(experts[1], seed=1), alpha, **options)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


ONE = torch.zeros(1, *SHAPE)


# what it answers


def test_the_mixture_by_hand() -> None:
    # .5 * .9 + .5 * .2 = .55, .5 * .1 + .5 * .8 = .45
    answer = constant(log(0.9, 0.1), log(0.2, 0.8), 0.5)(ONE)
    torch.testing.assert_close(answer, log(0.55, 0.45)[None])
    # .25 * .9 + .75 * .2 = .375
    torch.testing.assert_close(constant(log(0.9, 0.1), log(0.2, 0.8), 0.75)(ONE), log(0.375, 0.625)[None])
    # adding a constant to a half's logits changes nothing
    torch.testing.assert_close(constant(log(0.9, 0.1) + 7, log(0.2, 0.8) - 3, 0.5)(ONE), answer)


def test_logits_mix_geometrically() -> None:
    # .25 * (4, 0) + .75 * (0, 2) = (1, 1.5)
    standard, robust = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0])
    assert constant(standard, robust, 0.75, mix="logits")(ONE).tolist() == [[1.0, 1.5]]
    # at alpha = .9 a gap g in S outweighs g / 9 in R: 20 beats 2 in logits, and is held in probability, .76 > 1 / 9
    standard, robust = torch.tensor([20.0, 0.0]), torch.tensor([0.0, 2.0])
    assert int(constant(standard, robust, 0.9, mix="logits")(ONE).argmax()) == 0
    assert int(constant(standard, robust, 0.9)(ONE).argmax()) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_log_probabilities_are_normalised(alpha: float) -> None:
    probabilities = dual(alpha)(images(20)).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_either_end_one_half_answers_exactly(alpha: float) -> None:
    x = images(9)
    model = dual(alpha)
    half, other = (model.robust, model.standard) if alpha else (model.standard, model.robust)
    assert torch.equal(model(x), half(x).log_softmax(-1))
    assert torch.equal(DualModel(model.standard, model.robust, alpha, mix="logits")(x), half(x))
    # the other decides its route, but none of its experts runs
    route = model.gate(x)
    other.experts = nn.ModuleList([nn.Identity()] * len(other.experts))
    answer = model.routed(x)
    assert torch.equal(answer.logits, half(x).log_softmax(-1)) and not flipped(answer.route, route).any()
    assert model.routed(x, route).route == route


def test_alpha_may_be_an_integer() -> None:
    assert type(dual(1).alpha) is float and torch.equal(dual(1)(images(2)), dual(1.0)(images(2)))


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
def test_finite_for_huge_logits(alpha: float) -> None:
    # softmax alone is 0 beyond 104 nats in float32: the naive log of the sum is -inf
    standard = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    robust = torch.tensor([-1e4, 0.0, -1e4], requires_grad=True)
    model = constant(standard, robust, alpha)
    answer = model(ONE)
    assert answer.dtype == torch.float32 and answer.isfinite().all()
    gradients = torch.autograd.grad(answer[0, 2], list(model.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    if alpha == 0.5:
        # S is sure of class 0 and R of class 1; both put e^-1e4 on class 2
        torch.testing.assert_close(answer, torch.tensor([[-math.log(2), -math.log(2), -1e4]]))


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_gradients_equal_finite_differences(alpha: float, mix: Any) -> None:
    # soft gates: every pixel has a smooth path to the answer, through routers and experts
    halves = small_mixture(2, "all"), small_mixture(3, "all", seed=1)
    assert torch.autograd.gradcheck(DualModel(*halves, alpha, mix=mix), (images(2).requires_grad_(),))
    logits = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    model = constant(*(part.detach() for part in logits), alpha, mix=mix)

    def answer(standard: Tensor, robust: Tensor) -> Tensor:
        parts = {"standard.experts.0.logits": standard, "robust.experts.0.logits": robust}
        return torch.func.functional_call(model, parts, ONE)

    assert torch.autograd.gradcheck(answer, logits)


def test_the_gradient_by_hand() -> None:
    # d log p_D,0 / d z_S,0 = rho (1 - p_S,0), rho = (1 - alpha) p_S,0 / p_D,0 = .45 / .55; for z_R,0: .1 / .55 * .8
    model = constant(log(0.9, 0.1), log(0.2, 0.8), 0.5)
    gradients = torch.autograd.grad(model(ONE)[0, 0], list(model.parameters()))
    expected = [0.45 / 0.55 * 0.1, 0.1 / 0.55 * 0.8]
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.tensor([value, -value], dtype=torch.float64))


def test_autocast_leaves_the_mixing_in_float32() -> None:
    model, x = dual(0.6).float(), images(6).float()
    with torch.autocast("cpu", torch.bfloat16):
        halves = [half(x) for half in (model.standard, model.robust)]
        mixed = model(x)
    assert {half.dtype for half in halves} == {torch.bfloat16} and mixed.dtype == torch.float32
    p_S, p_R = (half.double().softmax(-1) for half in halves)
    torch.testing.assert_close(mixed.double(), (0.4 * p_S + 0.6 * p_R).log(), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert DualModel(model.standard, model.robust, 0.6, mix="logits")(x).dtype == torch.float32
    assert dual(0.6)(images(2)).dtype == torch.float64


# what it guarantees

LOGITS = st.lists(st.floats(-30, 30), min_size=4, max_size=4)


@given(LOGITS, LOGITS, st.floats(0.01, 0.99), st.integers(0, 3))
def test_the_lemma(standard: list[float], robust: list[float], alpha: float, pushed: int) -> None:
    # p_R,y - max p_R,k >= (1 - alpha) / alpha: D answers y whatever S says, all its mass on another class included
    p_R = torch.tensor(robust, dtype=torch.float64).softmax(-1)
    answering = int(p_R.argmax())
    others = p_R.scatter(-1, torch.tensor([answering]), 0)
    margin = float(p_R[answering] - others.max())
    standard[pushed] += 60
    answer = constant(torch.tensor(standard, dtype=torch.float64), p_R.log(), alpha)(ONE)
    if margin >= (1 - alpha) / alpha + 1e-9:
        assert int(answer.argmax()) == answering
    elif margin <= (1 - alpha) / alpha - 1e-9:
        # tight: S, one-hot on R's runner-up, wins
        fooled = torch.zeros(4, dtype=torch.float64)
        fooled[others.argmax()] = 500
        assert int(constant(fooled, p_R.log(), alpha)(ONE).argmax()) != answering


@given(LOGITS, LOGITS, st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted))
def test_monotone_in_alpha(standard: list[float], robust: list[float], alphas: list[float]) -> None:
    # p_D moves from p_S to p_R, class by class, and never past either
    halves = [torch.tensor(logits, dtype=torch.float64) for logits in (standard, robust)]
    low, high = (constant(*halves, alpha)(ONE)[0].exp() for alpha in alphas)
    p_S, p_R = (logits.softmax(-1) for logits in halves)
    direction = (p_R - p_S).sign()
    assert ((high - low) * direction >= -1e-12).all()
    assert (torch.minimum(p_S, p_R) - 1e-12 <= low).all() and (high <= torch.maximum(p_S, p_R) + 1e-12).all()


# its players


def test_players_and_their_prefixes() -> None:
    model = dual()
    players = model.players()
    assert isinstance(model, RoutedModel)
    assert list(players) == ["standard.experts", "standard.router", "robust.experts", "robust.router"]
    together = [id(p) for parameters in players.values() for p in parameters]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    assert moving("robust", players) == ["robust.experts", "robust.router"]
    assert moving("standard.router", players) == ["standard.router"] and len(moving("all", players)) == 4
    with pytest.raises(ValueError, match="player must be 'all' or one of standard"):
        moving("router", players)


def test_frozen_routers_and_single_networks_have_no_router_to_move() -> None:
    model = DualModel(MixtureOfExperts(None, [small_network()]), small_mixture(2, train_router=False), 0.5)
    assert list(model.players()) == ["standard.experts", "robust.experts"]


def test_both_halves_learn() -> None:
    model = dual(0.6)
    model(images(12)).square().sum().backward()
    for name, parameters in model.players().items():
        assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0, name


# its pair of routes


def test_one_pass_is_the_gates_pass() -> None:
    model, x = dual(), images(7)
    answer = model.routed(x)
    assert isinstance(answer.route, DualRoute) and torch.equal(model(x), answer.logits)
    for one, other in zip(leaves(answer.route), leaves(model.gate(x)), strict=True):
        assert torch.equal(one.experts, other.experts) and torch.equal(one.scores, other.scores)
    assert [leaf.num_experts for leaf in leaves(answer.route)] == [3, 2]
    assert torch.equal(model.routed(x, answer.route).logits, answer.logits)
    route = model.gate(images(7, seed=3))
    expected = [
        half.routed(x, own).logits.softmax(-1) for half, own in zip((model.standard, model.robust), route, strict=True)
    ]
    torch.testing.assert_close(model.routed(x, route).logits.exp(), 0.3 * expected[0] + 0.7 * expected[1])


def test_every_function_of_routes_keeps_the_pair() -> None:
    model, x = dual(), images(6).requires_grad_()
    route = model.gate(x)
    index = torch.tensor([4, 1])
    changed = {
        "pin": pin(route),
        "dense": dense(route),
        "only": only(route, 1),
        "select": select(route, index),
    }
    assert all(isinstance(tree, DualRoute) for tree in changed.values())
    assert not any(leaf.scores.requires_grad for leaf in leaves(changed["pin"]))
    torch.testing.assert_close(model.routed(x[index], changed["select"]).logits, model(x)[index])
    # expert 1 of each half, everywhere
    p_S, p_R = (half.experts[1](x).softmax(-1) for half in (model.standard, model.robust))
    torch.testing.assert_close(model.routed(x, changed["only"]).logits.exp(), 0.3 * p_S + 0.7 * p_R)
    # soft gates of both halves
    soft = [
        sum(w[:, None] * e(x) for w, e in zip(half.gate(x).scores.softmax(-1).T, half.experts, strict=True)).softmax(-1)
        for half in (model.standard, model.robust)
    ]
    torch.testing.assert_close(model.routed(x, changed["dense"]).logits.exp(), 0.3 * soft[0] + 0.7 * soft[1])
    assert load_balance(route).isfinite()
    with pytest.raises(ValueError, match=r"expert must be in 0\.\.1, got 2"):
        only(route, 2)


def test_a_flip_in_either_half_is_a_flip() -> None:
    route = dual().gate(images(2))
    robust = route.robust
    turned = type(robust)(robust.scores, torch.stack([robust.experts[0], 1 - robust.experts[1]]), robust.weights)
    assert flipped(route, DualRoute(route.standard, turned)).tolist() == [False, True]


def test_a_dual_model_may_be_a_half() -> None:
    inner, x = dual(0.4), images(5)
    model = DualModel(small_mixture(2, seed=5), inner, 0.5)
    torch.testing.assert_close(model(x).exp(), (model.standard(x).softmax(-1) + inner(x).exp()) / 2)
    assert "robust.standard.router" in model.players() and len(list(leaves(pin(model.gate(x))))) == 3


# its record


def recorded(seed: int = 0, alpha: float = 0.7, expert: str = "mlp", **options: Any) -> DualModel:
    torch.manual_seed(seed)
    own: dict[str, Any] = {"hidden": [5]} if expert == "mlp" else {"width": 2}
    experts = [build_expert(expert, num_classes=3, image_size=4, channels=1, **own) for _ in range(3)]
    standard = MixtureOfExperts(None, experts[:1])
    return DualModel(standard, MixtureOfExperts(build_router("linear", SHAPE, 2), experts[1:]), alpha, **options)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_built_from_its_record_bit_for_bit(mix: Any) -> None:
    model, x = recorded(mix=mix).eval(), images(6).float()
    spec = spec_of(model)
    assert spec is not None and spec.name == "dual"
    again = build(json.loads(json.dumps(spec.to_json())))
    assert isinstance(again, DualModel) and (again.alpha, again.mix) == (0.7, mix)
    assert not torch.equal(again.eval()(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and spec_of(again) == spec


def test_a_half_built_by_hand_leaves_no_record() -> None:
    assert spec_of(dual()) is None
    assert spec_of(DualModel(recorded().standard, small_mixture(2), 0.5)) is None


@pytest.mark.parametrize("make", [recorded, lambda **settings: dual(**settings)])
def test_another_alpha_is_another_model(make: Any) -> None:
    # nothing else tells two mixtures of the same halves apart: a ledger of one is not continued with the other
    names = [model_sha256(make(**settings)) for settings in ({"alpha": 0.7}, {"alpha": 0.8}, {"mix": "logits"})]
    assert len(set(names)) == 3 and model_sha256(make(alpha=0.7)) == names[0]
    assert "alpha=0.7, mix='probabilities'" in repr(make(alpha=0.7))
    with pytest.raises(AttributeError, match="alpha"):
        make(alpha=0.7).alpha = 0.8


def test_folding_keeps_the_answers() -> None:
    model, x = recorded(expert="small_cnn").eval(), images(4).float()
    folded = fold_batchnorm(model)
    assert isinstance(folded, DualModel)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


# mistakes


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\], the weight of the robust half, got {alpha}"):
        dual(alpha)


def test_parts_that_do_not_fit() -> None:
    half, x = small_mixture(2), images(3)
    with pytest.raises(ValueError, match="mix must be one of probabilities, logits, got 'sum'"):
        dual(mix="sum")
    with pytest.raises(TypeError, match=r"robust must be a routed model, got Sequential; wrap .*MixtureOfExperts"):
        DualModel(half, small_network(), 0.5)
    with pytest.raises(ValueError, match="must not share parameters"):
        DualModel(half, MixtureOfExperts(None, [half.experts[0]]), 0.5)
    other = MixtureOfExperts(None, [small_network(5).double()])
    message = re.escape("the same classes, got shapes (3, 3) and (3, 5)")
    with pytest.raises(ValueError, match=message):
        DualModel(half, other, 0.5)(x)
    with pytest.raises(TypeError, match="a dual model takes a DualRoute, one route for each half, got Route"):
        dual().routed(x, half.gate(x))
