"""Attacks of other libraries: what they return is theirs, the ball and the verdict are ours."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phalanx.compat import ForeignAttack, with_external
from phalanx.errors import InputError
from phalanx.evaluation import evaluate, protocol
from phalanx.runs import Ledger
from phalanx.threat import ThreatModel
from tiny import digits, mixture

THREAT = ThreatModel("Linf", 0.05)


def images(n: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and its answers to them."""
    model = mixture(2, 1).eval()
    x = next(iter(digits().test.batches(n))).x
    with torch.no_grad():
        return model, x, model(x).argmax(-1)


def foreign(function: object) -> ForeignAttack:
    return ForeignAttack(name="theirs", function=function).within(THREAT)  # type: ignore[arg-type]


def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A long way up the gradient, out of the ball and of [0, 1]."""
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)
    return x + 3 * gradient.sign()


def test_what_leaves_the_ball_is_projected_and_then_judged() -> None:
    model, x, y = images()
    result = foreign(far).run(model, x, y)
    assert bool(THREAT.contains(result.x_adv, x).all())
    assert torch.equal(result.broken, model(result.x_adv).argmax(-1) != y) and bool(result.broken.any())


def test_it_cannot_flatter_or_fool() -> None:
    model, x, y = images()
    original = x.clone()

    def liar(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.train()
        y.zero_()
        x.fill_(float("nan"))
        return x

    result = foreign(liar).run(model, x, y)
    # pixels that are no numbers are the clean image's: nothing was found
    assert torch.equal(result.x_adv, x) and torch.equal(x, original)
    assert not bool(result.broken.any()) and not bool(result.invalid.any())
    assert not any(part.training for part in model.modules())


def test_it_sees_a_frozen_model_and_no_clean_errors() -> None:
    model, x, y = images()
    seen: list[tuple[bool, bool, int]] = []

    def look(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        trainable = any(weight.requires_grad for weight in model.parameters())
        seen.append((model.training, trainable, len(y)))
        return x

    wrong = y.clone()
    wrong[:2] = (wrong[:2] + 1) % 10
    foreign(look).run(model.train(), x, wrong)
    assert seen == [(False, False, len(y) - 2)]
    assert model.training


def test_the_verdict_is_that_of_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)).eval()
    model[2].running_mean.uniform_(-1, 1)
    x = images(6)[1]
    y = model(x).argmax(-1)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def sloppy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.train().requires_grad_()
        model(x)
        with torch.no_grad():
            model[4].weight.neg_()
        return x

    result = foreign(sloppy).run(model, x, y)
    assert not result.broken.any() and torch.equal(result.predicted, y)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_its_random_numbers_are_seeded_and_nobody_else_s() -> None:
    model, x, y = images()

    def noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        drawn = torch.rand_like(x) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return x + 0.05 * (drawn - 1.5).sign()

    first = foreign(noise).run(model, x, y).x_adv
    # another state of every generator
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    second = foreign(noise).run(model, x, y).x_adv
    assert torch.equal(first, second) and not torch.equal(first, x)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(("answer", "got"), [(lambda m, x, y: x[:1], r"\(1, 1, 8, 8\)"), (lambda m, x, y: 0, "int")])
def test_an_answer_that_is_no_image_for_each_is_named(answer: object, got: str) -> None:
    model, x, y = images()
    with pytest.raises(InputError, match=f"external:theirs must return images .* got {got}"):
        foreign(answer).run(model, x, y)


@pytest.mark.parametrize("option", [{"surface": "router"}, {"objective": "margin"}, {"targeted": True}])
def test_what_is_theirs_to_choose_cannot_be_set(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is fixed"):
        ForeignAttack(name="theirs", function=far, **option)  # type: ignore[arg-type]


def test_as_a_member_it_counts_in_the_worst_case(tmp_path: Path) -> None:
    model, _, y = images(20)
    data = digits().test.first(20)
    data = type(data)(data.pixels, y.numpy(), data.ids, data.levels)
    wanted = with_external(protocol("fgsm:0", THREAT), {"far": far}, THREAT)
    assert wanted.name == "fgsm:0,external:far"
    found = evaluate(model, data, wanted, THREAT, ledger=tmp_path / "ledger")
    by_name = {each.attack: each for each in found.summary.attacks}
    assert by_name["fgsm:0"].broken == 0 and by_name["external:far"].broken > 0
    assert found.robust_acc == by_name["external:far"].accuracy
    with Ledger.read(tmp_path / "ledger") as ledger:
        spec = ledger.attacks()["external:far"]
    assert spec["function"] == "far" and spec["eps"] == 0.05 and spec["attack"] == "ForeignAttack"
