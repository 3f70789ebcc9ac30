"""Every image as broken, certified or undecided at the radius attacked, where the model has certificates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.report.certificates import Certificates
from phalanx.report.table import Table
from phalanx.report.words import plural, rated
from phalanx.runs import Ledger
from phalanx.runs.proofs import Contradiction, threefold
from phalanx.runs.rate import Rate

if TYPE_CHECKING:
    from phalanx.report.page import Page

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

    def to_json(self) -> dict[str, Any]:
        """Counts and contradictions."""
        return {
            "n": self.broken.n,
            "broken": self.broken.held,
            "certified": self.certified.held,
            "undecided": self.undecided.held,
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


def threefold_table(page: Page) -> Table | None:
    """A line for each model; None where nothing is certified."""
    lines = [
        (
            row.label,
            f"{row.measurement['norm']} {row.measurement['eps']}",
            rated(row.threefold.broken),
            rated(row.threefold.certified),
            rated(row.threefold.undecided),
            f"{row.n:,}",
        )
        for row in page.rows
        if row.threefold is not None
    ]
    if not lines:
        return None
    return Table(
        "Broken, certified or undecided",
        "Every image is one of three: an attack broke it or it is wrong when clean, a certificate proves it right in "
        "the whole ball, or neither. Robust accuracy lies between the certified share and all but the broken one.",
        ("model", "threat", "broken, %", "certified, %", "undecided, %", "n"),
        tuple(lines),
    )
