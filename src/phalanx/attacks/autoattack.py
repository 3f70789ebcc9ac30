"""AutoAttack (Croce & Hein 2020): which attacks, with which budgets, in which order."""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.attacks.apgd import APGD, APGDTargeted
from phalanx.attacks.base import Attack
from phalanx.attacks.fab import FAB
from phalanx.threat import Norm

_STANDARD = ("apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000")
# in L1, as published: more restarts, fewer targets (Croce & Hein 2021)
_STANDARD_L1 = ("apgd-100x5", "apgd-t-100x5", "fab-t-100x9", "square-5000")
_PLUS = ("apgd-100x5", "apgd-dlr-100x5", "fab-100x5", "square-5000", "apgd-t-100x9", "fab-t-100x9")
_RAND = ("apgd-100-eot:20", "apgd-dlr-100-eot:20")

VERSIONS: Mapping[str, Mapping[Norm, tuple[str, ...]]] = {
    "standard": {"Linf": _STANDARD, "L2": _STANDARD, "L1": _STANDARD_L1},
    "plus": {"Linf": _PLUS, "L2": _PLUS, "L1": _PLUS},
    "rand": {"Linf": _RAND, "L2": _RAND, "L1": _RAND},
}
"""By version and norm, the names that a protocol gives its attacks, in the published order: each attacks only what
those before it have left standing."""


def fitted(attack: Attack, num_classes: int) -> Attack:
    """The attack as it really runs on a model of so many classes, whose verdicts are the same: for a ledger's spec.

    A DLR that has too few classes is the margin, and no more classes are aimed at than are wrong.
    """
    return attack.for_classes(num_classes) if isinstance(attack, APGD | APGDTargeted | FAB) else attack
