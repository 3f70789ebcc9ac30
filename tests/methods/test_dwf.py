# B batch, E experts

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_networks import LogOdds

import tiny
from phalanx.data import Batch
from phalanx.methods import DWF, Update
from phalanx.rng import Rng
from phalanx.routing import MixtureOfExperts, load_balance
from phalanx.threat import ThreatModel

RNG = Rng(7)
GATES: tuple[int | str, ...] = (1, "all")
FEW: dict[str, Any] = {"fgsm_eps": (0.05, 0.2), "pgd_steps": (2, 4)}


def _digits(size: int = 16) -> Batch:
    x, y, ids = next(tiny.digits().train.batches(size))
    return Batch(x.double(), y, ids)


def _shown(model: Any, method: DWF, batch: Batch, rng: Rng = RNG) -> tuple[list[Tensor], Update]:
    """Everything that the gate is shown in a step, its loss last, and the update."""
    shown: list[Tensor] = []
    handle = model.router.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    (update,) = method.updates(model, {"train": batch}, rng)
    update.loss()
    handle.remove()
    return shown, update


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def _pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """Madry et al., eq. 2.1, from the clean image."""
    moved = x
    for _ in range(steps):
        moved = moved + step_size * _gradient(model, moved, y).sign()
        moved = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
    return moved


# -- the batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("step_size", [None, 0.02])
def test_a_step_is_algorithm_3(gate: int | str, step_size: float | None) -> None:
    model, (x, y, ids) = tiny.mixture(3, gate).double().train(), _digits()
    method = DWF(**FEW, pgd_step_size=step_size, balance=0.3).within(tiny.THREAT)
    shown, update = _shown(model, method, Batch(x, y, ids))
    # the log is a float32
    (eps,) = [value for value in FEW["fgsm_eps"] if update.logs["drawn_eps"].item() == pytest.approx(value)]
    steps = int(update.logs["drawn_steps"])
    assert steps in FEW["pgd_steps"]
    clean, fgsm, pgd = shown[-1].chunk(3)
    assert torch.equal(clean, x)
    torch.testing.assert_close(fgsm, (x + eps * _gradient(model, x, y).sign()).clamp(0, 1))
    torch.testing.assert_close(pgd, _pgd(model, x, y, 3 / 16, step_size or 3 / 64, steps))
    # one gradient for FGSM, one for each step of PGD, and one pass of 3B
    assert [len(images) for images in shown] == [16] * (1 + steps) + [48]
    logits, route = model.routed(torch.cat([clean, fgsm, pgd]))
    loss = update.loss()
    torch.testing.assert_close(loss.value, F.cross_entropy(logits, y.repeat(3)) + 0.3 * load_balance(route))
    # the three kinds are not the same images
    assert len({float(part.sum()) for part in (clean, fgsm, pgd)}) == 3


def test_every_batch_draws_anew() -> None:
    batch, seen = _digits(4), set()
    for step in range(20):
        (update,) = DWF(**FEW).within(tiny.THREAT).updates(tiny.mixture().double(), {"train": batch}, Rng(step))
        seen.add((round(update.logs["drawn_eps"].item(), 6), update.logs["drawn_steps"].item()))
    assert seen == {(eps, steps) for eps in FEW["fgsm_eps"] for steps in FEW["pgd_steps"]}


def test_a_random_start_is_asked_for() -> None:
    method = DWF(fgsm_eps=(0.1,), pgd_steps=(2,), random_start=True).within(tiny.THREAT)
    model, batch = tiny.mixture(3, "all").double(), _digits()
    first, second = (_shown(model, method, batch, Rng(seed))[0][-1].chunk(3) for seed in (1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize("gate", GATES)
def test_batchnorm_sees_the_three_kinds_as_one_batch_and_no_iterate(gate: int | str) -> None:
    model, reference = (tiny.mixture(2, gate, expert="small_cnn").double().train() for _ in range(2))
    shown, _ = _shown(model, DWF(**FEW).within(tiny.THREAT), _digits(32))
    reference.routed(shown[-1])
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)
    counted = [int(buffer) for name, buffer in model.named_buffers() if "num_batches_tracked" in name]
    # an expert whose group is too small to be normalised by itself has counted nothing
    assert 1 in counted and set(counted) <= ({1} if gate == "all" else {0, 1})


@pytest.mark.parametrize("gate", GATES)
def test_apart_each_kind_is_normalised_by_its_own_statistics(gate: int | str) -> None:
    model, reference = (tiny.mixture(2, gate, expert="small_cnn").double().train() for _ in range(2))
    method = DWF(**FEW, balance=0.3).within(tiny.THREAT)
    batch = _digits(32)
    shown, update = _shown(model, replace(method, batch_norm="apart"), batch)
    assert [len(images) for images in shown[-3:]] == [32, 32, 32]
    together, _ = _shown(tiny.mixture(2, gate, expert="small_cnn").double().train(), method, batch)
    torch.testing.assert_close(torch.cat(shown[-3:]), together[-1])
    # the reference goes through the kinds one after the other, twice, as the model has
    for _ in range(2):
        losses = []
        for images in shown[-3:]:
            logits, route = reference.routed(images)
            losses.append(F.cross_entropy(logits, batch.y) + 0.3 * load_balance(route))
    again = update.loss()
    torch.testing.assert_close(again.value, sum(losses) / 3)
    split = {f"{kind}_accuracy" for kind in ("clean", "fgsm", "pgd", "adversarial")}
    assert set(again.logs) == {"accuracy", "load", *split}
    kinds = [again.logs[f"{kind}_accuracy"].item() for kind in ("clean", "fgsm", "pgd")]
    assert again.logs["accuracy"].item() == pytest.approx(sum(kinds) / 3)
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)


def test_the_step_size_is_drawn() -> None:
    batch, seen = _digits(), set()
    for step in range(12):
        method = DWF(fgsm_eps=(0.1,), pgd_steps=(1,), pgd_step_sizes=("1/64", 0.05)).within(tiny.THREAT)
        shown, update = _shown(tiny.mixture().double(), method, batch, Rng(step))
        clean, _, pgd = shown[-1].chunk(3)
        size = update.logs["drawn_step_size"].item()
        assert (pgd - clean).abs().max().item() == pytest.approx(size)
        seen.add(round(size, 6))
    assert seen == {1 / 64, 0.05}


def test_the_logs_by_hand() -> None:
    # log odds of class 0 are the sum of two pixels less 1: 0.4 for pixels of 0.7 and -0.4 for pixels of 0.3
    class Centred(LogOdds):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.5)

    batch = Batch(
        torch.tensor([0.7, 0.7, 0.3, 0.7], dtype=torch.float64)[:, None, None, None].expand(4, 1, 1, 2),
        torch.tensor([0, 0, 1, 1]),
        torch.arange(4),
    )
    model = MixtureOfExperts(None, [Centred(1.0)])
    # a radius of 0.1 turns none of the three right answers, one of 0.3 all
    method = DWF(fgsm_eps=(0.1,), pgd_steps=(4,)).within(ThreatModel("Linf", 0.3))
    (update,) = method.updates(model, {"train": batch}, RNG)
    loss = update.loss()
    assert {name: value.item() for name, value in loss.logs.items()} == {
        "accuracy": 0.5,
        "clean_accuracy": 0.75,
        "fgsm_accuracy": 0.75,
        "pgd_accuracy": 0.0,
        "adversarial_accuracy": 0.375,
    }
    assert update.logs["drawn_eps"].item() == pytest.approx(0.1) and update.logs["drawn_steps"].item() == 4
    assert update.logs["zero_gradient"].item() == 0.0
    # an expert that looks at nothing gives no gradient to either attack
    (update,) = method.updates(MixtureOfExperts(None, [Centred(0.0)]), {"train": batch}, RNG)
    assert update.logs["zero_gradient"].item() == 1.0


def test_the_threat_is_that_of_pgd() -> None:
    method = DWF().within(ThreatModel("L2", "1/2"))
    assert (method.eps, method.norm) == ("1/2", "L2")
    assert DWF(eps=0.1, norm="Linf").within(ThreatModel("L2", "1/2")) == DWF(eps=0.1, norm="Linf")
    # both attacks measure in its norm
    shown, update = _shown(tiny.mixture().double(), DWF(**FEW).within(ThreatModel("L2", "1/2")), _digits())
    clean, fgsm, pgd = shown[-1].chunk(3)
    for moved, eps in ((fgsm, update.logs["drawn_eps"].item()), (pgd, 0.5)):
        length = (moved - clean).flatten(1).norm(dim=1).max().item()
        # PGD's two or four steps are a quarter of the radius long
        assert 0.4 * eps < length <= eps + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": -1.0}, "balance must be at least 0, got -1.0"),
        ({"pgd_step_size": "2/x"}, "step_size must be a positive number or a fraction"),
        ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
        ({"pgd_step_sizes": ()}, "pgd_step_sizes must hold at least one value"),
        ({"pgd_step_sizes": (0.1, -1)}, "pgd_step_sizes: step_size must be a positive number or a fraction .*, got -1"),
        (
            {"pgd_step_sizes": (0.1,), "pgd_step_size": "2/255"},
            "pgd_step_sizes draws what pgd_step_size=2/255 fixes; leave one of them out",
        ),
    ],
)
def test_a_bad_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DWF(**settings)


# -- training ------------------------------------------------------------------------------------------------------


def _moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def _train(folder: Path, model: nn.Module, **settings: Any) -> set[str]:
    """The names of what two epochs of DWF have moved."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return _moved(before, tiny.run_training(folder, model, DWF(**FEW).within(tiny.THREAT), **settings))


@pytest.mark.parametrize("gate", GATES)
def test_experts_and_gate_move_together(tmp_path: Path, gate: int | str) -> None:
    model = tiny.mixture(2, gate, expert="small_cnn")
    constants = {name for name, _ in model.named_buffers() if name.endswith(("mean", "std")) and "running" not in name}
    assert _train(tmp_path, model) == set(model.state_dict()) - constants
    epoch = tiny.metrics(tmp_path)[0]
    assert set(epoch) - {"kind", "epoch", "step", "lr"} == {
        *("loss", "accuracy", "clean_accuracy", "fgsm_accuracy", "pgd_accuracy", "adversarial_accuracy"),
        *("load", "zero_gradient", "drawn_eps", "drawn_steps"),
    }


@pytest.mark.parametrize("gate", GATES)
def test_with_frozen_experts_the_gate_moves_alone(tmp_path: Path, gate: int | str) -> None:
    model = tiny.mixture(2, gate, expert="small_cnn", train_experts=False)
    assert _train(tmp_path, model) == {"router.2.weight", "router.2.bias"}


@pytest.mark.parametrize("options", [{}, {"train_experts": False}, {"checkpoint": True}], ids=str)
def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    def run(folder: Path, **settings: Any) -> None:
        model = tiny.mixture(2, "all", expert="tiny:noisy_cnn", **options)
        _train(folder, model, epochs=3, ema_decay=0.9, **settings)

    run(tmp_path / "whole")
    for steps in (2, 3):
        with pytest.raises(tiny.Stop):
            run(tmp_path / "stopped", checkpoint_seconds=0.0, reporter=tiny.StopAt(steps))
    run(tmp_path / "stopped")
    assert tiny.result(tmp_path / "stopped") == tiny.result(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_running_experts_again_ends_with_the_same_bytes(tmp_path: Path, precision: Any) -> None:
    for name, checkpoint in (("plain", False), ("again", True)):
        model = tiny.mixture(3, "all", expert="tiny:noisy_cnn", checkpoint=checkpoint)
        _train(tmp_path / name, model, precision=precision)
    assert tiny.result(tmp_path / "again") == tiny.result(tmp_path / "plain")
