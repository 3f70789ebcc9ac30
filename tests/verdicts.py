"""Rows of a ledger, as its readers are tested on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phalanx.runs import Verdict
from phalanx.runs.verdict import Outcome


def verdict(sample: int, attack: str, outcome: Outcome, **changes: Any) -> Verdict:
    """Of a sample of class 1, which is answered with 2 unless it is held."""
    row = Verdict(
        sample=sample,
        label=1,
        attack=attack,
        surface="whole",
        restart=0,
        verdict=outcome,
        predicted=1 if outcome == "held" else 2,
        clean_predicted=1,
        flipped=None,
        loss=None,
        distance=0.0,
        queries=1,
        first_success=-1,
    )
    return replace(row, **changes)
