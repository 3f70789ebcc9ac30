"""What stops a run, or raises an alarm, as soon as it is worth nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.errors import DivergedError, PhalanxError

COLLAPSE_LOAD = 0.95
"""One expert with more than this share of an epoch's images: the mixture is one network."""

OVERFITTED_SHARE = 0.4
"""Validated robust accuracy at or below this share of the run's best: it has fallen by 60 % or more."""

OVERFITTED_GAP = 0.3
"""Least excess of the accuracy under the training attack over the validated robust accuracy."""

SILENT_STEPS = 50
"""So many updates in a row with an exactly zero gradient: the player is not being trained."""


class NoGradientError(PhalanxError):
    """A player that should be trained gets no gradient."""

    exit_code = 3


def non_finite_tensors(model: nn.Module, logs: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not finite, causes before consequences: logs, weights, buffers, gradients."""
    named = [
        *logs.items(),
        *model.named_parameters(),
        *model.named_buffers(),
        *((f"gradient of {name}", p.grad) for name, p in model.named_parameters() if p.grad is not None),
    ]
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]


def diverged(step: int, loss: float, model: nn.Module, logs: Mapping[str, Tensor]) -> DivergedError:
    """The error for a non-finite loss or gradient at `step`."""
    names = non_finite_tensors(model, logs)
    where = f"; not finite: {', '.join(names[:3])}" if names else ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return DivergedError(
        f"training diverged at step {step}: loss {loss}{where}{more}. The last finite checkpoint is kept; "
        "lower training.optimizer.lr, set training.clip_norm, or use precision fp32"
    )


_FREEZE = "declare it frozen (model.router.train=false, or model.train_experts=false for the experts)"


class GradientWatch:
    """Counts, per player, the updates in a row that gave no gradient at all."""

    def __init__(self) -> None:
        self.silent: dict[str, int] = {}
        """Exactly zero gradients in a row, by player; part of a checkpoint."""

    def check(self, step: int, norms: Mapping[str, float | None]) -> None:
        """`norms` of the players that are about to move; None where no parameter has a gradient.

        Raises NoGradientError at the first None, and after `SILENT_STEPS` exact zeros.
        """
        for player, norm in norms.items():
            if norm is None:
                raise NoGradientError(
                    f"step {step}: {player} gets no gradient (None for every parameter), so it would stay at its "
                    f"initial weights; give it a path to the loss, or {_FREEZE}"
                )
            silent = self.silent.get(player, 0) + 1 if norm == 0 else 0
            self.silent[player] = silent
            if silent >= SILENT_STEPS:
                raise NoGradientError(
                    f"step {step}: the gradient of {player} has been exactly zero for {SILENT_STEPS} updates; "
                    f"give it a path to the loss, or {_FREEZE}"
                )


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """() L2 norm over all gradients, on the device; None where there is none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # type: ignore[no-any-return]


def collapse_alarms(means: Mapping[str, float | list[float]], epoch: int) -> list[str]:
    """What to say of every router that sent nearly all images of `epoch` to one expert.

    `means` are the epoch's averages by name; "load" and "NAME.load" hold the shares of a router's experts. A method
    that moves experts and router in turn logs them under either: each router is spoken of once.
    """
    messages = {}
    # a resumed run must say the same in the same order
    for key, load in sorted(means.items()):
        *path, last = key.split(".")
        if last != "load" or not isinstance(load, list) or len(load) < 2 or max(load) <= COLLAPSE_LOAD:
            continue
        router = ".".join(part for part in path if part not in ("experts", "router"))
        where = f"{f' of {router}' if router else ''} in epoch {epoch}"
        messages[router] = (
            f"router collapse{where}: expert {load.index(max(load))} got {max(load):.0%} of the images; "
            "the mixture is one network. Raise method.balance or lower the learning rate"
        )
    return list(messages.values())


def overfitting_alarms(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say if the last validation among a run's metric `records` shows catastrophic overfitting (Wong et al.
    2020): the network has learnt to mislead the training attack, and stronger ones break it.

    That is where, at once, the validated robust accuracy is at most `OVERFITTED_SHARE` of its best in the run; the
    training epoch's "adversarial_accuracy" exceeds it by `OVERFITTED_GAP` or more; and that accuracy is higher than in
    the best's epoch. A method whose players move in turn logs it under a player's name, the first of which counts. Runs
    that log none raise none.
    """
    training = {
        record["epoch"]: record[min(keys)]
        for record in records
        if record["kind"] == "train"
        and (keys := [key for key in record if key.rpartition(".")[2] == "adversarial_accuracy"])
    }
    robust = {record["epoch"]: record["robust_accuracy"] for record in records if record["kind"] == "validation"}
    if not training or not robust:
        return []
    last, best = max(robust), max(robust, key=lambda epoch: robust[epoch])
    fallen = robust[last] <= OVERFITTED_SHARE * robust[best]
    if not (fallen and training[last] - robust[last] >= OVERFITTED_GAP and training[last] > training[best]):
        return []
    return [
        f"catastrophic overfitting in epoch {last}: {robust[last]:.0%} of the validation images are robust, "
        f"{robust[best]:.0%} were in epoch {best}, while accuracy under the training attack rose from "
        f"{training[best]:.0%} to {training[last]:.0%}; best.safetensors are the weights of the best validation. "
        "Give the training attack more steps or replays, or a shorter step"
    ]
