"""Properties that a certificate must have, whatever the model.

Numbered as in the list of 28 that certificates are tested by. The others: 1, 13, 22, 23, 25 and 28 in test_certify, 2
in test_fuzz, 3 in test_counterexamples, 4 in tests/bounds/test_softmax, 5, 8, 10, 15 and 26 in
tests/bounds/test_networks, 6 and 7 in tests/bounds/test_spectral, 9, 19 and 21 in test_certification_gates, 27 in
test_smoothing.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.certification import METHODS, entry_radii, lower_margins, printed_theorem_5_5, soft_low, topn_low
from phalanx.certification.certificate import _certified
from phalanx.certification.models import Reader, read_model
from phalanx.routing import MixtureOfExperts
from phalanx.threat import NORMS, Norm
from reference.closed_forms import closed_radius, slope_a1, top1_radius
from tiny import digits, mixture

_GATES: tuple[int | str, ...] = (1, 2, "all")
SEEDS = st.integers(0, 2**31 - 1)


def _float64(gate: int | str, *, experts: int = 3) -> Any:
    model = mixture(experts, gate, seed=2).double().eval()
    torch.manual_seed(3)
    nn.init.normal_(model.router[2].weight, std=0.3)
    return model


def _batch(n: int = 12) -> tuple[Tensor, Tensor]:
    (batch,) = digits().test.first(n).batches(n)
    return batch.x.double(), batch.y


def _radii(model: MixtureOfExperts, x: Tensor, norm: Norm, method: str = "lipschitz") -> Tensor:
    """Of the model's own answers."""
    y = model(x).argmax(1)
    return _certified(model, read_model(model, Reader(tuple(x.shape[1:]), norm)).model, x, y, norm, method).radius  # type: ignore[arg-type]


def _drawn(seed: int, experts: int = 3, classes: int = 3) -> tuple[Tensor, ...]:
    """Margins (N, E, C), scores, weights' rho and constants (E, C)."""
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(5, experts, classes, dtype=torch.float64, generator=generator) + 1
    margins[:, :, 0] = math.inf
    scores = torch.randn(5, experts, dtype=torch.float64, generator=generator)
    rho = torch.rand(experts, experts, dtype=torch.float64, generator=generator)
    rho = (rho + rho.T).fill_diagonal_(0)
    constants = torch.rand(experts, classes, dtype=torch.float64, generator=generator) + 0.1
    constants[:, 0] = 0
    return margins, scores, rho, constants


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", _GATES)
def test_11_what_holds_in_a_ball_holds_in_a_smaller_one(gate: int | str, method: str) -> None:
    """Constants do not grow with the ball; of CROWN's slopes that is no theorem, but no certificate may come and go."""
    model, (x, y) = _float64(gate), _batch()
    held = [(lower_margins(model, x, y, "Linf", eps, method=method) > 0).all(1) for eps in (0.0, 0.005, 0.02, 0.08)]
    for smaller, larger in itertools.pairwise(held):
        assert bool((larger <= smaller).all())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, shrunk=st.floats(0.1, 1.0), grown=st.floats(0.0, 1.0))
def test_12_smaller_constants_and_larger_margins_certify_more(seed: int, shrunk: float, grown: float) -> None:
    margins, scores, rho, constants = _drawn(seed)
    none = torch.zeros(5, dtype=torch.float64)

    def radius(scale: float, more: float) -> Tensor:
        return top1_radius(margins + more, scale * constants[None], entry_radii(scores, scale * rho, none))

    assert bool((radius(shrunk, grown) >= radius(1.0, 0.0) * (1 - 1e-12)).all())
    ball = torch.full((5,), 0.2, dtype=torch.float64)
    for n in (1, 2, 3):
        before = topn_low(margins - 0.2 * constants, scores, rho, ball, none, n)
        after = topn_low(margins + grown - 0.2 * shrunk * constants, scores, shrunk * rho, ball, none, n)
        assert bool((after >= before - 1e-12).all())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, alpha=st.floats(0.5, 1.0))
def test_14_reachable_weights_beat_a1_and_that_theorem_5_5(seed: int, alpha: float) -> None:
    """Under the hypotheses that 5.5 does not state: probabilities, dense routing, constants of both classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 3, 3, dtype=torch.float64, generator=generator)
    logits[..., 0] += 2
    probabilities = logits.softmax(2)
    gaps = probabilities[..., :1] - probabilities
    gaps[..., 0] = math.inf
    _, scores, rho, constants = _drawn(seed)
    scores, weights, slopes = scores[:1], scores[:1].softmax(1), rho.amax(1) / 4
    margin = (weights[..., None] * gaps.masked_fill(gaps == math.inf, 0)).sum(1)
    margin[:, 0] = math.inf
    slope = slope_a1(slopes, 2 * torch.ones(3, 3, dtype=torch.float64), weights, constants)
    first = closed_radius(margin, slope)
    held = (gaps - constants * first[:, None, None] * 0.9999).clamp_min(-1)
    low = soft_low(held, scores, rho, first * 0.9999, torch.zeros(1, dtype=torch.float64))
    assert bool(((low > 0).all(1) | (first == 0)).all())
    # the dual model with a standard half that is always wrong: its best slope for every class at once is 5.5's
    mixed = closed_radius(alpha * margin - (1 - alpha), alpha * slope)
    printed = printed_theorem_5_5(margin.amin(1), weights, slopes, constants.amax(1), alpha)
    assert bool((printed <= mixed * (1 + 1e-9) + 1e-15).all())


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_16_all_experts_selected_are_a_soft_gate(seed: int) -> None:
    margins, scores, rho, constants = _drawn(seed)
    ball, none = torch.full((5,), 0.1, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    low = margins - 0.1 * constants
    assert torch.equal(topn_low(low, scores, rho, ball, none, 3), soft_low(low, scores, rho, ball, none))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", _GATES)
def test_17_other_numbers_for_classes_and_experts_change_nothing(gate: int | str, norm: Norm) -> None:
    model, (x, y) = _float64(gate), _batch()
    classes, experts = torch.randperm(10, generator=torch.Generator().manual_seed(1)), [2, 0, 1]
    moved = copy.deepcopy(model)
    for expert in moved.experts:
        expert[-1].weight.data, expert[-1].bias.data = expert[-1].weight[classes].data, expert[-1].bias[classes].data
    moved.experts = nn.ModuleList([moved.experts[i] for i in experts])
    moved.router[2].weight.data = moved.router[2].weight[experts].data
    moved.router[2].bias.data = moved.router[2].bias[experts].data
    place = classes.argsort()
    for method in ("lipschitz", "crown"):
        before = lower_margins(model, x, y, norm, 0.01, method=method)
        after = lower_margins(moved, x, place[y], norm, 0.01, method=method)
        assert torch.allclose(after, before[:, classes], atol=1e-9)


@pytest.mark.parametrize("gate", _GATES)
def test_18_what_the_answer_does_not_see_the_certificate_does_not_see(gate: int | str) -> None:
    """A common affine function of all router scores; a scalar added to all logits of an expert."""
    model, (x, _) = _float64(gate), _batch()
    before = _radii(model, x, "L2")
    assert bool((before > 0).any())
    moved = copy.deepcopy(model)
    moved.router[2].weight.data += torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved.router[2].bias.data += 3.0
    for index, expert in enumerate(moved.experts):
        expert[-1].bias.data += 1.0 + index
    assert torch.allclose(_radii(moved, x, "L2"), before, rtol=1e-4, atol=1e-9)
    # a vector that differs by class is another matter
    for expert in moved.experts:
        expert[-1].bias.data[0] += 5.0
    assert not torch.allclose(_radii(moved, x, "L2"), before, rtol=1e-2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", _GATES)
def test_20_radii_scale_with_the_pixels(gate: int | str, norm: Norm) -> None:
    """Half the pixels, twice the weights. No pixel range enters where bounds are Lipschitz."""
    model, (x, _) = _float64(gate), _batch()
    before = _radii(model, x, norm)
    moved = copy.deepcopy(model)
    # the first linear layer of each network, behind a normalisation by one mean and deviation
    for network in (moved.router, *moved.experts):
        normalize, first = network[0], network[2]
        first.bias.data += first.weight.data.sum(1) * float(normalize.mean) / float(normalize.std)
        first.weight.data *= 2
    assert torch.allclose(moved(x / 2), model(x), atol=1e-9)
    assert torch.allclose(2 * _radii(moved, x / 2, norm), before, rtol=1e-6)


@pytest.mark.parametrize("gate", _GATES)
def test_24_a_ball_of_nothing_is_held_by_whoever_leads(gate: int | str) -> None:
    model, (x, _) = _float64(gate), _batch()
    answers = model(x)
    y = answers.argmax(1)
    for method in METHODS:
        low = lower_margins(model, x, y, "L2", 0.0, method=method)
        clean = answers.gather(1, y[:, None]) - answers
        others = torch.nn.functional.one_hot(y, 10) == 0
        assert bool(((low > 0).all(1)).all())
        assert torch.allclose(low[others], clean[others], atol=1e-6)
        wrong = lower_margins(model, x, (y + 1) % 10, "L2", 0.0, method=method)
        assert not bool((wrong > 0).all(1).any())
