"""Who is still to be attacked by what: known from each image's own verdicts, never from its batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol as Interface

from phalanx.evaluation.protocols import Member, Protocol
from phalanx.runs import Verdict
from phalanx.runs.verdict import CLEAN, Outcome, worst_by_sample


class Outcomes(Interface):
    """What knows verdicts: a ledger, or memory."""

    def outcomes(self, attack: str, surface: str) -> dict[int, Outcome]: ...


class Standing:
    """The verdicts so far on the images of an evaluation, by attack."""

    def __init__(self, protocol: Protocol, book: Outcomes) -> None:
        self._members = protocol.members
        self._clean = book.outcomes(CLEAN, "whole")
        self._found = {member.name: book.outcomes(member.name, member.attack.surface) for member in protocol.members}

    def judged(self, sample: int) -> bool:
        """Whether the clean image has its verdict."""
        return sample in self._clean

    def due(self, member: Member, sample: int) -> bool:
        """Whether the member has still to attack the image: it is right when clean, has no verdict of this attack, and
        held against those before it in a cascade."""
        return (
            self._clean.get(sample) == "held"
            and sample not in self._found[member.name]
            and all(self._found[earlier].get(sample) == "held" for earlier in member.after)
        )

    def finished(self, sample: int) -> bool:
        """Whether nothing is left to do for the image."""
        return self.judged(sample) and not any(self.due(member, sample) for member in self._members)

    def left(self, member: Member, samples: Iterable[int]) -> int:
        """At most so many of the images the member has still to attack: those not judged yet may all be right, and all
        hold against what comes before it."""
        return sum(self._may_be_due(member, sample) for sample in samples)

    def _may_be_due(self, member: Member, sample: int) -> bool:
        known = [self._clean.get(sample), *(self._found[earlier].get(sample) for earlier in member.after)]
        return sample not in self._found[member.name] and all(outcome in ("held", None) for outcome in known)

    def add(self, rows: Iterable[Verdict]) -> None:
        """Takes note of new verdicts, all of one attack."""
        rows = list(rows)
        if rows:
            attack = rows[0].attack
            known = self._clean if attack == CLEAN else self._found[attack]
            known.update(worst_by_sample((row.sample, row.verdict) for row in rows))
