"""The attacks of all rows, put into columns: only one and the same budget shares a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phalanx.report.page import Attack
from phalanx.runs import AttackSummary
from phalanx.runs.canonical import JSON, canonical_json
from phalanx.runs.summary import Key


@dataclass(frozen=True)
class Faced:
    """An attack as one ledger declares it, and what it did there."""

    spec: Mapping[str, JSON]
    summary: AttackSummary

    @property
    def key(self) -> Key:
        """What finds its rows in the ledger."""
        return self.summary.attack, self.summary.surface

    @property
    def budget(self) -> dict[str, JSON]:
        """The declared spec without the seed."""
        return {key: value for key, value in self.spec.items() if key != "seed"}

    @property
    def identity(self) -> tuple[str, str, bytes]:
        """Equal for what may be compared."""
        return self.summary.attack, self.summary.surface, canonical_json(self.budget)


def columns_of(rows: Sequence[Sequence[Faced]]) -> tuple[tuple[Attack, ...], list[tuple[int | None, ...]]]:
    """The columns, in the order in which rows first face them, and for each row the place of each column in it."""
    first: dict[tuple[str, str, bytes], Faced] = {}
    for row in rows:
        for faced in row:
            first.setdefault(faced.identity, faced)
    places = []
    for row in rows:
        own = {faced.identity: place for place, faced in enumerate(row)}
        places.append(tuple(own.get(identity) for identity in first))
    labels = _labels(list(first.values()))
    return tuple(_attack(faced, label) for faced, label in zip(first.values(), labels, strict=True)), places


def _attack(faced: Faced, label: str) -> Attack:
    return Attack(
        label=label,
        name=faced.summary.attack,
        surface=faced.summary.surface,
        norm=str(faced.spec.get("norm")),
        eps=str(faced.spec.get("eps")),
        spec=faced.budget,
    )


def _labels(attacks: Sequence[Faced]) -> list[str]:
    """The shortest of name, name and threat, and those numbered, that tells each from the others."""
    short = [_named(faced) for faced in attacks]
    long = [
        f"{name}, {faced.spec.get('norm')} {faced.spec.get('eps')}" for name, faced in zip(short, attacks, strict=True)
    ]
    labels = []
    for place, (name, with_threat) in enumerate(zip(short, long, strict=True)):
        if short.count(name) == 1:
            labels.append(name)
        elif long.count(with_threat) == 1:
            labels.append(with_threat)
        else:
            labels.append(f"{with_threat} ({long[: place + 1].count(with_threat)})")
    return labels


def _named(faced: Faced) -> str:
    # in a cascade it met what those before it had left: not its accuracy alone
    return f"after {_alone(faced.summary)}" if faced.spec.get("after") else _alone(faced.summary)


def _alone(summary: AttackSummary) -> str:
    # the joint attack on both halves of a dual model has no other surface, nor has the one on its mixing network
    named = summary.surface in ("whole", "halves", "mixing") or f"@{summary.surface}:" in f"{summary.attack}:"
    return summary.attack if named else f"{summary.attack} on {summary.surface}"
