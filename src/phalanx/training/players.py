"""One optimizer per player, and who moves in an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.training.config import SGD, Adam

Players = Mapping[str, Sequence[nn.Parameter]]


def build_optimizers(config: SGD | Adam, players: Players) -> dict[str, torch.optim.Optimizer]:
    """A separate optimizer for each player, so that an update of one leaves the others' momentum alone."""
    return {name: _build(config, list(parameters)) for name, parameters in players.items()}


def _build(config: SGD | Adam, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    match config:
        case SGD():
            return torch.optim.SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
            )
        case Adam():
            return torch.optim.Adam(
                parameters,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                decoupled_weight_decay=config.decoupled,
            )


def moving(player: str, players: Players) -> list[str]:
    """The players that an update's `player` names: all, one, or all below one ("robust": "robust.experts", ...).

    Raises ValueError for a name that the model does not have.
    """
    names = [name for name in players if player == "all" or name == player or name.startswith(f"{player}.")]
    if not names:
        raise ValueError(f"player must be 'all' or one of {', '.join(players)}, got {player!r}")
    return names


def optimizer_tensors(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every state tensor by "player/parameter/key"."""
    return {
        f"{player}/{index}/{key}": value
        for player, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into freshly built optimizers."""
    states: dict[str, dict[int, dict[str, Any]]] = {player: {} for player in optimizers}
    for name, value in tensors.items():
        player, index, key = name.rsplit("/", 2)
        states[player].setdefault(int(index), {})[key] = value
    for player, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[player]})
