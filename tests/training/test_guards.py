"""A run stops within the step in which it became worthless, says where, and leaves nothing worthless behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from method_samples import Loop, nan, without_value_but_with_nan_gradient
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.errors import DivergedError, Interrupted
from phalanx.experts import TwoHeaded
from phalanx.methods import AT, DWF, RTER, SOE, TRADES, AdvMoE, FreeAT, JTDMoE, Method
from phalanx.rng import Rng, SampleRng
from phalanx.routing import DualModel, MixtureOfExperts, Route, SynergyOfExperts, pin
from phalanx.runs.checkpoint import load_latest, load_tensors
from phalanx.training import SGD, Adam, NoGradientError
from phalanx.training.guards import SILENT_STEPS, GradientWatch, collapse_alarms, gradient_norm, overfitting_alarms
from phalanx.training.meters import Meters

FAULT_STEP = 4
_EVERY_STEP: dict[str, Any] = {"checkpoint_seconds": 0.0}


def _at_fault_step(change: Callable[[MixtureOfExperts, Tensor], Tensor]) -> Loop:
    return Loop(lambda model, step, loss: change(model, loss) if step == FAULT_STEP else loss)


def _poison_weight(model: MixtureOfExperts, loss: Tensor) -> Tensor:
    with torch.no_grad():
        model.router[2].bias[0] = float("nan")
    return loss * model.router(torch.zeros(1, 1, 8, 8)).sum()


def _poison_statistics(model: MixtureOfExperts, loss: Tensor) -> Tensor:
    # no training pass reads them, so the loss stays finite
    model.get_buffer("experts.1.1.1.running_var").data[0] = float("inf")
    return loss


class _NanLogits(nn.Module):
    """A router whose scores become NaN at the fault step although its weights are sound."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.router(x)
        self.passes += 1
        return scores * float("nan") if self.passes > FAULT_STEP else scores


@dataclass(frozen=True, kw_only=True)
class _NanAttack(PGD):
    """Turns to NaN at the fault step; nothing but its answer is at fault."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        found = super().perturb(target, rng)
        return found._replace(x_adv=found.x_adv * float("nan")) if CALLS.pop() else found


CALLS: list[bool] = []


def _faulty(where: str) -> tuple[nn.Module, Method]:
    model = tiny.mixture(expert="small_cnn" if where == "statistics" else "mlp")
    change: dict[str, Callable[[MixtureOfExperts, Tensor], Tensor]] = {
        "loss": lambda model, loss: loss * nan(),
        "gradient": lambda model, loss: loss + without_value_but_with_nan_gradient(model.experts[1][2].weight),
        "weight": _poison_weight,
        "statistics": _poison_statistics,
    }
    if where in change:
        return model, _at_fault_step(change[where])
    if where == "logits":
        model.router = _NanLogits(model.router)
        return model, Loop(lambda model, step, loss: loss)
    CALLS[:] = [step == FAULT_STEP for step in range(10)][::-1]
    return model, AT(attack=_NanAttack(steps=1)).within(tiny.THREAT)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("loss", "loss nan"),
        ("gradient", "gradient of experts.1.2.weight"),
        ("weight", "router.2.bias"),
        ("logits", "gradient of router.router.2.weight"),
        ("attack", "gradient of "),
        ("statistics", "experts.1.1.1.running_var"),
    ],
)
def test_a_non_finite_number_stops_the_run_within_its_step(tmp_path: Path, where: str, names: str) -> None:
    model, method = _faulty(where)
    with pytest.raises(DivergedError) as caught:
        tiny.run_training(tmp_path, model, method, epochs=3, **_EVERY_STEP)
    assert caught.value.exit_code == 3
    assert f"diverged at step {FAULT_STEP}:" in str(caught.value) and names in str(caught.value)
    kept = load_latest(tmp_path / "checkpoints")
    # checkpoints count the steps that are done: steps 0 to 3
    assert kept is not None and kept.step == FAULT_STEP
    for path in tmp_path.rglob("*.safetensors"):
        tensors = load_tensors(path)[0] if path.parent == tmp_path else kept.tensors[path.stem]
        assert all(tensor.isfinite().all() for tensor in tensors.values()), path
    assert all("nonfinite" not in record for record in tiny.metrics(tmp_path))


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step 0: .*non-finite numbers"):
        tiny.run_training(
            tmp_path, method=Loop(lambda model, step, loss: 1e5 * loss), optimizer=SGD(lr=1e38), **_EVERY_STEP
        )
    kept = load_latest(tmp_path / "checkpoints")
    assert kept is not None and kept.step == 0


class _Detached(MixtureOfExperts):
    """An argmax router: the papers' released gate, through which no gradient flows."""

    def gate(self, x: Tensor) -> Route:
        route = pin(super().gate(x))
        assert isinstance(route, Route)
        return route


def test_a_router_without_gradient_is_an_error_by_name(tmp_path: Path) -> None:
    whole = tiny.mixture()
    model = _Detached(whole.router, whole.experts)
    with pytest.raises(
        NoGradientError, match=r"step 0: router gets no gradient .*model\.router\.train=false"
    ) as caught:
        tiny.run_training(tmp_path, model)
    assert caught.value.exit_code == 3
    # declared frozen it is no player, and trains
    tiny.run_training(tmp_path / "frozen", _Detached(whole.router, whole.experts, train_router=False))


def test_an_idle_expert_is_no_error(tmp_path: Path) -> None:
    model = tiny.mixture(3)
    with torch.no_grad():
        model.router[2].bias += torch.tensor([0.0, 0.0, -1e4])
    before = model.experts[2][2].weight.detach().clone()
    tiny.run_training(tmp_path, model, epochs=1, optimizer=SGD(lr=0.1, momentum=0.0, weight_decay=0.5))
    # nothing but the decay moved it, in three cosine steps of lr 0.1, 0.05 and 0: zero gradient, as on another rank
    assert torch.allclose(model.experts[2][2].weight, before * 0.95 * 0.975)


def test_exact_zeros_are_counted_in_a_row_by_player() -> None:
    watch = GradientWatch()
    for step in range(SILENT_STEPS - 1):
        watch.check(step, {"experts": 1.0, "router": 0.0})
    watch.check(49, {"experts": 1.0, "router": 1e-30})
    for step in range(50, 49 + SILENT_STEPS):
        watch.check(step, {"experts": 1.0, "router": 0.0})
    with pytest.raises(NoGradientError, match="step 99: the gradient of router has been exactly zero for 50 updates"):
        watch.check(99, {"experts": 1.0, "router": 0.0})


def test_the_count_of_zeros_survives_a_stop(tmp_path: Path) -> None:
    def silent(model: MixtureOfExperts, step: int, loss: Tensor) -> Tensor:
        return loss * 0

    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path, method=Loop(silent), epochs=20, reporter=tiny.StopAt(30), **_EVERY_STEP)
    with pytest.raises(NoGradientError, match=f"step {SILENT_STEPS - 1}:"):
        tiny.run_training(tmp_path, method=Loop(silent), epochs=20)


def test_gradient_norm_by_hand() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    assert gradient_norm([a, b]) is None
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = gradient_norm([a, b, c])
    assert norm is not None and norm.item() == 5.0


def test_router_collapse_is_in_the_log_and_said(tmp_path: Path) -> None:
    model = tiny.mixture(3)
    with torch.no_grad():
        model.router[2].bias += torch.tensor([0.0, 1e4, 0.0])
    reporter = tiny.StopAt(-1)
    tiny.run_training(tmp_path, model, epochs=2, reporter=reporter)
    alarms = [record for record in tiny.metrics(tmp_path) if record["kind"] == "alarm"]
    assert [(alarm["epoch"], alarm["alarm"]) for alarm in alarms] == [(1, "router_collapse"), (2, "router_collapse")]
    assert reporter.messages == [alarm["message"] for alarm in alarms]
    assert "expert 1 got 100% of the images" in reporter.messages[0]


@pytest.mark.parametrize(
    ("load", "alarm"), [([0.95, 0.05], False), ([0.96, 0.04], True), ([1.0], False), ([], False), ([0.3, 0.7], False)]
)
def test_when_a_router_counts_as_collapsed(load: list[float], alarm: bool) -> None:
    assert bool(collapse_alarms({"loss": 1.0, "load": load}, 1)) is alarm


def test_every_router_is_watched_by_its_name() -> None:
    gone, fine = [0.01, 0.99], [0.5, 0.5]
    means = {"load": gone, "dual.standard.load": gone, "robust.load": [0.98, 0.02], "dual.robust.load": fine}
    # what only looks like a load
    means |= {"overload": gone, "load.of": gone, "standard.load": 0.99}  # type: ignore[dict-item]
    rest = "of the images; the mixture is one network. Raise method.balance or lower the learning rate"
    # in the order of the names, which a resumed run keeps
    assert collapse_alarms(means, 3) == [
        f"router collapse of dual.standard in epoch 3: expert 1 got 99% {rest}",
        f"router collapse in epoch 3: expert 1 got 99% {rest}",
        f"router collapse of robust in epoch 3: expert 0 got 98% {rest}",
    ]


def _history(*epochs: tuple[float | None, float | None], key: str = "adversarial_accuracy") -> list[dict[str, Any]]:
    """Records of a run from (accuracy under the training attack, validated robust accuracy) by epoch."""
    records: list[dict[str, Any]] = []
    for epoch, (trained, robust) in enumerate(epochs, start=1):
        logged = {} if trained is None else {key: trained}
        records.append({"kind": "train", "epoch": epoch, "accuracy": 0.9, **logged})
        if robust is not None:
            records.append({"kind": "validation", "epoch": epoch, "accuracy": 0.9, "robust_accuracy": robust})
    return records


@pytest.mark.parametrize(
    ("epochs", "alarm"),
    [
        ([(0.3, 0.3), (0.5, 0.45), (0.9, 0.1)], True),
        ([(0.3, 0.3), (0.5, 0.5), (0.6, 0.2)], True),
        # fallen by less than 60 %
        ([(0.3, 0.3), (0.5, 0.5), (0.9, 0.21)], False),
        # less than 30 points apart
        ([(0.3, 0.3), (0.3, 0.25), (0.35, 0.1)], False),
        # training has broken down as well
        ([(0.3, 0.3), (0.8, 0.5), (0.5, 0.1)], False),
        # the best epoch itself, and one that came back
        ([(0.9, 0.1)], False),
        ([(0.5, 0.5), (0.9, 0.1), (0.9, 0.45)], False),
        # epochs without a validation in between
        ([(0.3, None), (0.5, 0.45), (0.6, None), (0.9, 0.0)], True),
        # never robust at all, though training says so
        ([(0.6, 0.0), (0.9, 0.0)], True),
        # no attack in training: clean accuracy says nothing
        ([(None, 0.3), (None, 0.0)], False),
        ([(0.9, None)], False),
        ([], False),
    ],
)
def test_when_a_run_counts_as_overfitted_to_its_attack(epochs: list[Any], alarm: bool) -> None:
    assert bool(overfitting_alarms(_history(*epochs))) is alarm


@pytest.mark.parametrize("player", ["experts", "robust"])
def test_overfitting_of_a_player_is_seen(player: str) -> None:
    key = f"{player}.adversarial_accuracy"
    assert overfitting_alarms(_history((0.3, 0.3), (0.5, 0.45), (0.9, 0.09), key=key))
    assert not overfitting_alarms(_history((0.3, 0.3), (0.5, 0.45), (0.9, 0.3), key=key))


def test_every_method_that_attacks_images_can_be_seen_to_overfit() -> None:
    methods = (AT, TRADES, RTER, JTDMoE, DWF, SOE, FreeAT, AdvMoE)
    batch = next(tiny.digits().train.batches(8))
    for method in (make().within(tiny.THREAT) for make in methods):
        model: Any = tiny.mixture(3)
        if isinstance(method, JTDMoE):
            model = DualModel(tiny.mixture(3), tiny.mixture(3, seed=1), 0.5)
        if isinstance(method, SOE):
            model = SynergyOfExperts([TwoHeaded(expert) for expert in model.experts])
        updates = method.updates(model.train(), dict.fromkeys(method.streams, batch), Rng(0))
        meters = Meters()
        for update in updates:
            loss = update.loss()
            loss.value.backward()
            meters.add(loss.logs, player=update.player)
        assert any(key.endswith("adversarial_accuracy") for key in meters.means()), method.name


def test_overfitting_is_said_with_its_numbers() -> None:
    assert overfitting_alarms(_history((0.3, 0.3), (0.5, 0.45), (0.9, 0.09))) == [
        "catastrophic overfitting in epoch 3: 9% of the validation images are robust, 45% were in epoch 2, while "
        "accuracy under the training attack rose from 50% to 90%; best.safetensors are the weights of the best "
        "validation. Give the training attack more steps or replays, or a shorter step"
    ]


def test_overfitting_is_in_the_log_and_said_before_and_after_a_stop(tmp_path: Path) -> None:
    robust = {"1": 0.9, "2": 0.8, "3": 0.1, "4": 0.05}
    method = AT(attack=PGD(eps="1/64", steps=1))

    def run(name: str, reporter: tiny.StopAt) -> list[dict[str, Any]]:
        def validate(model: nn.Module) -> dict[str, float]:
            # the n-th validation of the run, also after it was taken up again
            done = sum(record["kind"] == "validation" for record in tiny.metrics(tmp_path / name))
            return {"accuracy": 0.9, "robust_accuracy": robust[str(done + 1)]}

        tiny.run_training(
            tmp_path / name, method=method, epochs=4, optimizer=Adam(lr=0.03), reporter=reporter, validate=validate
        )
        return tiny.metrics(tmp_path / name)

    whole = tiny.StopAt(-1)
    records = run("whole", whole)
    alarms = [record for record in records if record["kind"] == "alarm"]
    assert [(alarm["epoch"], alarm["alarm"]) for alarm in alarms] == [
        (3, "catastrophic_overfitting"), (4, "catastrophic_overfitting"),
    ]  # fmt: skip
    assert whole.messages == [alarm["message"] for alarm in alarms]
    with pytest.raises(Interrupted):
        run("stopped", tiny.StopAt(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert run("stopped", tiny.StopAt(-1)) == records


def test_a_collapsed_router_of_two_updates_is_spoken_of_once() -> None:
    means: dict[str, float | list[float]] = {"experts.load": [0.99, 0.01], "router.load": [0.97, 0.03]}
    (message,) = collapse_alarms(means, 3)
    assert message.startswith("router collapse in epoch 3: expert 0 got 97%")
    (message,) = collapse_alarms({"router.gate-1.load": [0.0, 1.0]}, 3)
    assert message.startswith("router collapse of gate-1 in epoch 3: expert 1 got 100%")
