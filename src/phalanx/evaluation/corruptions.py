"""Accuracy under common corruptions (`phalanx.evaluation.corruption_kinds`), which no attacker chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.data import ImageSet
from phalanx.evaluation.corruption_kinds import CORRUPTIONS, SEVERITIES, corrupt
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.runs import wilson

SCHEMA = 1
"""Of `Corrupted.to_json`."""

PART = "corruptions"
"""What asks for them in a protocol's name."""


@dataclass(frozen=True)
class Corrupted:
    """How many of n images are right, clean and under each corruption."""

    n: int
    seed: int
    clean: int
    correct: Mapping[str, tuple[int, ...]]
    """By corruption, for each severity."""

    @property
    def mean(self) -> float:
        """Accuracy in [0, 1] averaged over all corruptions and severities."""
        counts = [count for counts in self.correct.values() for count in counts]
        return sum(counts) / (len(counts) * max(self.n, 1))

    def to_json(self) -> dict[str, Any]:
        """As corruptions.json; accuracies and 95 % Wilson intervals in [0, 1]."""
        return {
            "schema": SCHEMA,
            "n": self.n,
            "seed": self.seed,
            "clean": self.clean,
            "severities": list(SEVERITIES),
            "corruptions": [
                {
                    "name": name,
                    "correct": list(counts),
                    "accuracy": [count / max(self.n, 1) for count in counts],
                    "intervals": [list(wilson(count, self.n)) for count in counts],
                }
                for name, counts in self.correct.items()
            ],
            "mean": self.mean,
        }


def under_corruptions(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Corrupted:
    """Accuracy of `model` on `images` under every corruption at every severity. An answer that is not finite is wrong.

    No attacker chooses them, so that they have no part in a worst case.
    """
    clean, correct = 0, {name: [0] * len(SEVERITIES) for name in CORRUPTIONS}
    done = 0
    with torch.no_grad(), frozen(model), exact_fp32(), preserved_rng():
        for batch in images.batches(batch_size, device):
            rng = SampleRng(derive_seed(seed, PART), batch.ids)
            clean += _right(model, batch.x, batch.y)
            for name, counts in correct.items():
                for place, severity in enumerate(SEVERITIES):
                    counts[place] += _right(model, corrupt(batch.x, name, severity, rng), batch.y)
            done += len(batch.x)
            if progress is not None:
                progress(done, len(images), PART)
    return Corrupted(len(images), seed, clean, {name: tuple(counts) for name, counts in correct.items()})


def _right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    logits = model(x)
    return int(((logits.argmax(-1) == y) & logits.isfinite().all(-1)).sum())
