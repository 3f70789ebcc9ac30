"""Errors of an evaluation that are made again: which ones, and what becomes of them."""

# B images

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from phalanx.attacks import AttackResult
from phalanx.data import Batch
from phalanx.evaluation.protocols import Member
from phalanx.runs import Verdict

AGAIN = 16
"""Errors that are made again, of each attack its cheapest first."""


class MadeAgain(NamedTuple):
    """Images that one attack broke, attacked again with the random numbers that broke them."""

    member: Member
    batch: Batch
    """(B, ...) images, clean."""
    result: AttackResult


def to_make_again(
    rows: Iterable[Verdict], attacks: Collection[str], samples: Collection[int]
) -> dict[str, list[Verdict]]:
    """By attack at most `AGAIN` errors in all: in turn the cheapest of each attack that is left."""
    left: dict[str, list[Verdict]] = {}
    for row in sorted(rows, key=lambda row: row.queries):
        if row.verdict == "broken" and row.attack in attacks and row.sample in samples:
            left.setdefault(row.attack, []).append(row)
    found: dict[str, list[Verdict]] = {}
    while left and sum(map(len, found.values())) < AGAIN:
        for name in list(left):
            found.setdefault(name, []).append(left[name].pop(0))
            if not left[name]:
                del left[name]
            if sum(map(len, found.values())) == AGAIN:
                break
    return found
