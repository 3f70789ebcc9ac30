"""Square attack: random search with nothing but logits, the black-box member of AutoAttack."""

# A samples still attacked, C channels, H height, W width, S side of the square

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from phalanx.attacks.base import Attack
from phalanx.attacks.square_proposals import Corners, windows
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found, Tracker
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.threat import per_image

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 proposals: where the share of the pixels that a square covers is halved, as published."""
_DRAWN_AT_ONCE = 64
"""Proposals whose random numbers are drawn together: a draw costs the same time for many as for one."""


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack (Andriushchenko et al. 2020, Algorithms 1 to 3; in L1 Croce & Hein 2021).

    A proposal changes one square at a random place and is kept where it raises the objective. No gradient is used, so
    that masked ones do not help a model. Of AutoAttack "square". Images of any size, (B, C, H, W).
    """

    name: Literal["square"] = "square"
    objective: str = "margin"
    queries: int = 5000
    """Images that a restart sends through the attacked surface: the start and `queries` - 1 proposals."""
    restarts: int = 1
    """Independent runs, each on the samples still standing."""
    p_init: float = 0.8
    """Share of the pixels that the first squares cover; it is halved at fixed shares of the queries."""

    def __post_init__(self) -> None:
        self._check_fixed("Square", targeted=False)
        super().__post_init__()
        for field in ("queries", "restarts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must be above 0 and at most 1, a share of the pixels, got {self.p_init}")

    @property
    def gradient_steps(self) -> int:
        """Queries over all restarts: the steps of a search without gradients."""
        return self.queries * self.restarts

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        if target.x.dim() != 4:
            raise InputError(
                f"Square needs images (B, C, H, W), got shape {tuple(target.x.shape)}; add the missing axes"
            )
        tracker = Tracker(target, keep="best", early_drop=target.judged)
        for restart in range(self.restarts):
            if len(tracker.rows):
                self._walk(tracker, rng[tracker.rows], restart)
        return tracker.found

    def _walk(self, tracker: Tracker, rng: SampleRng, restart: int) -> None:
        alive, threat = tracker.alive(), self.threat
        sides = self.sides(*alive.x.shape[2:])
        proposals = Corners(threat) if threat.norm == "Linf" else windows(threat, alive.x, sides)
        best, best_gain_A = alive.x, alive.x.new_full((len(alive),), float("-inf"))
        draws_AN, shape = alive.x.new_empty(len(alive), 0), alive.x.shape[1:]
        for step, side in enumerate(sides):
            if step % _DRAWN_AT_ONCE == 0:
                drawn = (_DRAWN_AT_ONCE, proposals.draws(shape))
                draws_AN = rng.uniform("square", drawn, restart=restart, step=step // _DRAWN_AT_ONCE)
            if step == 0:
                start_AN = rng.uniform("square.start", (proposals.start_draws(shape),), restart=restart)
                x_adv = proposals.start(alive.x, start_AN)
            else:
                x_adv = proposals.moved(best, alive.x, side, draws_AN[:, step % _DRAWN_AT_ONCE])
            climb = alive.look(x_adv)
            raised_A = climb.gain > best_gain_A
            best = torch.where(per_image(raised_A, best), x_adv, best)
            best_gain_A = torch.where(raised_A, climb.gain, best_gain_A)
            stay_A = tracker.observe(
                x_adv,
                climb,
                alive,
                restart=restart,
                step=step,
                steps_before=restart * self.queries,
                final=step + 1 == self.queries,
            )
            if stay_A is not None:
                alive, rng, draws_AN = alive[stay_A], rng[stay_A], draws_AN[stay_A]
                best, best_gain_A = best[stay_A], best_gain_A[stay_A]
                if not len(alive):
                    return

    def sides(self, height: int, width: int) -> list[int]:
        """Of the square at each query: the root of the number of pixels that it shall cover then."""
        sides = []
        for step in range(self.queries):
            due = step * 10_000 // self.queries
            share = self.p_init / 2 ** sum(due > after for after in _HALVED_AFTER)
            side = max(round((share * height * width) ** 0.5), 1)
            if self.threat.norm != "Linf":
                # two halves around a pixel in the middle: as published at least 3, and odd
                side = max(side, 3) // 2 * 2 + 1
            sides.append(min(side, height, width))
        return sides
