"""The rows of a ledger: what a clean pass and an attack say of each image of a batch."""

# B batch

from __future__ import annotations

import numpy as np
from torch import Tensor

from phalanx.attacks import AttackResult
from phalanx.data import Batch
from phalanx.evaluation.protocols import Member
from phalanx.runs import Verdict
from phalanx.runs.verdict import CLEAN


def clean_rows(batch: Batch, logits: Tensor) -> list[Verdict]:
    """Of the clean images, from the model's answers (B, C)."""
    predicted = logits.argmax(-1)
    finite = logits.isfinite().all(-1)
    columns = zip(batch.ids.tolist(), batch.y.tolist(), predicted.tolist(), finite.tolist(), strict=True)
    return [
        Verdict(
            sample=sample,
            label=label,
            attack=CLEAN,
            surface="whole",
            restart=0,
            verdict=("held" if answer == label else "broken") if sound else "invalid",
            predicted=answer,
            clean_predicted=answer,
            flipped=None,
            loss=None,
            distance=0.0,
            queries=1,
            first_success=-1,
        )
        for sample, label, answer, sound in columns
    ]


def attack_rows(batch: Batch, member: Member, result: AttackResult, distance: Tensor) -> list[Verdict]:
    """Of an attack's result; `distance` (B,) is the norm of each perturbation."""
    # one transfer a column: number by number, the host would wait for the device each time
    result = result._replace(**{name: column.cpu() for name, column in result._asdict().items() if column is not None})
    labels, distances = batch.y.tolist(), distance.tolist()
    rows = []
    for i, sample in enumerate(batch.ids.tolist()):
        loss = float(result.loss[i])
        rows.append(
            Verdict(
                sample=sample,
                label=labels[i],
                attack=member.name,
                surface=member.attack.surface,
                restart=int(result.restart[i]),
                verdict="invalid" if result.invalid[i] else "broken" if result.broken[i] else "held",
                predicted=int(result.predicted[i]),
                clean_predicted=int(result.clean_predicted[i]),
                flipped=None if result.flipped is None else bool(result.flipped[i]),
                loss=loss if np.isfinite(loss) else None,
                distance=distances[i],
                queries=int(result.queries[i]),
                first_success=int(result.first_success[i]),
            )
        )
    return rows


def timeout_rows(batch: Batch, member: Member) -> list[Verdict]:
    """Of images that are right when clean, and whose attack was given up."""
    return [
        Verdict(
            sample=sample,
            label=label,
            attack=member.name,
            surface=member.attack.surface,
            restart=0,
            verdict="timeout",
            predicted=label,
            clean_predicted=label,
            flipped=None,
            loss=None,
            distance=0.0,
            queries=0,
            first_success=-1,
        )
        for sample, label in zip(batch.ids.tolist(), batch.y.tolist(), strict=True)
    ]
