"""Every image as broken, certified or undecided at the radius attacked, where the model has certificates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.report.certificates import Certificates
from phalanx.report.words import plural
from phalanx.runs import Ledger
from phalanx.runs.proofs import Contradiction, threefold
from phalanx.runs.rate import Rate

PARTS = ("broken", "certified", "undecided")
_NAMED = 3
"""Contradictions that an alarm names."""


@dataclass(frozen=True)
class Threefold:
    """Of one evaluated model; robust accuracy lies between `certified` and what is not `broken`."""

    broken: Rate
    """Of all images those that are wrong, when clean or under an attack within the threat."""
    certified: Rate
    """Proved to be right in the whole ball, by one certificate or another."""
    undecided: Rate
    contradictions: tuple[Contradiction, ...]
    """Wrong answers within a certified radius, at any radius: there must be none."""

    @property
    def rates(self) -> dict[str, Rate]:
        """By `PARTS`."""
        return dict(zip(PARTS, (self.broken, self.certified, self.undecided), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Counts and contradictions."""
        return {
            "n": self.broken.n,
            **{part: rate.held for part, rate in self.rates.items()},
            "contradictions": [each.to_json() for each in self.contradictions],
        }


def read_threefold(ledger: Path, certificates: Sequence[Certificates]) -> Threefold | None:
    """None without a certificate that says something of the ledger's threat, unless one is contradicted."""
    if not certificates:
        return None
    with Ledger.read(ledger) as opened:
        rows, attacks, binding = opened.rows(), opened.attacks(), opened.binding()
    proofs = [found.proof for found in certificates]
    found, wrong = threefold(rows, attacks, binding.norm, binding.eps, proofs)
    if not wrong and not any(proof.norm == binding.norm for proof in proofs) and not found.certified:
        return None
    broken, certified, undecided = (
        Rate(len(part), found.n) for part in (found.broken, found.certified, found.undecided)
    )
    return Threefold(broken, certified, undecided, wrong)


def contradicted(label: str, found: Threefold | None) -> Iterator[str]:
    """What invalidates the headline, in a sentence."""
    if found is None or not found.contradictions:
        return
    wrong = found.contradictions
    named = "; ".join(each.text for each in wrong[:_NAMED])
    more = f" and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
    yield (
        f"{plural(len(wrong), 'certificate is', 'certificates are')} contradicted: {named}{more}. A certificate of "
        f"{label} is unsound, or a verdict wrong: quote neither"
    )
