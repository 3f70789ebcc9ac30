"""Weights are perturbed by the right amount, for the gradient alone, and come back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from method_samples import Loop, TurnByTurn, without_value_but_with_nan_gradient
from torch import Tensor, nn

import tiny
from phalanx.errors import DivergedError
from phalanx.experts import TwoHeaded
from phalanx.methods import SOE, ST, FreeAT, JTDMoE, Method
from phalanx.methods.base import classification_loss
from phalanx.routing import DualModel, SynergyOfExperts
from phalanx.training import AWP, SGD, Constant
from phalanx.training.awp import perturbed_weights
from phalanx.training.players import moving
from reference.awp import awp_gradients

GAMMA = 0.02
PLAIN = SGD(lr=0.5, momentum=0.0, weight_decay=0.0)


def _noisy(seed: int = 0) -> nn.Module:
    model: nn.Module = tiny.mixture(2, "all", seed=seed, expert="tiny:noisy_cnn")
    return model


def _synergy() -> nn.Module:
    torch.manual_seed(0)
    return SynergyOfExperts([TwoHeaded(network) for network in tiny.mixture(2).experts])


def _dual() -> nn.Module:
    return DualModel(tiny.mixture(3, 2), tiny.mixture(2, seed=1), 0.5)


class Kind(NamedTuple):
    model: Callable[[], Any]
    method: Callable[[], Method] = ST


KINDS = {
    "one expert": Kind(lambda: tiny.mixture(1)),
    "top-1": Kind(lambda: tiny.mixture(3), tiny.at),
    "two of three": Kind(lambda: tiny.mixture(3, 2)),
    "soft gate, BatchNorm and dropout": Kind(_noisy),
    "frozen router": Kind(lambda: tiny.mixture(train_router=False)),
    "frozen experts": Kind(lambda: tiny.mixture(train_experts=False)),
    "checkpointed experts": Kind(lambda: tiny.mixture(2, "all", expert="tiny:noisy_cnn", checkpoint=True)),
    "players in turn": Kind(lambda: tiny.mixture(), TurnByTurn),
    "dual": Kind(_dual),
    "dual in two levels": Kind(_dual, lambda: JTDMoE(preset="code").within(tiny.THREAT)),
    "synergy": Kind(_synergy, lambda: SOE().within(tiny.THREAT)),
    "free": Kind(lambda: tiny.mixture(), lambda: FreeAT(replays=2).within(tiny.THREAT)),
}


def _batch() -> Any:
    return next(tiny.digits().train.batches(32))


def _loss_of(model: Any) -> Callable[[], Tensor]:
    batch = _batch()
    dtype = next(model.parameters()).dtype
    return lambda: classification_loss(model, batch.x.to(dtype), batch.y, 0.1).value


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _moving(model: Any, player: str = "all") -> list[nn.Parameter]:
    return [parameter for name in moving(player, model.players()) for parameter in model.players()[name]]


@pytest.mark.parametrize("player", ["all", "experts", "router"])
def test_each_weight_moves_by_its_share_up_the_loss_and_comes_back(player: str) -> None:
    model = tiny.mixture(3, "all", expert="small_cnn").double().train()
    before, loss = _weights(model), _loss_of(model)
    chosen = {id(parameter) for parameter in _moving(model, player)}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = dict(zip(before, torch.autograd.grad(loss(), list(model.parameters())), strict=True))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    with perturbed_weights(model, _moving(model, player), loss, GAMMA):
        inside = _weights(model)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        change = inside[name] - before[name]
        if id(parameter) in chosen and parameter.dim() > 1:
            assert float(change.norm() / before[name].norm()) == pytest.approx(GAMMA, rel=1e-9), name
            assert float(F.cosine_similarity(change.flatten(), gradients[name].flatten(), dim=0)) > 1 - 1e-9, name
        else:
            assert not change.any(), name
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_the_perturbed_weights(name: str) -> None:
    kind = KINDS[name]
    model = kind.model().double().train()
    reference = copy.deepcopy(model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    moved = [names[id(parameter)] for parameter in _moving(model)]

    def seeded(module: nn.Module) -> Tensor:
        torch.manual_seed(7)
        return _loss_of(module)()

    model.zero_grad()
    with perturbed_weights(model, _moving(model), lambda: seeded(model), GAMMA):
        seeded(model).backward()
    expected = awp_gradients(reference, seeded, moved, GAMMA)
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_in_the_loop_every_kind_trains_and_the_loss_rises(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    runs = {}
    for gamma in (None, 1e-12, GAMMA):
        model, folder = kind.model(), tmp_path / str(gamma)
        awp = None if gamma is None else AWP(gamma=gamma)
        tiny.run_training(folder, model, kind.method(), epochs=1, optimizer=PLAIN, schedule=Constant(), awp=awp)
        runs[gamma] = model.state_dict()
        rises = [value for key, value in tiny.metrics(folder)[0].items() if key.endswith("awp_rise")]
        assert bool(rises) is (gamma is not None) and all(rise > 0 for rise in rises) is (gamma != 1e-12)
    # a perturbation that rounds to nothing leaves every byte as it is without one: BatchNorm's statistics move once,
    # dropout draws once, nothing else is touched
    for key, tensor in runs[None].items():
        assert torch.equal(runs[1e-12][key], tensor), key
    assert any(not torch.equal(runs[GAMMA][key], tensor) for key, tensor in runs[None].items())


def test_a_step_of_the_loop_is_the_references(tmp_path: Path) -> None:
    model, reference = tiny.mixture(1), tiny.mixture(1)
    seen: list[Tensor] = []

    def look(routed: Any, step: int, loss: Tensor) -> Tensor:
        seen.append(loss.detach())
        return loss

    reporter = tiny.StopAt(1)
    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path, model, _Recorded(look), optimizer=PLAIN, awp=AWP(gamma=GAMMA), reporter=reporter)
    (batch,) = _Recorded.batches
    gradients = awp_gradients(
        reference, lambda there: F.cross_entropy(there(batch.x), batch.y), list(_weights(reference)), GAMMA
    )
    for name, parameter in reference.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter - 0.5 * gradients[name], atol=1e-6), name
    # once at the weights, once where the loss is higher
    assert len(seen) == 2 and seen[1] > seen[0]


class _Recorded(Loop):
    """A loop that keeps its batches; both passes of an update count as one step."""

    batches: list[Any]

    def updates(self, model: Any, batches: Any, rng: Any) -> Any:
        type(self).batches = [batches["train"]]
        yield from super().updates(model, batches, rng)


def test_only_who_moves_is_perturbed(tmp_path: Path) -> None:
    model, seen = tiny.mixture(), []

    class Watching(Loop):
        def updates(self, routed: Any, batches: Any, rng: Any) -> Any:
            for update in super().updates(routed, batches, rng):
                yield update._replace(player="router")

    def look(routed: Any, step: int, loss: Tensor) -> Tensor:
        seen.append((model.router[2].weight.detach().clone(), model.experts[0][2].weight.detach().clone()))
        return loss

    before = model.experts[0][2].weight.detach().clone()
    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path, model, Watching(look), awp=AWP(gamma=GAMMA), reporter=tiny.StopAt(1))
    (router, expert), (router_there, expert_there) = seen
    assert not torch.equal(router, router_there)
    assert torch.equal(expert, before) and torch.equal(expert_there, before)


def test_it_waits_for_its_epoch(tmp_path: Path) -> None:
    logs = {}
    for name, awp in (("without", None), ("late", AWP(gamma=GAMMA, warmup_epochs=1))):
        tiny.run_training(tmp_path / name, awp=awp, epochs=2)
        logs[name] = tiny.metrics(tmp_path / name)
    assert logs["late"][0] == logs["without"][0]
    assert "awp_rise" in logs["late"][1] and logs["late"][1]["loss"] != logs["without"][1]["loss"]


def test_it_is_felt_in_bf16(tmp_path: Path) -> None:
    tiny.run_training(tmp_path, awp=AWP(gamma=0.05), epochs=1, precision="bf16")
    assert tiny.metrics(tmp_path)[0]["awp_rise"] > 0


def test_weights_come_back_when_the_pass_fails() -> None:
    model = tiny.mixture()
    before = _weights(model)
    with pytest.raises(ZeroDivisionError), perturbed_weights(model, _moving(model), _loss_of(model), GAMMA):
        assert not torch.equal(model.experts[0][2].weight, before["experts.0.2.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_gradient_of_nothing_perturbs_nothing() -> None:
    model = tiny.mixture()
    before = _weights(model)
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    for parameters, loss in ((_moving(model), lambda: 0 * _loss_of(model)()), (biases, _loss_of(model))):
        with perturbed_weights(model, parameters, loss, GAMMA):
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_within_its_step(tmp_path: Path) -> None:
    def poison(model: Any, step: int, loss: Tensor) -> Tensor:
        return loss + without_value_but_with_nan_gradient(model.experts[1][2].weight) if step == 2 else loss

    model = tiny.mixture()
    with pytest.raises(DivergedError, match="diverged at step 2: loss nan"):
        tiny.run_training(tmp_path, model, Loop(poison), awp=AWP())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_update_is_two_passes(tmp_path: Path) -> None:
    passes: list[int] = []

    def count(model: Any, step: int, loss: Tensor) -> Tensor:
        passes.append(step)
        return loss

    tiny.run_training(tmp_path, method=Loop(count), epochs=1, awp=AWP())
    assert passes == [0, 0, 1, 1, 2, 2]
