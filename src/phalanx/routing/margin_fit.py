"""Self-labelled max-margin clustering: linear scores on images, without class labels.

t(x) is the cluster of x; linear scores z are fitted by cross-entropy on what the worst perturbation makes of them,
s (z_k - z_t + max_d (w_k - w_t) . d), which is exact in closed form; then t(x) becomes the largest score, and so on.
"""

# N images, B batch, D pixels, F features, E cells

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.bounds import dual_norm, largest_increase
from phalanx.errors import InputError
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing.clusters import cluster
from phalanx.routing.feature_maps import FeatureMap
from phalanx.routing.reach import Regions, in_chunks, regions_of_scores
from phalanx.routing.robust_router import CENTRE, quality_of
from phalanx.threat import ThreatModel

ROUNDS, STEPS, SHARPNESS = 4, 150, 4.0
"""Relabellings, Adam's steps in each, and s."""
BATCH = 512
"""Images of a step; up to four times as many are all taken at once."""
LEARNING_RATE = 0.16
"""Of Adam, over the root of the number of features: 0.02 on the 64 pixels of a digit."""
FINALISTS = 4
"""One attempt in so many goes on after its first round."""


class Scores(NamedTuple):
    """Linear scores of x - 1/2."""

    weights: Tensor
    """(E, D)."""
    bias: Tensor
    """(E,)."""

    def of(self, x: Tensor) -> Tensor:
        """(B, D) to (B, E)."""
        return (x - CENTRE) @ self.weights.T + self.bias

    def cells(self, x: Tensor) -> Tensor:
        """(B,) int64 the largest score."""
        return self.of(x).argmax(1)

    @property
    def regions(self) -> Regions:
        return regions_of_scores(self.weights, self.bias - CENTRE * self.weights.sum(1))


class _Fit(NamedTuple):
    """One attempt after a round."""

    free: Tensor
    """(E, F) weights of the features."""
    scores: Scores
    objective: float


@dataclass(frozen=True)
class MarginClustering:
    """Fits linear scores whose largest one no perturbation within the threat should change."""

    threat: ThreatModel
    features: FeatureMap
    attempts: int
    experts: int
    """E."""
    floor: float
    """The smallest share of its images that a cell may hold; of a tree's splits such that no leaf falls below
    `FLOOR` / E where E is a power of two."""

    def best(self, x_ND: Tensor, cells: int, seed: int) -> Scores:
        """The best by objective after any round; the rounds after the first are for the best quarter of the attempts.

        Raises InputError if none keeps its cells above the floor.
        """
        if len(x_ND) < cells:
            raise self._unsupported(len(x_ND), cells, len(x_ND))
        features_NF = self.features.of(x_ND)
        begun: list[_Fit] = []
        held = 0
        for attempt in range(self.attempts):
            own = derive_seed(seed, attempt)
            # every other one of what is bright and what is not: on images that are nearly binary it is another start
            labels_N = cluster(features_NF, cells, own, binary=attempt % 2 == 1)
            blank = torch.zeros(cells, self.features.count), torch.zeros(cells)
            fit, kept = self._round(x_ND, labels_N, *blank, derive_seed(own, 0))
            held = max(held, kept)
            begun += [fit] if kept == cells else []
        if not begun:
            raise self._unsupported(len(x_ND), cells, held)
        begun.sort(key=lambda fit: -fit.objective)
        seen = list(begun)
        for place, fit in enumerate(begun[: -(-self.attempts // FINALISTS)]):
            for number in range(1, ROUNDS):
                labels_N = fit.scores.cells(x_ND)
                fit, kept = self._round(
                    x_ND, labels_N, fit.free, fit.scores.bias, derive_seed(seed, "finalist", place, number)
                )
                if kept < cells:
                    break
                seen.append(fit)
        return max(seen, key=lambda fit: fit.objective).scores

    def _round(self, x_ND: Tensor, labels_N: Tensor, free: Tensor, bias: Tensor, seed: int) -> tuple[_Fit, int]:
        """Adam's steps from weights (E, F) of the features and biases (E,); what they come to, and how many cells keep
        the floor."""
        free, bias = (start.clone().requires_grad_() for start in (free, bias))
        optimizer = torch.optim.Adam([free, bias], lr=LEARNING_RATE / math.sqrt(self.features.count))
        for rows in _batches(len(x_ND), seed):
            optimizer.zero_grad()
            loss = self._loss(Scores(self.features.to_pixels(free), bias), x_ND[rows], labels_N[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        free, bias = free.detach(), bias.detach()
        scores = Scores(self.features.to_pixels(free), bias)
        cells_N = scores.cells(x_ND)
        quality = quality_of(cells_N, in_chunks(scores.regions, x_ND, self.threat, cells_N))
        held = sum(share >= self.floor for share in quality.load)
        return _Fit(free, scores, quality.objective), held

    def _unsupported(self, images: int, cells: int, held: int) -> InputError:
        return InputError(
            f"model.router: {cells} regions that hold at least {self.floor:.0%} of {images:,} training images each "
            f"cannot be kept apart at eps {self.threat.eps} ({self.threat.norm}): only {held} held; lower threat.eps "
            f"or model.experts ({self.experts}; model.experts=1 is a single network, which has no route to attack), "
            f"or raise model.router.attempts ({self.attempts})"
        )

    def _loss(self, scores: Scores, x_BD: Tensor, labels_B: Tensor) -> Tensor:
        """() cross-entropy of the scores that the worst perturbation within the threat makes, each against the cell's
        own, for every pair at once."""
        cells = len(scores.bias)
        values_BE = scores.of(x_BD)
        differences = (scores.weights[None] - scores.weights[:, None]).flatten(0, 1)
        gain_BEE = self._gain(differences, x_BD).reshape(-1, cells, cells)
        worst_BE = gain_BEE[torch.arange(len(x_BD)), labels_B] + values_BE - values_BE.gather(1, labels_B[:, None])
        return F.cross_entropy(SHARPNESS * worst_BE, labels_B)

    def _gain(self, directions: Tensor, x_BD: Tensor) -> Tensor:
        """(B, P) exact for Linf; for L2 and L1 without the pixel range, an upper bound that costs nothing."""
        if self.threat.norm == "Linf":
            return largest_increase(directions, x_BD, self.threat)
        return (self.threat.epsilon * dual_norm(directions, self.threat.norm)).expand(len(x_BD), -1)


def _batches(total: int, seed: int) -> Iterator[Tensor]:
    """The rows of each step: all of them, or so many drawn."""
    everything = SampleRng.for_batch(1, seed)
    for step in range(STEPS):
        yield torch.arange(total) if total <= 4 * BATCH else everything.integers("rows", total, (BATCH,), step=step)[0]
