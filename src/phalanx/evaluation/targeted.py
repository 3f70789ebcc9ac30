"""Targeted success: how often an attacker gets exactly the class that was drawn, not merely any error."""

# B batch, C classes

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phalanx.attacks import APGD, check_answers
from phalanx.data import Batch, ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.filling import Tell, nobody
from phalanx.evaluation.halving import Halving
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import routed
from phalanx.runs import wilson
from phalanx.threat import ThreatModel

SCHEMA = 1
"""Of `Targeted.to_json`."""

STEPS = 100


@dataclass(frozen=True)
class Targeted:
    """Each image was attacked towards one class, drawn at random among all but its label."""

    attack: str
    n: int
    """All images, right when clean or not."""
    reached: int
    """Of these, answered with exactly that class under attack."""
    already: int
    """Of the reached, those that the model answers with it when they are clean."""
    invalid: int
    """Of all, those whose answer under attack is not finite; not reached."""
    cells: tuple[tuple[int, int, int, int], ...]
    """(label, target, n, reached), for every pair that was drawn."""

    @property
    def rate(self) -> float:
        """reached / n."""
        return self.reached / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson(self.reached, self.n)

    def to_json(self) -> dict[str, Any]:
        """As targeted.json."""
        return {
            "schema": SCHEMA,
            "attack": self.attack,
            "n": self.n,
            "reached": self.reached,
            "already": self.already,
            "invalid": self.invalid,
            "cells": [
                {"label": label, "target": target, "n": n, "reached": reached}
                for label, target, n, reached in self.cells
            ],
        }


def drawn_targets(y: Tensor, num_classes: int, rng: SampleRng) -> Tensor:
    """(B,) int64 for each label one of the other classes, all alike. Raises InputError for fewer than 2 classes."""
    if num_classes < 2:
        raise InputError(f"a targeted attack needs 2 classes, the model has {num_classes}")
    drawn = rng.integers("target", num_classes - 1)
    return drawn + (drawn >= y)


def targeted_success(
    model: Callable[[Tensor], Any],
    images: ImageSet,
    threat: ThreatModel,
    steps: int = STEPS,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int, str], None] | None = None,
    notify: Tell = nobody,
) -> Targeted:
    """APGD towards a random wrong class of each image, on the whole model: its margin over all others is climbed.

    A success is an answer with exactly that class, so the search does not stop at another error. One run of one attack:
    what it does not reach, another may. The target and the start belong to the image, not to its batch.

    Args:
        model: images (B, ...) in [0, 1] to logits (B, C); attacked in evaluation mode, and left as it was.
        images: what is attacked, those that are answered wrongly when clean included.
        threat: the ball.
        steps: of APGD.
        num_classes: C, the model's.
        batch_size: images attacked at once; a batch that does not fit the memory is halved.
        seed: of targets and starts.
        device: where the model is.
        progress: called after every batch with the images done, their total and the attack.
        notify: hears of batches that are halved.

    Raises InputError for labels or a `num_classes` that are not the model's.
    """
    attack = APGD(eps=threat.eps, norm=threat.norm, steps=steps, objective="margin", targeted=True)
    name, pairs, reached_pairs = f"targeted apgd-{steps}", Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    done = already = invalid = 0
    halving = Halving(notify)

    def attacked(piece: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = SampleRng(derive_seed(seed, name), piece.ids)
        target = drawn_targets(piece.y, num_classes, rng)
        return piece.y, target, *_attacked(model, attack, piece, target, rng, num_classes)

    for batch in images.batches(batch_size, device):
        for y, target, clean, logits in halving.pieces(batch, attacked):
            finite = logits.isfinite().all(-1)
            reached = (logits.argmax(-1) == target) & finite
            already += int((reached & (clean.argmax(-1) == target)).sum())
            invalid += int((~finite).sum())
            for label, wanted, won in zip(y.tolist(), target.tolist(), reached.tolist(), strict=True):
                pairs[label, wanted] += 1
                reached_pairs[label, wanted] += won
            done += len(y)
        if progress is not None:
            progress(done, len(images), name)
    cells = tuple((*pair, pairs[pair], reached_pairs[pair]) for pair in sorted(pairs))
    return Targeted(name, done, sum(reached_pairs.values()), already, invalid, cells)


@torch.no_grad()
def _attacked(
    model: Callable[[Tensor], Any], attack: APGD, batch: Batch, target: Tensor, rng: SampleRng, num_classes: int
) -> tuple[Tensor, Tensor]:
    """(B, C) the real model's logits, clean and attacked."""
    with frozen(model), exact_fp32(), preserved_rng():
        clean = routed(model, batch.x).logits
        check_answers(clean, batch.y)
        if clean.shape[1] != num_classes:
            raise InputError(
                f"num_classes must be {clean.shape[1]}, the classes that the model tells apart, got {num_classes}; "
                "use the data that the model is for"
            )

        def unfolded(x: Tensor) -> Tensor:
            # a function: the search is not judged, so it must not be made on a copy that was not compared
            return routed(model, x).logits

        # of all points seen an error ranks first, then the margin of the target: above 0 at every success
        x_adv = attack.search(unfolded, batch.x, batch.y, rng=rng, target=target).x_adv
        return clean, routed(model, x_adv).logits
