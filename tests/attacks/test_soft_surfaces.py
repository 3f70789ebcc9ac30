"""Smooth stand-ins for a hard choice, and the surface of a mixing network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from phalanx.attacks import OBJECTIVES, PGD, SURFACES, JointMargin, RouteSteering
from phalanx.errors import InputError
from phalanx.evaluation import protocol
from phalanx.experts import TwoHeaded, build_expert
from phalanx.routing import AdaptiveSmoothing, DualModel, Routed, SynergyOfExperts, dense, leaves

# B batch, M sub-models, C classes

TEMPERATURES = [1.0, 0.1, 0.03, 2.5]


def _synergy() -> SynergyOfExperts:
    torch.manual_seed(0)
    parts = [build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[12]) for _ in range(3)]
    return SynergyOfExperts([TwoHeaded(part) for part in parts], temperature=2.0).eval()


def _adaptive(**options: Any) -> AdaptiveSmoothing:
    halves = tiny.mixture(2), tiny.mixture(3, seed=1)
    return AdaptiveSmoothing(*halves, hidden=6, **{"alpha_range": (0.5, 1.0), **options}).eval()


def _images(size: int = 12) -> Tensor:
    return next(tiny.digits().test.batches(size)).x


# -- temperatures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_of_a_mixture_the_weights_are_softened(temperature: float) -> None:
    for model in (tiny.mixture(3).eval(), DualModel(tiny.mixture(2), tiny.mixture(3, seed=1), 0.7).eval()):
        x = _images()
        found = SURFACES[f"dense-t{temperature:g}"](model, x, x, None)
        expected = model.routed(x, dense(model.gate(x), temperature))
        assert torch.equal(found.logits, expected.logits)
        for leaf in leaves(found.route):  # type: ignore[arg-type]
            torch.testing.assert_close(leaf.weights, (leaf.scores / temperature).softmax(-1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_of_a_synergy_of_experts_probabilities_are_averaged(temperature: float) -> None:
    model, x = _synergy(), _images()
    found = SURFACES[f"dense-t{temperature:g}"](model, x, x, None)
    for row, image in enumerate(x.split(1)):
        mixed, total = torch.zeros(10), 0.0
        for submodel in model.experts:
            z, a = submodel.both(image)
            rectified = float(((z / 2).softmax(-1).max() * a.sigmoid()).detach())
            weight = rectified ** (1 / temperature)
            mixed, total = mixed + weight * z.softmax(-1)[0], total + weight
        torch.testing.assert_close(found.logits[row].exp(), mixed / total, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits.logsumexp(-1), torch.zeros(12), atol=1e-5, rtol=0)


def test_dense_is_at_temperature_one() -> None:
    x = _images()
    for model in (_synergy(), tiny.mixture(3).eval()):
        assert torch.equal(SURFACES["dense"](model, x, x, None).logits, SURFACES["dense-t1"](model, x, x, None).logits)
    plain = tiny.mixture(3).eval().experts[0]
    assert torch.equal(SURFACES["dense-t0.1"](plain, x, x, None).logits, plain(x))


def test_cold_it_is_the_hard_choice() -> None:
    x = _images()
    for model in (_synergy(), tiny.mixture(3).eval()):
        cold = SURFACES["dense-t0.0001"](model, x, x, None).logits.log_softmax(-1)
        torch.testing.assert_close(cold, model(x).log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_the_choice_has_a_gradient_where_the_hard_one_has_none() -> None:
    model, x = _synergy(), _images(4)

    def of_confidence(surface: str) -> float:
        answer = SURFACES[surface](model, x, x, None).logits
        heads = [submodel.confidence.bias for submodel in model.experts]
        found = torch.autograd.grad(answer[:, 0].sum(), heads, allow_unused=True)
        return sum(0.0 if gradient is None else float(gradient.abs().sum()) for gradient in found)

    assert of_confidence("whole") == 0 and of_confidence("dense-t0.1") > 1e-4


# -- the mixing network --------------------------------------------------------------------------------------------


def test_the_mixing_surface_and_its_objective() -> None:
    model, x = _adaptive(), _images()
    y = model(x).argmax(-1)
    passed = model.smoothed(x)
    seen = SURFACES["mixing"](model, x, x, None)
    assert torch.equal(seen.logits, torch.cat([passed.logits, passed.gamma[:, None]], -1))
    gains = OBJECTIVES["mislead"](seen, None, y)
    for row, label in enumerate(y.tolist()):
        others = torch.cat([passed.logits[row, :label], passed.logits[row, label + 1 :]])
        expected = others.max() - passed.logits[row, label] - 0.5 * max(float(passed.gamma[row]), 0)
        torch.testing.assert_close(gains[row], expected)
    # below 0 the network says "clean" already
    told = Routed(torch.cat([passed.logits, torch.full((12, 1), -5.0)], -1), None)
    torch.testing.assert_close(
        OBJECTIVES["mislead"](told, None, y), OBJECTIVES["margin"](Routed(passed.logits, None), None, y)
    )


def test_every_surface_of_a_dual_model_goes_on_working() -> None:
    model, x = _adaptive(), _images(16)
    y = model(x).argmax(-1)
    tried = protocol("routing-3", tiny.THREAT, halves=True, mixing=True)
    names = {member.name for member in tried.members}
    assert {"pgd-3@standard", "pgd-3@robust", "joint-3x9", "steer-3", "pgd-3@dense-t0.1", "mislead-3"} <= names
    state = tiny.sha256_of(model.state_dict())
    for member in tried.members:
        result = member.attack.run(model, x, y)
        assert torch.equal(result.broken, model(result.x_adv).argmax(-1) != y), member.name
        assert member.attack.threat.contains(result.x_adv, x).all()
        assert (result.loss.isfinite() | result.broken).all()
    assert tiny.sha256_of(model.state_dict()) == state
    assert any(parameter.requires_grad for parameter in model.mixing.parameters())
    assert JointMargin(eps="3/16", steps=10).run(model, x, y).broken.any()
    assert RouteSteering(eps="3/16", steps=10).run(model, x, y).broken.any()


def test_only_a_mixing_network_can_be_misled() -> None:
    x, _ = next(tiny.digits().test.batches(4)).xy
    attack = PGD(eps=0.1, steps=2, objective="mislead", surface="mixing")
    for model in (tiny.mixture(2), DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.7)):
        kind = type(model).__name__
        with pytest.raises(InputError, match=f"surface 'mixing' is for an AdaptiveSmoothing, and {kind} has no mixing"):
            attack.run(model.eval(), x, model(x).argmax(-1))
    for wrong in ({"objective": "mislead"}, {"surface": "mixing"}, {"objective": "mislead", "surface": "halves"}):
        with pytest.raises(ValueError, match="go together, got"):
            PGD(**wrong)  # type: ignore[arg-type]
