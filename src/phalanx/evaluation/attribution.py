"""Attribution: which of a broken model's parts is to blame, sample by sample and in numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from phalanx.data import ImageSet
from phalanx.evaluation.blame import CULPRITS, Blame, Blamed, blame
from phalanx.evaluation.decomposition import Decomposition, decompose
from phalanx.evaluation.experts import choosing_parts
from phalanx.evaluation.gates import routed_parts
from phalanx.evaluation.protocols import Protocol
from phalanx.evaluation.result import Evaluation
from phalanx.runs.rate import Rate

SCHEMA = 1
"""Of `Attribution.to_json`."""


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found."""

    blame: Blame
    decomposition: Decomposition

    def to_json(self) -> dict[str, Any]:
        """As plain values, lists and dictionaries; every number is finite, every share has its n and its 95 % Wilson
        interval."""
        return {"schema": SCHEMA, "blame": _blame(self.blame), **_plain(self.decomposition)}


def _blame(found: Blame) -> dict[str, Any]:
    return {
        "broken": len(found.samples) + len(found.lost) + len(found.unexplained),
        "attacks": [{"attack": name, **_counts(own)} for name, own in _by_attack(found)],
        "total": _counts(found.samples),
        "gates": _plain(found.gates),
        "lost": list(found.lost),
        "unexplained": list(found.unexplained),
        "samples": _plain(found.samples),
    }


def _by_attack(found: Blame) -> list[tuple[str, list[Blamed]]]:
    # they come attack by attack
    return [(name, list(own)) for name, own in itertools.groupby(found.samples, key=lambda sample: sample.attack)]


def _counts(samples: Any) -> dict[str, int]:
    culprits = Counter(sample.culprit for sample in samples)
    return {
        "n": len(samples),
        **{culprit: culprits[culprit] for culprit in CULPRITS},
        **{name: sum(getattr(sample, name) for sample in samples) for name in ("flipped", "old_right", "any_right")},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Rate):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def has_choice(model: Callable[..., Any], images: ImageSet, device: torch.device | str = "cpu") -> bool:
    """Whether some gate of the model has experts to choose among: without one there is no router to blame."""
    return bool(routed_parts(model)) and bool(choosing_parts(model, images, device))


def attribute(
    model: Callable[[Tensor], Any],
    images: ImageSet,
    evaluation: Evaluation,
    protocol: Protocol,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Attribution:
    """Blame for each sample that the evaluation broke (see `blame`), and the decomposition of its robust accuracy (see
    `decompose`), on `images`, all of the evaluation's or some.

    Args:
        model: the evaluated one, with a gate that has a choice (see `has_choice`).
        images: at least one.
        evaluation: finished.
        protocol: the evaluation's.
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: the evaluation's.
        device: where the model is.
        progress: called with what is done, its total and what is going on.
    """
    found = blame(
        model,
        images,
        evaluation.rows,
        protocol,
        aside=evaluation.aside,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    numbers = decompose(
        model,
        images,
        evaluation.standing,
        evaluation.threat,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    return Attribution(found, numbers)
