"""The nearest error found so far for each sample, and who is still worth attacking: a minimum-norm search's tracker."""

# A samples given to the search, L samples still alive

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from phalanx.attacks.surfaces import DEPLOYED
from phalanx.attacks.target import Climb, Target, errors_of
from phalanx.attacks.tracker import Found
from phalanx.threat import ThreatModel, per_image

_FINAL_STEPS = 3
"""Of the final search (Croce & Hein 2020b, Algorithm 1)."""
_LEFT_OVER = 0.01
"""Of an error's margin, what the final search leaves: on the boundary itself rounding would decide."""
_ROUNDING = 1e-6
"""Of the largest logit: a smaller margin of either sign is no error, but left as one. The walk converges to the
boundary itself, where the verdict would depend on how the batch rounds."""


class Nearest:
    """Accumulates `Found`: of each sample the error on the attacked surface that is nearest to the clean image.

    It may lie outside the ball: then it is no success. Under a verdict a sample is dropped at its first error inside
    the ball; an error on a surface that is not the deployed model's own is first confirmed by the real model.
    """

    def __init__(self, target: Target, threat: ThreatModel) -> None:
        size, device = len(target), target.x.device
        self._target = target
        self._threat = threat
        self._distance_A = torch.full((size,), float("inf"), dtype=torch.float64, device=device)
        self.rows = torch.arange(size, device=device)
        """(L,) the samples still attacked, as positions in the batch given to the search."""
        self.found = Found.nothing(target.x)

    def count_gradient(self, gradient: Tensor, *, first: bool) -> None:
        """Counts a pass of the alive samples that gave this gradient; the `first` one says who cannot move."""
        self.found.queries[self.rows] += 1
        if first:
            self.found.zero_gradient[self.rows] = (gradient == 0).flatten(1).all(1)

    def observe(
        self, x_adv: Tensor, aim: Target, *, steps: int, attempt: int | None = None, look: Climb | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Looks at an iterate (L, ...) of the alive samples after so many gradient steps.

        Without an `attempt` it belongs to that of the error stored already. `look` is a pass made and counted there
        already, the gain that of an attack without a wanted class. Returns (L,) the margin of the label, (L,)
        whether the surface errs or is within rounding of it, and the mask (L,) of the samples to go on with, None for
        all.
        """
        rows, found = self.rows, self.found
        if look is None:
            look = replace(aim, wanted=None).look(x_adv)
            found.queries[rows] += 1
        wrong_L, invalid_L = errors_of(look.logits, aim.y)
        near_L = look.gain.abs() <= _ROUNDING * look.logits.abs().amax(1)
        error_L = (wrong_L & ~near_L) | invalid_L
        distance_L = self._threat.distance(x_adv, aim.x)
        inside_L = error_L & (distance_L <= self._threat.epsilon)
        broken_L = self._confirmed(inside_L, x_adv, aim)
        stored_L = (error_L & (distance_L < self._distance_A[rows])) | (broken_L & aim.judged)
        stored = rows[stored_L]
        self._distance_A[stored] = distance_L[stored_L]
        found.x_adv[stored] = x_adv[stored_L]
        found.loss[stored] = look.gain[stored_L]
        if attempt is not None:
            found.restart[stored] = attempt
        found.first_success[rows[broken_L & (found.first_success[rows] < 0)]] = steps
        if not (aim.judged and bool(broken_L.any())):
            return look.gain, error_L | near_L, None
        self.rows = rows[~broken_L]
        return look.gain, error_L | near_L, ~broken_L

    def _confirmed(self, inside_L: Tensor, x_adv: Tensor, aim: Target) -> Tensor:
        """(L,) which of the surface's errors inside the ball count."""
        asked = inside_L.nonzero().squeeze(1)
        if aim.surface in DEPLOYED or not aim.judged or not len(asked):
            # a folded copy of the deployed model rounds differently: the verdict will tell
            return inside_L
        self.found.queries[self.rows[asked]] += 1
        wrong, invalid = aim[asked].errors(x_adv[asked])
        return inside_L.index_put((asked,), wrong | invalid)

    def refine(self, *, steps: int) -> None:
        """The final search: on the line from each nearest error to its clean image, three steps to where the margin, if
        it were linear between the ends of the bracket, would be nearly 0. Nothing goes on after it; `steps` were made.
        """
        self.rows = self.rows[self._distance_A[self.rows].isfinite()]
        if not len(self.rows):
            return
        aim = self._target[self.rows]
        right, wrong = aim.x, self.found.x_adv[self.rows]
        gain_right, gain_wrong = aim.look(right).gain, self.found.loss[self.rows]
        wanted = _LEFT_OVER * gain_wrong
        self.found.queries[self.rows] += 1
        for _ in range(_FINAL_STEPS):
            share = ((gain_wrong - wanted) / (gain_wrong - gain_right)).nan_to_num(0.5).clamp(0, 1)
            middle = wrong.lerp(right, per_image(share, wrong))
            gain, error, stay = self.observe(middle, aim, steps=steps)
            right, gain_right = (
                torch.where(per_image(error, middle), right, middle),
                torch.where(error, gain_right, gain),
            )
            wrong, gain_wrong = (
                torch.where(per_image(error, middle), middle, wrong),
                torch.where(error, gain, gain_wrong),
            )
            if stay is not None:
                aim, right, wrong = aim[stay], right[stay], wrong[stay]
                gain_right, gain_wrong, wanted = gain_right[stay], gain_wrong[stay], wanted[stay]
                if not len(aim):
                    return
