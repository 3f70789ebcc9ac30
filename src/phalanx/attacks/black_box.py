"""What an attacker without the model sees, scores or labels; and the account of a search that has labels alone."""

# A samples given to the search, L samples still attacked, K points of each, M points sent

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phalanx.attacks.surfaces import Model
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.nn import frozen
from phalanx.routing import routed
from phalanx.threat import ThreatModel

Answers = Callable[[Tensor], Tensor]

NO_ANSWER = -1
"""The label of an answer that is not finite: never the right one."""


def scores_only(model: Model) -> Answers:
    """A function from images (B, ...) to the model's logits (B, C), and nothing else: no gradient, no route, no module.

    The model answers in evaluation mode, and is left as it was.
    """

    @torch.no_grad()
    def scores(x: Tensor) -> Tensor:
        with frozen(model):
            # a copy: the model may hand out a tensor that it keeps
            return routed(model, x).logits.detach().clone()

    return scores


def labels_only(model: Model) -> Answers:
    """A function from images (B, ...) to the model's classes (B,) int64, and nothing else; `NO_ANSWER` for an answer
    that is not finite."""
    scores = scores_only(model)

    def labels(x: Tensor) -> Tensor:
        logits = scores(x)
        return logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), NO_ANSWER)

    return labels


class LabelSearch:
    """Asks for labels, within one budget for each sample, and keeps the nearest error of each.

    A sample's next question follows from its own answers alone, so that what is found does not depend on the batch.
    Where a verdict follows, a sample is over at its first error inside the ball; questions after that one, sent along
    with it, are not counted.
    """

    def __init__(self, target: Target, threat: ThreatModel, budget: int) -> None:
        """`budget` is the number of images of a sample that are sent at most."""
        size, device = len(target), target.x.device
        self._whole, self._threat, self._budget = target, threat, budget
        self._labels = labels_only(target.answers)
        self._distance_A = torch.full((size,), float("inf"), dtype=torch.float64, device=device)
        self._hit_A = torch.zeros(size, dtype=torch.bool, device=device)
        self.at_once = max(size, 1)
        """So many images are sent together at most: as many as the caller has chosen to attack together."""
        self.target = target
        """The samples still attacked."""
        self.rows = torch.arange(size, device=device)
        """(L,) where they are in the batch given to the search."""
        self.found = Found.nothing(target.x)

    @property
    def left(self) -> Tensor:
        """(L,) int64 images that may still be sent; 0 for a sample that is over."""
        return (self._budget - self.found.queries[self.rows]).masked_fill(self._hit_A[self.rows], 0)

    def asked(self, points: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(L, K) which of `points` (L, K, ...) are errors, and which were asked at all: of the `wanted` (L, K), by
        default all, as many as are left of each sample."""
        per_sample = points.shape[:2]
        wanted = torch.ones(per_sample, dtype=torch.bool, device=points.device) if wanted is None else wanted
        sent = wanted & (wanted.cumsum(1) <= self.left[:, None])
        error = torch.zeros_like(sent)
        rows_M, place_M = sent.nonzero(as_tuple=True)
        if not len(rows_M):
            return error, sent
        images_M = points[rows_M, place_M]
        error_M = self._labels(images_M) != self.target.y[rows_M]
        error[rows_M, place_M] = error_M
        distance = torch.full(per_sample, float("inf"), dtype=torch.float64, device=points.device)
        wrong_M = error_M.nonzero().squeeze(1)
        if len(wrong_M):
            near = self._threat.distance(images_M[wrong_M], self.target.x[rows_M[wrong_M]])
            distance[rows_M[wrong_M], place_M[wrong_M]] = near
        self._count(points, sent, distance)
        return error, sent

    def _count(self, points: Tensor, sent: Tensor, distance: Tensor) -> None:
        """Takes note of the answers to `sent`: `distance` (L, K) is that of the errors, infinite elsewhere."""
        inside = distance <= self._threat.epsilon
        if self.target.judged:
            # what was asked after the first error inside the ball is as if it had not been
            sent = sent & (inside.cumsum(1) - inside.int() == 0)
            distance = distance.masked_fill(~sent, float("inf"))
        rows, found = self.rows, self.found
        found.queries[rows] += sent.sum(1)
        nearest_L, place_L = distance.min(1)
        stored_L = nearest_L < self._distance_A[rows]
        self._distance_A[rows[stored_L]] = nearest_L[stored_L]
        found.x_adv[rows[stored_L]] = points[stored_L, place_L[stored_L]]
        new_L = (distance <= self._threat.epsilon).any(1) & (found.first_success[rows] < 0)
        found.first_success[rows[new_L]] = found.queries[rows[new_L]]
        if self.target.judged:
            self._hit_A[rows[new_L]] = True

    def narrowed(self) -> Tensor | None:
        """Leaves out the samples that are over: the mask (L,) of those to go on with, None for all of them."""
        stay_L = self.left > 0
        if bool(stay_L.all()):
            return None
        self.keep(stay_L)
        return stay_L

    def keep(self, stay_L: Tensor) -> None:
        """Leaves out all others (L,)."""
        self.rows, self.target = self.rows[stay_L], self.target[stay_L]
