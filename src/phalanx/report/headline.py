"""The columns of the first table: those of the papers, and the worst case over everything that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phalanx.runs.canonical import JSON
from phalanx.runs.rate import Rate

CLEAN, ATTACKED, AUTOATTACK, MINIMUM, WORST = "SA", "RA", "AA", "min", "worst"
KEYS = (CLEAN, ATTACKED, "RA-E", "RA-R", "smooth", "RA-RMoE", "RA-SMoE", "steering", MINIMUM, AUTOATTACK, WORST)
"""Every column, in order; a table leaves out those that no row has."""

_BY_SURFACE = {
    "whole": "RA",
    "pinned": "RA",
    "experts": "RA-E",
    "router": "RA-R",
    "dense": "smooth",
    "robust": "RA-RMoE",
    "standard": "RA-SMoE",
}
_GENERAL_ATTACKS = frozenset({"FGSM", "PGD", "APGD", "APGDTargeted", "FAB", "Square"})
_STEERING_ATTACKS = frozenset({"RouteSteering", "JointMargin"})
_SAYS = {
    CLEAN: "accuracy on clean images",
    "RA": "the deployed model attacked",
    "RA-E": "its experts attacked, the route held",
    "RA-R": "its route attacked, the experts seeing the clean image",
    "smooth": "all experts attacked under softmax weights",
    "RA-RMoE": "the robust half attacked alone",
    "RA-SMoE": "the standard half attacked alone",
    "steering": "the image steered to each expert, or both halves to one wrong class",
    AUTOATTACK: "AutoAttack's standard version alone, which knows nothing of routes",
    MINIMUM: "the papers' own rule, the smallest of RA, RA-E and RA-R, of a dual model that of RA, RA-RMoE and RA-SMoE",
    WORST: "right under every attack within the threat, image by image",
}


@dataclass(frozen=True)
class Column:
    """A column of the first table."""

    key: str
    """As in `KEYS`."""
    says: str
    """What it is, in half a sentence."""
    attacks: tuple[str, ...]
    """Labels of the attacks whose union it is; none for SA, the minimum and the worst case."""

    @property
    def head(self) -> str:
        """What stands above it."""
        return {WORST: "worst case", AUTOATTACK: "AutoAttack"}.get(self.key, self.key)


def column_of(spec: Mapping[str, JSON], surface: str) -> str | None:
    """The column that an attack, as a ledger declares it, counts in on a surface; None if only in the worst case.

    A released attack of a paper (`reproduction` in its spec) has the column of its surface, in a line of its own.
    """
    kind = spec.get("attack")
    if kind in _STEERING_ATTACKS:
        return "steering"
    column = _BY_SURFACE.get(surface)
    plain = kind in _GENERAL_ATTACKS or bool(spec.get("reproduction"))
    return column if plain or column != ATTACKED else None


def minimum(rates: Mapping[str, Rate | None], *, dual: bool) -> Rate | None:
    """The papers' rule: the smallest of RA, RA-E and RA-R, of a dual model that of RA, RA-RMoE and RA-SMoE.

    None if one of them was not measured. Not a worst case: another attack may break other images.
    """
    parts = [rates.get(key) for key in (("RA", "RA-RMoE", "RA-SMoE") if dual else ("RA", "RA-E", "RA-R"))]
    found = [rate for rate in parts if rate is not None]
    return min(found, key=lambda rate: rate.share) if len(found) == len(parts) else None


def shown_columns(filled: Sequence[Mapping[str, object]], attacks: Mapping[str, Sequence[str]]) -> tuple[Column, ...]:
    """The columns in which some line has a value, with the labels of the attacks that count in each."""
    keys = [key for key in KEYS if any(line.get(key) is not None for line in filled)]
    return tuple(Column(key, _SAYS[key], tuple(attacks.get(key, ()))) for key in keys)
