"""What holds for every attack on every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import get_args

import pytest
import torch
from attack_samples import ATTACKS, CLASSES, MODELS, answers, build, images, labels_for, pixels_for, suited
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.attacks import (
    FAB,
    FGSM,
    PGD,
    AnyAttack,
    APGDTargeted,
    Attack,
    CarliniWagner,
    ExpertTransfer,
    HopSkipJump,
    JointMargin,
    RouteSteering,
)
from phalanx.rng import SampleRng
from phalanx.routing import MixtureOfExperts
from phalanx.threat import NORMS, ThreatModel


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


def test_ball_box_and_verdict(attack, name: str) -> None:
    model, x = suited(attack, build(name)), pixels_for(name, 11)
    y = labels_for(model, x)
    result = attack.run(model, x, y)
    assert attack.threat.contains(result.x_adv, x).all()
    assert result.x_adv.dtype == x.dtype and not result.x_adv.requires_grad
    assert torch.equal(result.predicted, answers(model, result.x_adv))
    assert torch.equal(result.broken, result.predicted != y)
    assert torch.equal(result.clean_predicted, answers(model, x)) and not result.invalid.any()
    # what is wrong already needs no search
    wrong = result.clean_predicted != y
    assert wrong.sum() == 3 and torch.equal(result.x_adv[wrong], x[wrong])
    assert (result.first_success[wrong] == 0).all() and (result.queries[wrong] == 2).all()
    assert torch.equal(result.first_success >= 0, result.broken)
    several = isinstance(attack, RouteSteering | ExpertTransfer | JointMargin | APGDTargeted | FAB)
    searches = 4 * 2 if several else getattr(attack, "searches", None) or getattr(attack, "restarts", 1)
    assert ((result.restart >= 0) & (result.restart < searches)).all()


@given(
    st.sampled_from(list(ATTACKS)),
    st.sampled_from(list(MODELS)),
    st.sampled_from(NORMS),
    st.sampled_from([0.0, 1e-3, "8/255", 0.3, 1.0, 5.0]),
    st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_no_parameters_leave_the_ball(chosen: str, name: str, norm, eps: float | str, seed: int) -> None:
    assume(norm != "Linf" or eps != 5.0)
    assume(norm == "Linf" or not ATTACKS[chosen].reproduction)
    assume(norm != "L1" or not isinstance(ATTACKS[chosen], HopSkipJump | CarliniWagner))
    attack, x = replace(ATTACKS[chosen], norm=norm, eps=eps), pixels_for(name, 4)
    model = suited(attack, build(name))
    y, rng = labels_for(model, x), SampleRng.for_batch(4, seed)
    for x_adv in (attack.run(model, x, y, rng=rng).x_adv, attack(model, x, y, rng=rng)):
        assert ThreatModel(norm, eps).contains(x_adv, x).all()


class Restless(nn.Module):
    """Draws from the global generator, and may raise in the middle of a search: where a gradient is asked for, or at
    the fourth pass."""

    def __init__(self, inner: nn.Module, *, raises: bool) -> None:
        super().__init__()
        self.inner, self.raises, self.passes = inner, raises, 0

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        self.passes += 1
        if self.raises and (torch.is_grad_enabled() or self.passes == 4):
            raise ArithmeticError("in the middle")
        return self.inner(x)


def trace_of(model: nn.Module) -> dict[str, object]:
    trace: dict[str, object] = {f"mode {n}": m.training for n, m in model.named_modules()}
    for n, p in model.named_parameters():
        trace |= {f"requires_grad {n}": p.requires_grad, f"grad {n}": p.grad, f"identity {n}": id(p)}
    return trace | {f"value {n}": v.clone() for n, v in model.state_dict().items()}


def assert_same_trace(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        assert torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("name", ["top-1", "batchnorm-in-training", "mixture-in-training"])
@pytest.mark.parametrize("call", ["run", "search"])
def test_no_trace_is_left(attack, name: str, call: str, raises: bool) -> None:
    inner = build(name)
    assert isinstance(inner, nn.Module)
    model = suited(attack, Restless(inner, raises=raises))
    x = images(6).requires_grad_()
    y = labels_for(inner, x.detach())
    # partly frozen, with gradients of the training step in place
    first, *others = inner.parameters()
    first.requires_grad_(False)
    next(inner.children()).eval()
    for parameter in others:
        parameter.grad = torch.ones_like(parameter)
    before, x_before, y_before = trace_of(inner), x.detach().clone(), y.clone()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with pytest.raises(ArithmeticError) if raises else nullcontext():
        getattr(attack, call)(model, x, y)
    assert torch.equal(torch.rand(3), expected)
    assert_same_trace(before, trace_of(inner))
    assert torch.equal(x, x_before) and torch.equal(y, y_before) and x.requires_grad and x.grad is None


def test_the_same_bytes_twice(attack, name: str) -> None:
    model, x = suited(attack, build(name)), pixels_for(name, 7)
    y = labels_for(model, x)
    torch.manual_seed(1)
    first = attack.run(model, x, y)
    torch.manual_seed(2)
    with torch.no_grad():
        second = attack.run(model, x, y)
    for one, other in zip(first, second, strict=True):
        assert one is other is None or torch.equal(one.nan_to_num(), other.nan_to_num())
    assert torch.equal(attack(model, x, y), attack(model, x, y))


def in_parts(run: Callable[[Tensor], tuple], order: Tensor, size: int) -> list[Tensor]:
    """`run` on the samples in `order`, `size` at a time, put back in place."""
    parts = [run(rows) for rows in order.split(size)]
    return [torch.cat(fields)[order.argsort()] for fields in zip(*parts, strict=True) if fields[0] is not None]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", ["top-1", "soft", "batchnorm-in-training"])
def test_verdicts_do_not_depend_on_the_batch(attack, kind: str, size: int) -> None:
    model = suited(attack, build(kind))
    assert isinstance(model, nn.Module)
    model.double()
    x = images(10, torch.float64)
    y = labels_for(model, x)
    rng = SampleRng(3, torch.arange(100, 110))
    whole = [field for field in attack.run(model, x, y, rng=rng) if field is not None]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    parts = in_parts(lambda rows: attack.run(model, x[rows], y[rows], rng=rng[rows]), order, size)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kind", ["top-1", "batchnorm-in-training"])
def test_single_precision_agrees_up_to_rounding(kind: str) -> None:
    # a sign of a gradient near zero may differ in single pixels; verdicts and nearly all pixels do not
    model, x = build(kind), images(10)
    y = labels_for(model, x)
    attack = PGD(eps=0.06, steps=4)
    rng = SampleRng.for_batch(10)
    whole = attack.run(model, x, y, rng=rng)
    parts = in_parts(lambda rows: attack.run(model, x[rows], y[rows], rng=rng[rows]), torch.arange(10), 3)
    assert torch.equal(parts[1], whole.broken)
    assert ((parts[0] - whole.x_adv).abs() < 1e-5).float().mean() > 0.98


def test_a_model_in_training_mode_is_attacked_in_evaluation_mode(attack) -> None:
    model, x = suited(attack, build("mixture-in-training")), images(9)
    assert isinstance(model, nn.Module) and model.training
    y = labels_for(model, x)
    training, evaluation = attack.run(model, x, y), attack.run(model.eval(), x, y)
    assert torch.equal(training.x_adv, evaluation.x_adv)


def test_verdicts_ignore_autocast(attack) -> None:
    model, x = suited(attack, build("top-1")), images(6)
    y = labels_for(model, x)
    plain = attack.run(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attack.run(model, x, y)
    assert torch.equal(plain.x_adv, inside.x_adv) and torch.equal(plain.broken, inside.broken)


@pytest.mark.parametrize("labels", [torch.int32, torch.uint8, torch.int64])
def test_any_integer_labels(attack, labels: torch.dtype) -> None:
    model, x = suited(attack, build("top-1")), images(6)
    y = labels_for(model, x)
    assert torch.equal(attack.run(model, x, y.to(labels)).x_adv, attack.run(model, x, y).x_adv)


def test_an_empty_batch(attack, name: str) -> None:
    x, y = pixels_for(name, 0), torch.zeros(0, dtype=torch.int64)
    result = attack.run(suited(attack, build(name)), x, y)
    assert result.x_adv.shape == x.shape and all(len(field) == 0 for field in result if field is not None)


def test_routes_that_flip_are_reported() -> None:
    model, x = build("top-1"), images(40)
    y = answers(model, x)
    result = PGD(eps=0.2, steps=5).run(model, x, y)
    before, after = (model.gate(images).experts for images in (x, result.x_adv))
    assert result.flipped is not None and torch.equal(result.flipped, (before != after).any(1))
    assert 0 < int(result.flipped.sum()) < 40
    assert PGD(eps=0.2, steps=2).run(build("callable"), x, y).flipped is None


def test_the_spec_is_plain_and_complete(attack) -> None:
    spec = attack.spec()
    said = {"attack": type(attack).__name__} | ({"reproduction": True} if attack.reproduction else {})
    rebuilt = type(attack)(**{key: value for key, value in spec.items() if key not in said})
    assert rebuilt == attack and said.items() <= spec.items() and ("reproduction" in said) == ("reproduction" in spec)
    plain = [item for value in spec.values() for item in (value if isinstance(value, tuple) else [value])]
    assert all(isinstance(value, str | float | int | None) for value in plain)


def test_within_fills_what_is_not_set(attack) -> None:
    assert attack.within(ThreatModel("Linf", "1/2")).threat == ThreatModel(attack.norm or "Linf", attack.eps)
    threat = ThreatModel("L2", "1/2")
    assert PGD(eps=0.1).within(threat).threat == ThreatModel("L2", 0.1)
    assert FGSM().within(threat).threat == threat
    assert PGD(eps=0.1).threat == ThreatModel("Linf", 0.1)


def test_the_models_use_every_class_and_expert(name: str) -> None:
    model, x = build(name), pixels_for(name, 40)
    assert len(answers(model, x).unique()) == CLASSES
    if isinstance(model, MixtureOfExperts):
        assert len(model.eval().gate(x).experts[:, 0].unique()) == 3


def test_the_table_of_attacks_names_every_class() -> None:
    assert {type(attack) for attack in ATTACKS.values()} == set(get_args(get_args(AnyAttack)[0]))
