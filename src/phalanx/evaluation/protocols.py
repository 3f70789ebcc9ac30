"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from phalanx.attacks import FGSM, OBJECTIVES, PGD, Attack
from phalanx.errors import InputError
from phalanx.threat import ThreatModel

_PGD = re.compile(r"pgd-(\d{1,6})(?:x(\d{1,4}))?")

GRAMMAR = "fgsm, pgd-STEPS or pgd-STEPSxRESTARTS, each with -margin for the margin objective, joined by commas"


@dataclass(frozen=True)
class Member:
    """One attack of a protocol."""

    name: str
    """What the ledger calls it: it determines the attack up to the threat."""
    attack: Attack


@dataclass(frozen=True)
class Protocol:
    """What is tried on every image that is classified correctly."""

    name: str
    members: tuple[Member, ...]


def _attack(name: str) -> Attack | None:
    base, _, suffix = name.partition("-margin")
    objective = "margin" if name.endswith("-margin") and not suffix else "cross_entropy"
    found = _PGD.fullmatch(base)
    if found and int(found[1]) and int(found[2] or 1):
        attack: Attack = PGD(steps=int(found[1]), restarts=int(found[2] or 1))
    elif base == "fgsm":
        attack = FGSM()
    else:
        return None
    OBJECTIVES.check(objective)
    return replace(attack, objective=objective) if not suffix else None


def protocol(name: str, threat: ThreatModel) -> Protocol:
    """The protocol a name such as "pgd-50", "pgd-50x10" or "fgsm,pgd-20-margin" stands for, under `threat`.

    Raises InputError naming the part that is not understood.
    """
    members: list[Member] = []
    for part in (part.strip() for part in name.split(",")):
        attack = _attack(part)
        if attack is None:
            raise InputError(f"protocol has no attack {part!r}; write {GRAMMAR}; for example pgd-50")
        if part in {member.name for member in members}:
            raise InputError(f"protocol names {part!r} twice; once is enough")
        members.append(Member(part, attack.within(threat)))
    return Protocol(name, tuple(members))
