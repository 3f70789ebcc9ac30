# B batch, E experts

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD, RouteSteering
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.methods import RTER, JTDMoE, Update
from phalanx.methods.base import LabelledBatch, Loss
from phalanx.rng import Rng
from phalanx.routing import DualModel, MixtureOfExperts, RoutedModel, load_balance
from phalanx.threat import ThreatModel
from phalanx.training import SGD, Adam
from reference.mixture import mixture_logits
from reference.rt_er import dual_loss, rt_er_loss

RNG = Rng(3)
PRESETS: tuple[Any, ...] = ("paper", "code", "sound")


def _dual(alpha: float = 0.7, *, experts: int = 4, **options: Any) -> DualModel:
    return DualModel(tiny.mixture(experts, seed=0), tiny.mixture(experts, seed=1), alpha, **options)


def _method(steps: int = 2, **settings: Any) -> JTDMoE:
    return JTDMoE(attack=PGD(steps=steps), **settings).within(tiny.THREAT)


def _digits(size: int = 16) -> Batch:
    return next(tiny.digits().train.batches(size))


def _losses(method: JTDMoE, model: DualModel, batch: Batch) -> list[Loss]:
    """Of both levels, at the same weights."""
    return [update.loss() for update in method.updates(model, {"train": batch}, RNG)]


# -- choices -------------------------------------------------------------------------------------------------------


def test_the_presets() -> None:
    assert JTDMoE.PRESETS == {
        "paper": ("second", "adversarial", "shared", "mean", "joint"),
        "code": ("all", "clean", "own", "sum", "cross_entropy"),
        "sound": ("all_others", "adversarial", "own", "mean", "cross_entropy"),
    }
    assert JTDMoE().preset == "sound"
    assert {preset: JTDMoE(preset=preset).moves for preset in PRESETS} == {
        "paper": "both",
        "code": "standard",
        "sound": "both",
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_field_overrides_its_preset_and_nothing_else(preset: Any) -> None:
    settled = JTDMoE(preset=preset)
    for moves in ("both", "standard"):
        method = JTDMoE(preset=preset, upper_moves=moves)  # type: ignore[arg-type]
        assert (method.moves, method.choices) == (moves, settled.choices)
    method = JTDMoE(preset=preset, kl_reduction="sum")
    assert (method.choices, method.moves) == (settled.choices._replace(kl_reduction="sum"), settled.moves)


# -- the losses ----------------------------------------------------------------------------------------------------


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("regularised", ["second", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_both_levels_equal_a_loop_over_single_images_and_experts(regularised: Any, reduction: Any, mix: Any) -> None:
    model = _dual(mix=mix).double().eval()
    x, y, ids = _digits(8)
    batch = Batch(x.double(), y, ids)
    settings = {"regularised": regularised, "kl_reduction": reduction, "balance": 0.0, "beta": 2.5}
    attack = PGD(steps=3, random_start=False)
    method = JTDMoE(preset="code", upper_moves="both", attack=attack, **settings).within(tiny.THREAT)  # type: ignore[arg-type]
    lower, upper = (loss.value for loss in _losses(method, model, batch))
    robust: Any = model.robust
    expected = rt_er_loss(
        robust.router,
        robust.experts,
        batch.x,
        y,
        regularised=regularised,
        reduction=reduction,
        beta=2.5,
        epsilon=3 / 16,
        steps=3,
    )
    torch.testing.assert_close(lower, expected)
    torch.testing.assert_close(_gradients(lower, model), _gradients(expected, model))
    # RT-ER itself is the same loss of that mixture
    (update,) = RTER(preset="code", attack=method.attack, **settings).updates(robust, {"train": batch}, RNG)  # type: ignore[arg-type]
    assert torch.equal(update.loss().value, lower)

    halves = [
        lambda image, half=half: mixture_logits(half.router, half.experts, image, 1)
        for half in (model.standard, model.robust)
    ]
    expected = dual_loss(*halves, 0.7, mix)(batch.x, y)
    torch.testing.assert_close(upper, expected)
    torch.testing.assert_close(_gradients(upper, model), _gradients(expected, model))


def test_the_upper_level_balances_both_gates() -> None:
    model, batch = _dual(), _digits()
    free, heavy = (_losses(_method(balance=balance), model, batch)[1].value for balance in (0.0, 2.0))
    torch.testing.assert_close(heavy - free, 2 * load_balance(model.gate(batch.x)))


def test_the_upper_level_sees_the_lower_one_moved() -> None:
    model, batch = _dual(), _digits()
    before = _losses(_method(), model, batch)[1].value
    levels = _method().updates(model, {"train": batch}, RNG)
    next(levels)
    with torch.no_grad():
        for expert in model.robust.experts:  # type: ignore[attr-defined]
            expert[-1].weight.mul_(2)
    assert not torch.allclose(next(levels).loss().value, before)


@pytest.mark.parametrize(
    "change",
    [{"preset": "paper"}, {"preset": "code"}, {"regularised": "all"}, {"kl_point": "shared"}, {"kl_reduction": "sum"}],
    ids=str,
)
def test_every_choice_changes_the_lower_loss_and_no_upper_one(change: dict[str, Any]) -> None:
    first, second = (_losses(method, _dual(), _digits()) for method in (_method(), _method(**change)))
    assert not torch.allclose(first[0].value, second[0].value)
    torch.testing.assert_close(first[1].value, second[1].value)


# -- who moves -----------------------------------------------------------------------------------------------------


def _hashes(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


STATES: list[dict[str, str]] = []


@dataclass(frozen=True, kw_only=True)
class _Watched(JTDMoE):
    """Hashes every parameter before and after each move, and looks for gradients left behind."""

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        assert isinstance(model, DualModel)

        def clear() -> bool:
            return all(parameter.grad is None for parameter in model.parameters())

        def looked(loss: Callable[[], Loss]) -> Loss:
            assert clear()
            return loss()

        for update in super().updates(model, batches, rng):
            STATES.append(_hashes(model))
            yield update._replace(loss=lambda loss=update.loss: looked(loss))
            assert clear()
            STATES.append(_hashes(model))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", [SGD(lr=0.05), Adam(lr=0.01, weight_decay=0.1)], ids=["sgd", "adam"])
def test_each_level_moves_exactly_its_players(tmp_path: Path, preset: Any, optimizer: Any) -> None:
    STATES.clear()
    model = _dual(experts=2)
    method = _Watched(attack=PGD(steps=1), preset=preset).within(tiny.THREAT)
    tiny.run_training(tmp_path, model, method, epochs=2, optimizer=optimizer)
    # 6 steps of two levels; the last step's learning rate is 0
    assert len(STATES) == 24
    for index in range(0, 20, 4):
        start, lower, before_upper, upper = STATES[index : index + 4]
        assert lower == before_upper
        moved = [
            {name for name in before if before[name] != after[name]}
            for before, after in ((start, lower), (lower, upper))
        ]
        everything = {half: {name for name in start if name.startswith(half)} for half in ("standard", "robust")}
        # all of R, its router too, and nothing of S; momentum and decay move an expert without images as well
        assert moved[0] == everything["robust"]
        assert moved[1] == everything["standard"] | (set() if preset == "code" else everything["robust"])


def test_a_frozen_router_stays(tmp_path: Path) -> None:
    model = DualModel(tiny.mixture(2, train_router=False), tiny.mixture(2, seed=1, train_router=False), 0.5)
    before = _hashes(model)
    tiny.run_training(tmp_path, model, _method(1), epochs=1)
    after = _hashes(model)
    assert {name for name in before if before[name] == after[name]} == {name for name in before if ".router." in name}


@pytest.mark.parametrize("moves", ["both", "standard"])
def test_a_half_that_stays_keeps_its_statistics(moves: Any) -> None:
    model = DualModel(tiny.mixture(2, expert="small_cnn"), tiny.mixture(2, seed=1, expert="small_cnn"), 0.5).train()
    levels = _method(1, upper_moves=moves).updates(model, {"train": _digits(32)}, RNG)
    next(levels)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = next(levels).loss()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {
        name.partition(".")[0] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])
    }
    assert changed == ({"standard", "robust"} if moves == "both" else {"standard"})
    loss.value.backward()
    reached = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == changed


def test_what_is_logged(tmp_path: Path) -> None:
    for preset, upper in (("sound", ""), ("code", "standard.")):
        tiny.run_training(tmp_path / preset, _dual(experts=2), _method(1, preset=preset), epochs=1)
        epoch = tiny.metrics(tmp_path / preset)[0]
        lower = {"loss", "accuracy", "adversarial_accuracy", "kl", "load", "zero_gradient"}
        assert {f"robust.{key}" for key in lower} | {
            f"{upper}{key}" for key in ("loss", "accuracy", "dual.standard.load", "dual.robust.load")
        } == set(epoch) - {"kind", "epoch", "step", "lr"}


@pytest.mark.parametrize(("half", "routers"), [("standard", ["dual.standard"]), ("robust", ["dual.robust", "robust"])])
def test_a_collapse_of_either_half_is_said_in_its_epoch(tmp_path: Path, half: str, routers: list[str]) -> None:
    model = _dual(experts=3)
    with torch.no_grad():
        getattr(model, half).router[2].bias += torch.tensor([0.0, 1e4, 0.0])
    reporter = tiny.StopAt(-1)
    tiny.run_training(tmp_path, model, _method(1), epochs=1, reporter=reporter)
    assert [message.partition(":")[0] for message in reporter.messages] == [
        f"router collapse of {router} in epoch 1" for router in routers
    ]
    alarms = [record["message"] for record in tiny.metrics(tmp_path) if record["kind"] == "alarm"]
    assert alarms == reporter.messages


# -- what a step costs ---------------------------------------------------------------------------------------------

UNITS: list[int] = []


class _Counted(torch.autograd.Function):
    """The identity; forward is one unit an image, backward one to the images or two to the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        UNITS.append(len(x))
        ctx.empty = torch.zeros_like(weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        UNITS.append((2 if ctx.needs_input_grad[1] else 1) * len(gradient))
        return gradient, ctx.empty


class _Meter(nn.Module):
    """Stands before a network and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return _Counted.apply(x, self.weight)  # type: ignore[no-any-return,no-untyped-call]


def _metered(mixture: MixtureOfExperts) -> MixtureOfExperts:
    mixture.experts = nn.ModuleList(nn.Sequential(_Meter(), expert) for expert in mixture.experts)
    return mixture


@pytest.mark.parametrize(
    ("method", "units"),
    [
        (RTER(preset="code"), 49),
        (RTER(preset="sound"), 101),
        (RTER(preset="paper"), 59),
        (JTDMoE(preset="code"), 131),
        (JTDMoE(preset="code", upper_moves="both"), 133),
        (JTDMoE(preset="sound"), 107),
        (JTDMoE(preset="paper"), 65),
    ],
    ids=lambda value: f"{value.name} {value.preset}" if isinstance(value, RTER | JTDMoE) else str(value),
)
def test_the_cost_of_a_step_is_the_documented_one(method: RTER | JTDMoE, units: int) -> None:
    mixture, batch = _metered(tiny.mixture(4, seed=1)), _digits(8)
    model = DualModel(_metered(tiny.mixture(4)), mixture, 0.7) if isinstance(method, JTDMoE) else mixture
    UNITS.clear()
    assert isinstance(method.attack, PGD) and method.attack.steps == 10
    for update in method.within(tiny.THREAT).updates(model, {"train": batch}, RNG):
        update.loss().value.backward()
    assert sum(UNITS) == units * len(batch.ids)
    if units in (50, 104, 59, 135):
        assert f"= {units}" in (type(method).__doc__ or "")


# -- what is refused -----------------------------------------------------------------------------------------------


def _refused(model: Any, method: JTDMoE, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method.check(model, 10)


def test_a_model_that_is_not_dual_is_refused(tmp_path: Path) -> None:
    message = "jtdmoe trains a dual model, got MixtureOfExperts; set model.name to dual, or use rt_er"
    _refused(tiny.mixture(2), _method(), message)
    with pytest.raises(InputError, match=message):
        _losses(_method(), tiny.mixture(2), _digits())
    with pytest.raises(InputError, match=message):
        tiny.run_training(tmp_path / "run", tiny.mixture(2), _method())
    # before anything was written
    assert not [name for name in ("metrics.jsonl", "checkpoints") if (tmp_path / "run" / name).exists()]


@pytest.mark.parametrize(("alpha", "half"), [(0.0, "robust"), (1.0, "standard")])
def test_an_alpha_that_leaves_a_half_without_gradient_is_refused(alpha: float, half: str) -> None:
    _refused(
        _dual(alpha), _method(), rf"at alpha={alpha:g} the {half} half has no part in the answer .* strictly between"
    )


@pytest.mark.parametrize(("experts", "top_k", "remedy"), [(2, 2, "lower model.top_k"), (1, 1, "raise model.experts")])
def test_a_robust_half_without_an_idle_expert_is_refused(experts: int, top_k: int, remedy: str) -> None:
    model = DualModel(tiny.mixture(2), tiny.mixture(experts, top_k, seed=1), 0.5)
    message = f"robust half: jtdmoe needs a non-selected expert: top_k={top_k} of {experts} experts; {remedy}"
    _refused(model, _method(), message)
    _method(regularised="all").check(model, 10)


def test_a_dual_half_is_refused() -> None:
    model = DualModel(tiny.mixture(2), DualModel(tiny.mixture(2), tiny.mixture(2), 0.5), 0.5)
    _refused(model, _method(), "robust half: jtdmoe trains a mixture of whole networks, got a model with several gates")


def test_any_standard_half_will_do(tmp_path: Path) -> None:
    model = DualModel(tiny.mixture(1), tiny.mixture(2, seed=1), 0.5)
    before = _hashes(model)
    tiny.run_training(tmp_path, model, _method(1), epochs=1)
    assert not {name for name, digest in _hashes(model).items() if before[name] == digest}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JTDMoE(beta=-1), "beta must be at least 0, got -1"),
        (lambda: JTDMoE(balance=-1), "balance must be at least 0, got -1"),
        (
            lambda: JTDMoE(attack=PGD(surface="dense")),
            "attack.surface must be 'whole', got 'dense'; jtdmoe itself aims",
        ),
        (lambda: JTDMoE(attack=RouteSteering()), "attack must be one that can aim at a single expert"),
        (lambda: JTDMoE(inner="joint"), "kl_point must be 'shared' where inner is 'joint'"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_threat_fills_what_was_left_open() -> None:
    method = JTDMoE(beta=2.0, preset="code", upper_moves="both").within(ThreatModel("L2", "1/2"))
    assert (method.attack.norm, str(method.attack.eps), method.beta, method.moves) == ("L2", "1/2", 2.0, "both")


def test_a_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    tiny.run_training(tmp_path / "whole", _dual(experts=2), _method(1))
    with pytest.raises(tiny.Stop):
        tiny.run_training(
            tmp_path / "cut", _dual(experts=2), _method(1), reporter=tiny.StopAt(4), checkpoint_seconds=0.0
        )
    tiny.run_training(tmp_path / "cut", _dual(experts=2), _method(1))
    assert tiny.result(tmp_path / "whole") == tiny.result(tmp_path / "cut")
