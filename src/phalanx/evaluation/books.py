"""Where verdicts go: a ledger on disk, or memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from typing import Protocol as Interface

from phalanx.runs import Verdict
from phalanx.runs.verdict import Outcome, worst_by_sample


class Book(Interface):
    """What an evaluation needs of a ledger."""

    def declare_size(self, images: int) -> None: ...
    def declare_attack(self, name: str, spec: Mapping[str, Any]) -> None: ...
    def attacks(self) -> dict[str, dict[str, Any]]: ...
    def outcomes(self, attack: str, surface: str) -> dict[int, Outcome]: ...
    def add(self, rows: Iterable[Verdict]) -> None: ...
    def rows(self) -> list[Verdict]: ...


class Memory:
    """A ledger that nobody keeps."""

    def __init__(self) -> None:
        self._rows: list[Verdict] = []
        self._attacks: dict[str, dict[str, Any]] = {}

    def declare_size(self, images: int) -> None:
        """Nothing to record."""

    def declare_attack(self, name: str, spec: Mapping[str, Any]) -> None:
        self._attacks[name] = dict(spec)

    def attacks(self) -> dict[str, dict[str, Any]]:
        return dict(self._attacks)

    def outcomes(self, attack: str, surface: str) -> dict[int, Outcome]:
        own = (row for row in self._rows if (row.attack, row.surface) == (attack, surface))
        return worst_by_sample((row.sample, row.verdict) for row in own)

    def add(self, rows: Iterable[Verdict]) -> None:
        self._rows.extend(rows)

    def rows(self) -> list[Verdict]:
        return sorted(self._rows, key=lambda row: row.key)
