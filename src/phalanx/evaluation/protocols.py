"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phalanx.attacks import FGSM, PGD, Attack
from phalanx.errors import InputError
from phalanx.threat import ThreatModel

_ATTACK = re.compile(r"(?:fgsm|pgd-([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,3}))?)(-margin)?")

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
    found = _ATTACK.fullmatch(name)
    if found is None:
        return None
    steps, restarts, margin = found.groups()
    objective = "margin" if margin else "cross_entropy"
    if steps is None:
        return FGSM(objective=objective)
    return PGD(steps=int(steps), restarts=int(restarts or 1), objective=objective)


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
