"""The row of the ledger: what one attack did to one sample."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Outcome: TypeAlias = Literal["held", "broken", "invalid", "timeout"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
WORST_FIRST: tuple[Outcome, ...] = ("broken", "invalid", "timeout", "held")
"""Of one sample's restarts, the first outcome in this order is the one that counts."""
CLEAN = "clean"
"""The name under which the unattacked sample is judged."""

Record: TypeAlias = tuple[int, int, str, str, int, Outcome, int, int, int | None, float | None, float, int, int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One (sample, attack, surface, restart), judged on the whole real model.

    A number that is not finite is never robust: a `held` row with such a loss or distance becomes `invalid`;
    the loss is then kept as None and the distance as infinity.
    Raises ValueError for an unknown outcome, or for `held` where the prediction is not the label.
    """

    sample: int
    """Position in the data set, at least 0."""
    label: int
    attack: str
    """"clean", or a name that the ledger's `attacks()` explains."""
    surface: str
    restart: int
    verdict: Outcome
    predicted: int
    """The class of the attacked sample."""
    clean_predicted: int
    flipped: bool | None
    """Whether the attack changed the route; None for a model without one."""
    loss: float | None
    distance: float
    """Norm of the perturbation."""
    queries: int
    """Forward passes spent."""
    first_success: int
    """The step that first broke the sample, -1 if none."""

    def __post_init__(self) -> None:
        if self.verdict not in OUTCOMES:
            raise ValueError(f"a verdict is one of {', '.join(OUTCOMES)}, got {self.verdict!r}")
        if self.verdict == "held" and self.predicted != self.label:
            raise ValueError(
                f"sample {self.sample}, attack {self.attack!r}: held, but label {self.label} was predicted "
                "as "
                f"{self.predicted}"
            )
        loss_lost = self.loss is not None and not math.isfinite(self.loss)
        distance_lost = not math.isfinite(self.distance)
        if loss_lost:
            object.__setattr__(self, "loss", None)
        if distance_lost:
            object.__setattr__(self, "distance", math.inf)
        if (loss_lost or distance_lost) and self.verdict == "held":
            object.__setattr__(self, "verdict", "invalid")

    @property
    def key(self) -> tuple[int, str, str, int]:
        """What identifies the row."""
        return self.sample, self.attack, self.surface, self.restart

    def record(self) -> Record:
        """The row as plain numbers and text, in the order of the fields; NumPy and torch scalars become
        plain.
        """
        index = operator.index
        return (
            index(self.sample),
            index(self.label),
            str(self.attack),
            str(self.surface),
            index(self.restart),
            self.verdict,
            index(self.predicted),
            index(self.clean_predicted),
            None if self.flipped is None else int(self.flipped),
            None if self.loss is None else _plain(self.loss),
            _plain(self.distance),
            index(self.queries),
            index(self.first_success),
        )

    @property
    def wrong(self) -> bool:
        """Whether the answer is wrong or not finite; a clean one is told by the class alone."""
        return self.verdict in ("broken", "invalid") or (self.attack == CLEAN and self.predicted != self.label)

    @classmethod
    def from_record(cls, record: Record) -> Verdict:
        """The row that `record()` gave."""
        sample, label, attack, surface, restart, verdict, predicted, clean_predicted = record[:8]
        flipped, loss, distance, queries, first_success = record[8:]
        return cls(
            sample=sample,
            label=label,
            attack=attack,
            surface=surface,
            restart=restart,
            verdict=verdict,
            predicted=predicted,
            clean_predicted=clean_predicted,
            flipped=None if flipped is None else bool(flipped),
            loss=loss,
            distance=distance,
            queries=queries,
            first_success=first_success,
        )


def _plain(value: float) -> float:
    # adding zero turns -0.0, which SQLite does not keep, into 0.0
    return float(value) + 0.0


def worst_by_sample(outcomes: Iterable[tuple[int, Outcome]]) -> dict[int, Outcome]:
    """The outcome that counts for each sample."""
    found: dict[int, Outcome] = {}
    for sample, outcome in outcomes:
        found[sample] = min(found.get(sample, outcome), outcome, key=WORST_FIRST.index)
    return found


def canonical_record(record: Record) -> bytes:
    """The text of a row that is hashed; equal rows have equal texts on every machine."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode()
