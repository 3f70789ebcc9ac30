"""What a check says, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phalanx.evaluation.honesty.probe import Probe

Status = Literal["pass", "info", "warn", "fail", "skipped"]

TROUBLE: tuple[Status, ...] = ("warn", "fail")


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    status: Status
    sentence: str
    """What it means, and what to do where that is something."""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """The numbers that it rests on."""


@dataclass(frozen=True)
class CheckResult:
    """A check, done or skipped."""

    id: str
    """"M1" to "M12" for the model, "E1" to "E21" for the attacks."""
    title: str
    status: Status
    """"fail" invalidates the headline, "warn" belongs beside it, "info" is for the record."""
    sentence: str
    evidence: Mapping[str, float]
    """Finite numbers."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "id": self.id,
            "title": self.title,
            "status": self.status,
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    id: str
    title: str
    look: Callable[[Probe], Finding]


def passed(sentence: str, **evidence: float) -> Finding:
    return Finding("pass", sentence, _finite(evidence))


def info(sentence: str, **evidence: float) -> Finding:
    return Finding("info", sentence, _finite(evidence))


def warned(sentence: str, **evidence: float) -> Finding:
    return Finding("warn", sentence, _finite(evidence))


def failed(sentence: str, **evidence: float) -> Finding:
    return Finding("fail", sentence, _finite(evidence))


def skipped(reason: str) -> Finding:
    return Finding("skipped", reason)


def _finite(evidence: Mapping[str, float]) -> dict[str, float]:
    """Six digits; what is not finite is no evidence."""
    return {name: float(f"{value:.6g}") for name, value in evidence.items() if math.isfinite(value)}
