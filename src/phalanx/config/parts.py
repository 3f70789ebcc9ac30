"""What several sections share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scalar = int | float | str | bool

Mix = Literal["probabilities", "logits"]

MAX_EXPERTS = 1024
"""More are a mistake: building them would take longer than anybody waits."""


def check_gate(top_k: int | Literal["all"], experts: int, temperature: float) -> None:
    if top_k != "all" and not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in 1..experts={experts} or 'all', got {top_k}; lower top_k or add experts")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_count(experts: int, least: int = 1) -> None:
    if experts < least:
        raise ValueError(f"experts must be at least {least}, got {experts}")
    if experts > MAX_EXPERTS:
        raise ValueError(f"experts must be at most {MAX_EXPERTS}, got {experts}")


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], the share of robust answers to keep, got {keep}")


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], the weight of the robust half, got {alpha}")


@dataclass(frozen=True, kw_only=True)
class TwoHalves:
    """What every model of a standard and a robust half says."""

    standard: str
    """The standard half: a finished run's folder or, in a study, the name of one of its runs."""
    robust: str
    """The robust half, likewise."""

    def __post_init__(self) -> None:
        if self.standard == self.robust:
            raise ValueError(f"standard and robust must be two runs, got {self.standard!r} twice")

    @property
    def made_of(self) -> Mapping[str, str]:
        """The runs it joins, by what they become; of a view the last one says how it is measured."""
        return {"standard": self.standard, "robust": self.robust}
