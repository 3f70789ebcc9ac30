"""Attacks on a dual model: each half alone, the surfaces of routing over both, and steering; judged on the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import phalanx as px
import tiny
from phalanx.attacks import PGD, SURFACES, JointMargin, RouteSteering
from phalanx.errors import InputError
from phalanx.routing import DualModel, DualRoute, MixtureOfExperts, Routed, dense, leaves, only, pin

# B batch, C classes, D pixels


class Linear(nn.Module):
    """Logits or scores (x - .5) @ weight.T on images (B, 1, 1, D)."""

    def __init__(self, weight_CD: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight_CD, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def reads(pixel: int, slope: float = 10.0) -> Linear:
    """Class 1 where the pixel is above one half."""
    row = [slope if d == pixel else 0.0 for d in range(3)]
    return Linear([[-value for value in row], row])


def against(pixel: int) -> Linear:
    return reads(pixel, -10.0)


def single(network: nn.Module) -> MixtureOfExperts:
    return MixtureOfExperts(None, [network])


X = torch.tensor([[0.53, 0.9, 0.56], [0.47, 0.1, 0.56]], dtype=torch.float64).reshape(2, 1, 1, 3)
Y = torch.tensor([1, 0])
"""Pixel 0 is .03 from the boundary, pixel 1 .4; pixel 2 decides routes, .06 from the boundary."""


def halves(alpha: float) -> DualModel:
    """S reads pixel 0, R reads pixel 1."""
    return DualModel(single(reads(0, 50.0)), single(reads(1)), alpha)


def test_each_half_alone_is_climbed() -> None:
    model = halves(0.9)
    for name, half in (("standard", model.standard), ("robust", model.robust)):
        leaf = X.clone().requires_grad_()
        answer = SURFACES[name](model, leaf, X, None)
        assert torch.equal(answer.logits, half(X)) and answer.route is not None
        (gradient,) = torch.autograd.grad(answer.logits[:, 0].sum(), leaf)
        moved = (gradient.flatten(1) != 0).any(0).tolist()
        assert moved == [name == "standard", name == "robust", False]


def test_what_a_half_loses_is_judged_on_the_whole() -> None:
    # p_R,y = sigmoid(2 * 10 * .4) = .9997 stays above (1 - alpha) / alpha = 1 / 9: the standard half falls, D does not
    attack = PGD(eps=0.1, steps=10, surface="standard", random_start=False)
    held = attack.run(halves(0.9), X, Y)
    assert not held.broken.any() and torch.equal(held.predicted, Y)
    assert (halves(0.9).standard(held.x_adv).argmax(-1) != Y).all()
    # at 1/3 the standard half decides
    assert attack.run(halves(1 / 3), X, Y).broken.all()
    # and the robust half's pixel is out of reach
    assert not PGD(eps=0.1, steps=10, surface="robust", random_start=False).run(halves(1 / 3), X, Y).broken.any()
    assert PGD(eps=0.5, steps=10, surface="robust").run(halves(1.0), X, Y).broken.all()


@pytest.mark.parametrize("name", ["standard", "robust", "halves", "geometric", "softened-t3"])
def test_another_model_has_no_halves(name: str) -> None:
    attack = JointMargin(eps=0.1, steps=2) if name == "halves" else PGD(eps=0.1, steps=2, surface=name)
    with pytest.raises(InputError, match=f"surface '{name}' is for a DualModel, and MixtureOfExperts has no"):
        attack.run(single(reads(1)), X, Y)
    network = reads(1)
    with pytest.raises(InputError, match="has no halves; use 'whole'"):
        attack.run(lambda x: network(x), X, Y)


def routed_halves(alpha: float = 0.9) -> DualModel:
    """S is one network; R has three experts, of which the third errs, and pixel 2 keeps it idle."""
    # expert 1 never answers: its score lies below another's on either side
    router = Linear([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    return DualModel(single(reads(1)), MixtureOfExperts(router, [reads(1), reads(1), against(1)]), alpha)


def test_surfaces_over_the_pair_are_what_their_formulas_say() -> None:
    model = routed_halves()
    x_adv = (X - 0.1).requires_grad_()
    with torch.no_grad():
        clean = model.routed(X)
    gate = model.gate(x_adv)
    expected = {
        "whole": model.routed(x_adv),
        "pinned": model.routed(x_adv, pin(gate)),
        "experts": model.routed(x_adv, pin(clean.route)),
        "router": model.routed(X, dense(gate)),
        "dense": model.routed(x_adv, dense(gate)),
        "expert-0": model.routed(x_adv, only(gate, 0)),
        # the standard half has no expert 2: its own gate decides
        "expert-2": model.routed(x_adv, DualRoute(gate.standard, only(gate.robust, 2))),
    }
    for name, routed in expected.items():
        found = SURFACES[name](model, x_adv, X, clean)
        assert isinstance(found, Routed) and torch.equal(found.logits, routed.logits), name
        for mine, theirs in zip(leaves(found.route), leaves(routed.route), strict=True):
            assert torch.equal(mine.experts, theirs.experts) and torch.equal(mine.weights, theirs.weights), name


def test_an_expert_that_no_gate_has() -> None:
    with pytest.raises(InputError, match="surface 'expert-3' needs an expert 3, the model's last is 2"):
        PGD(eps=0.1, steps=2, surface="expert-3").run(routed_halves(), X, Y)


def test_steering_reaches_the_weak_expert_of_one_half() -> None:
    model = routed_halves()
    assert torch.equal(model(X).argmax(-1), Y)
    blind = PGD(eps=0.1, steps=20, surface="pinned", random_start=False).run(model, X, Y)
    assert not blind.broken.any()
    result = RouteSteering(eps=0.1, steps=20).run(model, X, Y)
    assert result.broken.all() and result.flipped is not None and result.flipped.all()
    # the route turns .06 away
    assert not RouteSteering(eps=0.055, steps=20).run(model, X, Y).broken.any()


@pytest.mark.parametrize("order", ["more in standard", "more in robust"])
def test_routing_attacks_over_halves_of_different_size(order: str) -> None:
    parts = tiny.mixture(3, seed=1).eval(), tiny.mixture(2, seed=2).eval()
    model = DualModel(*(parts if order == "more in standard" else parts[::-1]), 0.6)
    x, _ = next(tiny.digits().test.batches(12)).xy
    y = model(x).argmax(-1)
    gate = model.gate(x)
    # only the larger half has an expert 2, the other's gate decides for itself
    forced = DualRoute(*(only(leaf, 2) if leaf.num_experts == 3 else leaf for leaf in leaves(gate)))
    assert torch.equal(SURFACES["expert-2"](model, x, x, None).logits, model.routed(x, forced).logits)
    for surface in ("whole", "pinned", "experts", "router", "dense", "expert-1", "expert-2", "standard", "robust"):
        attack = PGD(eps="3/16", steps=3, surface=surface)
        result = attack.run(model, x, y)
        assert torch.equal(result.broken, model(result.x_adv).argmax(-1) != y), surface
        assert attack.threat.contains(result.x_adv, x).all()
    assert RouteSteering(eps="3/16", steps=3, classes=2).run(model, x, y).broken.any()


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_evaluated_on_digits(mix: str) -> None:
    data = tiny.digits()
    model = px.DualModel(tiny.mixture(2), tiny.mixture(3, seed=1), 0.6, mix=mix)
    result = px.evaluate(model, data.test, protocol="pgd-5@robust,routing-3", eps="3/16")
    assert result.n == 40 and 0 <= result.robust_acc <= result.clean_acc <= 1
    attacks = {row.attack for row in result.rows}
    assert {"pgd-5@robust", "pgd-3", "pgd-3@router", "steer-3"} <= attacks
    assert {row.surface for row in result.rows if row.attack == "pgd-5@robust"} == {"robust"}
    again = px.evaluate(model, data.test, protocol="pgd-5@robust,routing-3", eps="3/16", batch_size=7)
    assert again.robust_acc == result.robust_acc


def test_stand_ins_for_the_mixture_are_what_their_formulas_say() -> None:
    model, x = halves(0.9).double(), X
    standard, robust = model.standard(x), model.robust(x)
    geometric = SURFACES["geometric"](model, x, x, None).logits
    torch.testing.assert_close(geometric, 0.1 * standard + 0.9 * robust)
    for temperature in (1, 3, 10):
        expected = (0.1 * (standard / temperature).softmax(-1) + 0.9 * robust.softmax(-1)).log()
        torch.testing.assert_close(SURFACES[f"softened-t{temperature}"](model, x, x, None).logits, expected)
    # at T = 1 it is the model
    torch.testing.assert_close(SURFACES["softened-t1"](model, x, x, None).logits, model(x))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_stand_ins_where_one_half_alone_counts(alpha: float) -> None:
    model = halves(alpha)
    for name in ("geometric", "softened-t3"):
        assert SURFACES[name](model, X, X, None).logits.isfinite().all()
    one = model.robust(X).log_softmax(-1) if alpha else (model.standard(X) / 3).log_softmax(-1)
    torch.testing.assert_close(SURFACES["softened-t3"](model, X, X, None).logits, one)


def test_a_sure_standard_half_has_a_gradient_once_softened() -> None:
    model = DualModel(single(reads(0, 1000.0)), single(reads(1, 0.5)), 0.5).float()
    x = X.float()
    for name, seen in (("whole", False), ("softened-t10", True), ("geometric", True)):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(SURFACES[name](model, leaf, x, None).logits[:, 0].sum(), leaf)
        assert bool((gradient[..., 0].abs() > 1e-4).any()) == seen, name
