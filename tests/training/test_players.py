from __future__ import annotations

import pytest
import torch
from torch import nn

from phalanx.training.config import SGD, Adam
from phalanx.training.players import build_optimizers, load_optimizer_tensors, moving, optimizer_tensors


def _players(seed: int = 0) -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(seed)
    shapes = {"robust.experts": [(2, 3), (3,)], "robust.router": [(4,)], "standard.experts": [(1,)]}
    return {name: [nn.Parameter(torch.randn(shape)) for shape in sizes] for name, sizes in shapes.items()}


def _step(players: dict[str, list[nn.Parameter]], optimizers: dict[str, torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameters in players.items():
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers[name].step()


@pytest.mark.parametrize("config", [SGD(momentum=0.9, nesterov=True), SGD(momentum=0.0), Adam(), Adam(decoupled=False)])
def test_a_reloaded_optimizer_makes_the_same_next_step(config: SGD | Adam) -> None:
    players, others = _players(), _players()
    optimizers, again = build_optimizers(config, players), build_optimizers(config, others)
    for seed in (1, 2):
        _step(players, optimizers, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers).items()}
    if isinstance(config, Adam):
        assert {"robust.experts/0/exp_avg", "robust.experts/1/step", "robust.router/0/exp_avg_sq"} <= set(saved)
    with torch.no_grad():
        for name, parameters in others.items():
            for mine, theirs in zip(parameters, players[name], strict=True):
                mine.copy_(theirs)
    load_optimizer_tensors(again, saved)
    for players_, optimizers_ in ((players, optimizers), (others, again)):
        _step(players_, optimizers_, 3)
    for name in players:
        assert all(torch.equal(a, b) for a, b in zip(players[name], others[name], strict=True))
    assert all(
        torch.equal(tensor, optimizer_tensors(again)[name]) for name, tensor in optimizer_tensors(optimizers).items()
    )


def test_settings_reach_torch() -> None:
    players = _players()
    sgd = build_optimizers(SGD(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True), players)["robust.router"]
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[k] for k in ("lr", "momentum", "weight_decay", "nesterov")] == [0.3, 0.8, 0.02, True]
    adam = build_optimizers(Adam(lr=0.3, beta1=0.8, beta2=0.7, weight_decay=0.02, decoupled=False), players)
    assert isinstance(adam["robust.router"], torch.optim.Adam)
    defaults = adam["robust.router"].defaults
    assert [defaults[k] for k in ("lr", "betas", "weight_decay")] == [0.3, (0.8, 0.7), 0.02]
    assert not defaults["decoupled_weight_decay"]


@pytest.mark.parametrize(
    ("player", "names"),
    [
        ("all", ["robust.experts", "robust.router", "standard.experts"]),
        ("robust", ["robust.experts", "robust.router"]),
        ("standard.experts", ["standard.experts"]),
    ],
)
def test_who_moves(player: str, names: list[str]) -> None:
    assert moving(player, _players()) == names


def test_an_unknown_player_is_named() -> None:
    # "robust.exp" is a prefix of a name, but no part of it
    for player in ("router", "robust.exp"):
        with pytest.raises(ValueError, match=rf"one of robust\.experts, .*, got '{player}'"):
            moving(player, _players())
