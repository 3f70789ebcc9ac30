"""What an evaluation found, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from phalanx.runs import Summary, Verdict, summarise, wilson
from phalanx.runs.summary import external_attacks, held_samples
from phalanx.threat import ThreatModel


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    protocol: str
    threat: ThreatModel
    rows: tuple[Verdict, ...]
    load: tuple[float, ...] | None
    """Share of the clean images that each expert answers; None without a route, and before the end."""
    seconds: float
    ledger: Path | None
    """The file that holds the rows; None if none was asked for."""
    aside: tuple[str, ...] = ()
    """Attacks that reproduce a published one, defects included, or are outside the threat: shown, in no headline."""
    planned: int = 0
    """Of how many images the evaluation is."""
    finished: bool = True
    """Whether every image has met everything that it was to meet."""
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each attack's name means."""

    @cached_property
    def summary(self) -> Summary:
        return summarise(self.rows, aside=self.aside, attacks=self.attacks)

    @property
    def n(self) -> int:
        """Images with a verdict."""
        return self.summary.n

    @property
    def clean_acc(self) -> float:
        return self.summary.clean_accuracy

    @property
    def robust_acc(self) -> float:
        """Per sample the worst case over everything tried: held / n. What has not met everything has not held."""
        return self.summary.robust_accuracy

    @property
    def robust_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `robust_acc`."""
        return self.summary.robust_interval

    @property
    def standing(self) -> frozenset[int]:
        """The images that every attack of the headline has tried and none has taken, whatever was submitted."""
        left_out = {*self.aside, *external_attacks(self.attacks)}
        keys = {(row.attack, row.surface) for row in self.rows if row.attack in self.attacks}
        return frozenset(held_samples(self.rows, {"all": {key for key in keys if key[0] not in left_out}})["all"])

    def __str__(self) -> str:
        under = f"under {self.protocol}, {self.threat}"
        return (
            f"{_accuracies(self.summary, self.finished)} {under}, {_count(self.summary.n, self.planned, self.finished)}"
        )


def partial_answer(summary: Summary, planned: int | None) -> str:
    """What an evaluation that has not ended says of the images begun so far."""
    left = f"; {summary.incomplete:,} of them have attacks left" if summary.incomplete else ""
    return f"not finished: {_accuracies(summary, False)}, {_count(summary.n, planned or 0, False)}{left}"


def _accuracies(summary: Summary, finished: bool) -> str:
    robust = summary.robust if finished else summary.standing
    clean = _rated(summary.clean_correct, summary.n)
    return f"SA {clean}, RA {'' if finished else 'at most '}{_rated(robust, summary.n)}"


def _rated(held: int, n: int) -> str:
    low, high = wilson(held, n)
    return f"{held / n if n else 0:.1%} [{low:.1%}, {high:.1%}]"


def _count(n: int, planned: int, finished: bool) -> str:
    return f"n = {n:,}" if finished or not planned else f"n = {n:,} of {planned:,}"
