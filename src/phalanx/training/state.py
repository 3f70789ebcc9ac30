"""What moves during a run, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.methods.base import Method
from phalanx.runs.checkpoint import Checkpoint
from phalanx.training.ema import Average
from phalanx.training.guards import GradientWatch
from phalanx.training.meters import Meters
from phalanx.training.players import load_optimizer_tensors, optimizer_tensors


class Best(NamedTuple):
    """The validation that picked the best weights."""

    score: tuple[float, float]
    epoch: int


@dataclass
class State:
    """A checkpoint is exactly this, how long the log was, and how long it took."""

    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    average: Average | None
    method: Method
    meters: Meters = field(default_factory=Meters)
    watch: GradientWatch = field(default_factory=GradientWatch)
    step: int = 0
    best: Best | None = None

    @property
    def deployed(self) -> nn.Module:
        """The average if there is one."""
        return self.model if self.average is None else self.average.model

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of a checkpoint, by group."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tensors(self.optimizers),
        }
        if self.average is not None:
            groups["ema"] = dict(self.average.model.state_dict())
        own = {name: value for name, value in self.method.state_dict().items() if isinstance(value, Tensor)}
        return {**groups, "method": own} if own else groups

    def plain(self) -> dict[str, Any]:
        """Everything else, as plain values."""
        own = self.method.state_dict()
        return {
            "method": {name: value for name, value in own.items() if not isinstance(value, Tensor)},
            "meters": self.meters.state_dict(),
            "best": None if self.best is None else [list(self.best.score), self.best.epoch],
            "silent": dict(self.watch.silent),
        }

    def load(self, checkpoint: Checkpoint, folder: Path) -> None:
        """The inverse of `tensors` and `plain`. Raises InputError for a checkpoint, of the run `folder`, of another
        model."""
        tensors, saved = checkpoint.tensors, checkpoint.state
        self.step = checkpoint.step
        try:
            self.model.load_state_dict(tensors["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"the checkpoint in {folder} is of another model: {reason}; give the one it was begun with"
            ) from None
        if self.average is not None:
            self.average.model.load_state_dict(tensors["ema"])
        load_optimizer_tensors(self.optimizers, tensors["optimizer"])
        self.method.load_state_dict({**saved["method"], **tensors.get("method", {})})
        self.meters = Meters.from_state(saved["meters"])
        self.watch.silent = {str(player): int(count) for player, count in saved["silent"].items()}
        if saved["best"] is not None:
            score, epoch = saved["best"]
            self.best = Best((float(score[0]), float(score[1])), int(epoch))
