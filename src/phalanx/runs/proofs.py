"""Certificates against verdicts, sample by sample: what is broken, what is certified, and what cannot be both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phalanx.runs.canonical import JSON
from phalanx.runs.headline import Headline, headline
from phalanx.runs.summary import Specs, aside_attacks, radius
from phalanx.runs.verdict import CLEAN, Verdict

_AT_MOST: Mapping[str, Collection[str]] = {"Linf": ("Linf", "L2", "L1"), "L2": ("L2", "L1"), "L1": ("L1",)}
"""By norm the norms that are never smaller: a ball in one of these lies in the ball of the same radius in it."""


@dataclass(frozen=True)
class Proof:
    """What one certificate says of the evaluated model."""

    norm: str
    method: str
    radii: Mapping[int, float]
    """By sample that is right: the radius, in pixel units of [0, 1], within which every image is answered rightly."""

    def held(self, norm: str, eps: float) -> frozenset[int]:
        """The samples that are certified in the whole ball of `eps` in `norm`."""
        if norm not in _AT_MOST.get(self.norm, ()):
            return frozenset()
        return frozenset(sample for sample, proved in self.radii.items() if proved >= eps)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """An image within a certified radius that is answered wrongly: the certificate is unsound, or the verdict wrong."""

    sample: int
    attack: str
    distance: float
    """At most, from the clean image, in the attack's norm."""
    radius: float
    """That was certified."""
    norm: str
    """Of the certificate."""
    method: str

    @property
    def text(self) -> str:
        """In a sentence."""
        return (
            f"sample {self.sample} is certified within {self.radius:.6g} ({self.norm}, {self.method}), but "
            f"{self.attack} broke it at {self.distance:.6g}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def contradictions(rows: Iterable[Verdict], attacks: Specs, proofs: Sequence[Proof]) -> tuple[Contradiction, ...]:
    """Every wrong or non-finite answer inside a certified radius, of whatever attack, radius and surface: verdicts are
    the whole real model's. The nearest for each sample and certificate; reproductions of papers' attacks are left out,
    whose images need not be images.
    """
    found: dict[tuple[int, int], Contradiction] = {}
    for row in rows:
        spec = attacks.get(row.attack, {})
        if spec.get("reproduction") or not row.wrong:
            continue
        norm, distance = _norm(row, spec), _distance(row, spec)
        for place, proof in enumerate(proofs):
            proved = proof.radii.get(row.sample)
            if proved is None or distance > proved or norm not in _AT_MOST.get(proof.norm, ()):
                continue
            before = found.get((row.sample, place))
            if before is None or distance < before.distance:
                one = Contradiction(row.sample, row.attack, distance, proved, proof.norm, proof.method)
                found[row.sample, place] = one
    return tuple(found[key] for key in sorted(found))


def threefold(
    rows: Sequence[Verdict], attacks: Specs, norm: str, eps: JSON, proofs: Sequence[Proof]
) -> tuple[Headline, tuple[Contradiction, ...]]:
    """Every sample of a ledger of the threat `norm`, `eps` as broken, certified or undecided, and what contradicts a
    certificate. A sample that is broken counts as that, whatever was proved of it; one without a verdict is left out.
    """
    aside = aside_attacks(attacks, norm, eps)
    wrong = contradictions(rows, attacks, proofs)
    broken = headline(rows, aside=aside).broken
    proved = {sample for proof in proofs for sample in proof.held(norm, radius(eps))}
    proved &= {row.sample for row in rows}
    # what was caught lying once proves nothing
    proved -= broken | {each.sample for each in wrong}
    return headline(rows, aside=aside, certified=proved), wrong


def _norm(row: Verdict, spec: Mapping[str, JSON]) -> str:
    # the clean image is at distance 0 in every norm; an attack that was given no norm uses Linf
    return "L1" if row.attack == CLEAN else str(spec.get("norm") or "Linf")


def _distance(row: Verdict, spec: Mapping[str, JSON]) -> float:
    if row.attack == CLEAN:
        return 0.0
    own = spec.get("eps")
    # inside the attack's ball whatever rounding made of the distance
    return row.distance if own is None else min(row.distance, radius(own))
