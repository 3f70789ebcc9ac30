"""Closed Ranks: which expert learns from which image, what it costs, what moves, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_networks import LogOdds

import tiny
from phalanx.attacks import FGSM, PGD, RouteSteering
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.methods import ClosedRanks, Loss, Update
from phalanx.methods.closed_ranks import _one_each
from phalanx.rng import Rng, SampleRng
from phalanx.routing import MixtureOfExperts, RobustRouter
from phalanx.threat import ThreatModel

RNG = Rng(3)
EPS = 0.1


def _mixture(experts: list[nn.Module] | None = None) -> MixtureOfExperts:
    """One pixel; the expert 0 answers above 1/2, expert 1 below: both can be reached within `EPS` of it."""
    router = RobustRouter((1, 1, 1), 2, layout="tree", sides=[[[0], [1]]], norm="Linf", eps=EPS)
    router.linear.weight.fill_(1.0)
    router.linear.bias.fill_(0.0)
    experts = [LogOdds(2.0), LogOdds(-3.0)] if experts is None else experts
    return MixtureOfExperts(router.double(), experts, train_router=False).double()


def _pixels(*values: float) -> Batch:
    x = torch.tensor(values, dtype=torch.float64)[:, None, None, None]
    return Batch(x, torch.zeros(len(values), dtype=torch.int64), torch.arange(len(values)))


def _method(**settings: Any) -> ClosedRanks:
    return ClosedRanks(**{"attack": PGD(steps=8), **settings}).within(ThreatModel("Linf", EPS))


def _update(method: ClosedRanks, model: Any, batch: Batch, rng: Rng = RNG) -> Update:
    (update,) = method.updates(model, {"train": batch}, rng)
    return update


def _loss(method: ClosedRanks, model: Any, batch: Batch, rng: Rng = RNG) -> Loss:
    return _update(method, model, batch, rng).loss()


# 0.9 reaches expert 0 alone, 0.55 both, 0.2 expert 1 alone
BATCH = _pixels(0.9, 0.55, 0.2)


def _ce(weight: float, pixel: float) -> float:
    """Of class 0 where the odds are exp(weight * pixel)."""
    return math.log1p(math.exp(-weight * pixel))


def test_the_sum_by_hand() -> None:
    # each expert is attacked by itself: 2x is lowest at x - eps, -3x at x + eps, whatever the route is there
    expected = _ce(2, 0.8) + _ce(2, 0.45) + _ce(-3, 0.65) + _ce(-3, 0.3)
    loss = _loss(_method(form="sum"), _mixture(), BATCH)
    assert loss.value.item() == pytest.approx(expected / 3)
    assert _update(_method(form="sum"), _mixture(), BATCH).logs["reach"].item() == pytest.approx(4 / 3)


def test_rand_draws_one_of_those_that_are_reachable() -> None:
    one = _ce(2, 0.8) + _ce(-3, 0.3)
    either = {round((one + own) / 3, 9) for own in (_ce(2, 0.45), _ce(-3, 0.65))}
    found = {round(_loss(_method(), _mixture(), BATCH, Rng(seed)).value.item(), 9) for seed in range(12)}
    assert found == either


def test_rand_draws_evenly() -> None:
    reach = torch.tensor([[True, False, True, True]]).expand(3000, -1)
    pairs = _one_each(reach, SampleRng.for_batch(3000, 1))
    share = torch.bincount(pairs.experts, minlength=4) / 3000
    torch.testing.assert_close(share, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]), atol=0.03, rtol=0)
    assert torch.equal(pairs.rows, torch.arange(3000))


def test_the_sum_bounds_the_worst_case() -> None:
    """Over a fine grid of the ball: what the deployed mixture loses is never more."""
    model = _mixture()
    for pixel in (0.05, 0.42, 0.5, 0.58, 0.97):
        bound = _loss(_method(form="sum"), model, _pixels(pixel)).value.item()
        grid = torch.linspace(max(0, pixel - EPS), min(1, pixel + EPS), 201, dtype=torch.float64)[:, None, None, None]
        worst = F.cross_entropy(model(grid), torch.zeros(201, dtype=torch.int64), reduction="none").max().item()
        assert worst <= bound + 1e-9


def test_the_trades_term_by_hand() -> None:
    method = _method(form="sum", term="trades", beta=2.0, attack=PGD(steps=3, objective="kl", eps=0))
    # without a ball nothing is attacked: clean cross-entropy of the experts that answer
    loss = _loss(replace(method, attack=replace(method.attack, eps=1e-12)), _mixture(), _pixels(0.9, 0.2))
    assert loss.value.item() == pytest.approx((_ce(2, 0.9) + _ce(-3, 0.2)) / 2)
    assert loss.logs["kl"].item() == pytest.approx(0)
    attacked = _loss(_method(form="sum", term="trades", attack=PGD(steps=9, objective="kl")), _mixture(), _pixels(0.9))
    # the divergence grows to either side of the clean image; the random start says to which
    p, sides = 1 / (1 + math.exp(-1.8)), [1 / (1 + math.exp(-2 * pixel)) for pixel in (0.8, 1.0)]
    ends = [_ce(2, 0.9) + 6 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) for q in sides]
    assert any(attacked.value.item() == pytest.approx(end) for end in ends)


def test_the_margin_term_by_hand() -> None:
    loss = _loss(_method(term="margin", attack=PGD(steps=8, objective="margin")), _mixture(), _pixels(0.9))
    # of two classes it is the cross-entropy
    assert loss.value.item() == pytest.approx(_ce(2, 0.8))


def test_a_third_class_tells_margin_from_cross_entropy() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z = self.scale * x.flatten(1)
            return torch.cat([2 * z, z, z], 1)

    model = _mixture([Three(), Three()])
    loss = _loss(_method(term="margin"), model, _pixels(0.9))
    assert loss.value.item() == pytest.approx(_ce(1, 0.8))
    assert _loss(_method(), model, _pixels(0.9)).value.item() == pytest.approx(math.log1p(2 * math.exp(-0.8)))


def test_only_experts_that_can_be_reached_learn() -> None:
    model = _mixture()
    _loss(_method(form="sum"), model, _pixels(0.9, 0.8)).value.backward()
    used, idle = (expert.weight.grad for expert in model.experts)  # type: ignore[union-attr]
    assert isinstance(used, Tensor) and used.abs() > 0
    assert idle is None or not idle.any()  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_loss() -> None:
    batch = next(tiny.digits().train.batches(16))
    values = [_loss(_small(), _trainable(), batch, rng).value for rng in (RNG, RNG, Rng(4))]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_one_expert_sees_the_attack_that_a_single_network_would() -> None:
    """So that differences to it are differences of the method, not of the draws."""
    batch = next(tiny.digits().train.batches(16))
    model = _trainable()
    router = model.router
    router.linear.bias.fill_(100.0)
    assert router.reachable(batch.x, tiny.THREAT)[:, 0].all()
    single = MixtureOfExperts(None, [model.experts[0]])
    found = PGD(steps=2).within(tiny.THREAT).search(single, *batch.xy, rng=RNG.fold("attack").samples(batch.ids))
    expected = F.cross_entropy(single(found.x_adv), batch.y)
    torch.testing.assert_close(_loss(_small(), model, batch).value, expected)


def test_attacks_see_evaluation_mode_losses_training_mode() -> None:
    model, seen = _trainable().train(), list[tuple[bool, bool]]()
    for expert in model.experts:
        expert.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].requires_grad)))
    _loss(_small(form="sum"), model, next(tiny.digits().train.batches(32)))
    assert {training for training, wanted in seen if wanted} == {False}
    assert [state for state in seen if not state[1]] == [(True, False)] * 2


def test_training_moves_the_experts_alone_and_resumes_exactly(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in _trainable().state_dict().items()}
    model = tiny.run_training(tmp_path / "whole", _trainable(), _small(form="sum"))
    after = model.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"experts"}
    with pytest.raises(tiny.Stop):
        tiny.run_training(
            tmp_path / "cut", _trainable(), _small(form="sum"), reporter=tiny.StopAt(4), checkpoint_seconds=0
        )
    tiny.run_training(tmp_path / "cut", _trainable(), _small(form="sum"), checkpoint_seconds=0)
    assert tiny.result(tmp_path / "whole") == tiny.result(tmp_path / "cut")
    last = tiny.metrics(tmp_path / "whole")[-1]
    assert len(last["load"]) == 2 and 1 <= last["reach"] <= 2 and 0 <= last["adversarial_accuracy"] <= 1


@pytest.mark.parametrize("form", ["rand", "sum"])
def test_cost_of_a_step(form: str) -> None:
    """Images through an expert: K + 1 for each pair, for "rand" as many pairs as images."""
    batch, model, seen = next(tiny.digits().train.batches(32)), _trainable(), Counter[str]()
    for expert in model.experts:
        expert.register_forward_pre_hook(lambda _, inputs: seen.update(images=len(inputs[0])))
    update = _update(_small(form=form), model, batch)
    update.loss()
    pairs = 32 if form == "rand" else round(32 * update.logs["reach"].item())
    assert seen["images"] == pairs * (2 + 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClosedRanks(beta=-1), "beta must be at least 0, got -1"),
        (lambda: ClosedRanks(attack=PGD(surface="dense")), "attack.surface must be 'whole', got 'dense'"),
        (lambda: ClosedRanks(attack=RouteSteering()), "can aim at a single expert, got route_steering; use pgd"),
        (
            lambda: ClosedRanks(term="trades"),
            "attack.objective must be 'kl', the term that closed_ranks with term trades",
        ),
        (lambda: ClosedRanks(term="trades", attack=FGSM(objective="kl")), "must start at random, got fgsm"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def _top2() -> MixtureOfExperts:
    model = _trainable()
    return MixtureOfExperts(model.router, list(model.experts), "all", train_router=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.mixture(2), "behind a robust router, got a LinearRouter; set model.router.name=robust"),
        (lambda: tiny.mixture(1), "behind a robust router, got a single network; .* model.experts to at least 2"),
        (_top2, "needs top_k=1, one expert for each image, got 2; set model.top_k=1"),
        (lambda: nn.Flatten(), "trains a mixture of whole networks, got a Flatten"),
        (
            lambda: MixtureOfExperts(_trainable().router, list(_trainable().experts)),
            "behind a frozen router; build the mixture with train_router=False",
        ),
        (lambda: _trainable("8/255"), "fitted for Linf 8/255, the training attack has Linf 3/16; fit it for the same"),
        (lambda: _trainable("3/16", "L2"), "fitted for L2 3/16, the training attack has Linf 3/16"),
    ],
)
def test_a_model_that_it_cannot_train_is_refused(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _small().check(model(), 10)


def test_the_right_model_is_not() -> None:
    _small().check(_trainable(), 10)
    # a radius written otherwise is the same
    _small().check(_trainable(0.1875), 10)


def _trainable(eps: float | str = "3/16", norm: Any = "Linf") -> Any:
    """Two small experts behind a split of the digits by their brightness."""
    torch.manual_seed(0)
    experts = list(tiny.mixture(2).experts)
    router = RobustRouter((1, 8, 8), 2, layout="tree", sides=[[[0], [1]]], norm=norm, eps=eps)
    router.linear.weight.fill_(1 / 64)
    router.linear.bias.fill_(0.195)
    return MixtureOfExperts(router, experts, train_router=False)


def _small(**settings: Any) -> ClosedRanks:
    return ClosedRanks(**{"attack": PGD(steps=2), **settings}).within(tiny.THREAT)
