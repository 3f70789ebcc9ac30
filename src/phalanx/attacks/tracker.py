"""The best point found so far for each sample, and who is still worth attacking."""

# A samples given to the search, L samples still alive

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from phalanx.attacks.surfaces import DEPLOYED
from phalanx.attacks.target import Climb, Target, errors_of

Keep = Literal["best", "last"]


class Found(NamedTuple):
    """What a search hands back: one row per sample it was given. Not yet judged."""

    x_adv: Tensor
    """(A, ...) the perturbed images."""
    loss: Tensor
    """(A,) the gain there; NaN where the search did not look."""
    queries: Tensor
    """(A,) int64 images of this sample sent through the model."""
    first_success: Tensor
    """(A,) int64 gradient steps until the first error seen, -1 for none."""
    restart: Tensor
    """(A,) int64 the restart that `x_adv` comes from."""
    zero_gradient: Tensor
    """(A,) bool the first gradient was exactly zero in every pixel: the attack could not move."""

    @classmethod
    def nothing(cls, x: Tensor) -> Found:
        """Before the first look at images (A, ...): these themselves, and nothing asked; every field is its own to
        write into."""
        integers = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(
            x_adv=x.clone(),
            loss=x.new_full((len(x),), float("nan")),
            queries=integers.clone(),
            first_success=torch.full_like(integers, -1),
            restart=integers,
            zero_gradient=integers.bool(),
        )


class Tracker:
    """Accumulates `Found`.

    With neither `early_drop` nor `keep="best"` it only stores the last iterate, without waiting for the device: that is
    the attack inside training.
    """

    def __init__(self, target: Target, *, keep: Keep, early_drop: bool) -> None:
        size, device = len(target), target.x.device
        self._target = target
        self._keep = keep
        self._early_drop = early_drop
        self._broken = torch.zeros(size, dtype=torch.bool, device=device)
        self.rows = torch.arange(size, device=device)
        """(L,) the samples still attacked, as positions in the batch given to the search."""
        self.found = Found.nothing(target.x)

    @property
    def watching(self) -> bool:
        return self._early_drop or self._keep == "best"

    def alive(self) -> Target:
        """The target restricted to the samples still attacked."""
        return self._target if len(self.rows) == len(self._target) else self._target[self.rows]

    def _errors(self, x_adv: Tensor, climb: Climb, alive: Target, step: int, *, final: bool) -> tuple[Tensor, Tensor]:
        wrong, invalid = errors_of(climb.logits, alive.y)
        if alive.surface in DEPLOYED:
            # of a folded copy, which rounds differently: the verdict will tell
            return wrong, invalid
        # another surface says little about the whole model: ask the judge at steps 0, 1, 2, 4, 8, ... and last
        if not final and step & (step - 1):
            return torch.zeros_like(wrong), torch.zeros_like(invalid)
        self.found.queries[self.rows] += 1
        return alive.errors(x_adv)

    def observe(
        self,
        x_adv: Tensor,
        climb: Climb,
        alive: Target,
        *,
        restart: int,
        step: int,
        steps_before: int = 0,
        final: bool = False,
    ) -> Tensor | None:
        """Records an iterate of the alive samples; the mask (L,) of those to go on with, None for all of them.

        `steps_before` counts the gradient steps of earlier restarts. An error outranks any gain; among errors, and
        among non-errors, the larger gain wins.
        """
        rows, found = self.rows, self.found
        if restart == 0 and step == 0 and climb.gradient is not None:
            found.zero_gradient[rows] = (climb.gradient == 0).flatten(1).all(1)
        found.queries[rows] += 1
        if not self.watching:
            return None
        wrong, invalid = self._errors(x_adv, climb, alive, step, final=final)
        hit = wrong | invalid
        was_hit = self._broken[rows]
        gain = climb.gain.nan_to_num(nan=float("-inf"))
        if self._keep == "best":
            # a NaN so far means nothing was stored yet
            better = (hit & ~was_hit) | ((hit == was_hit) & ~(gain <= found.loss[rows]))
        else:
            better = (hit & ~was_hit) | torch.full_like(hit, final)
        self._store(rows[better], x_adv[better], gain[better], restart)
        new = rows[hit & ~was_hit]
        found.first_success[new] = steps_before + step
        self._broken[rows] |= hit
        if not (self._early_drop and bool(hit.any())):
            return None
        self.rows = rows[~hit]
        return ~hit

    def take_last(self, x_adv: Tensor, *, restart: int) -> None:
        """Stores the end of a walk that was not watched."""
        self.found.x_adv[self.rows] = x_adv
        self.found.restart[self.rows] = restart

    def _store(self, rows: Tensor, x_adv: Tensor, gain: Tensor, restart: int) -> None:
        self.found.x_adv[rows] = x_adv
        self.found.loss[rows] = gain
        self.found.restart[rows] = restart
