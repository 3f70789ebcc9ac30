"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from phalanx.attacks import FGSM, PGD, SURFACES, Attack, RouteSteering
from phalanx.errors import InputError
from phalanx.threat import ThreatModel

_STEPS = r"([1-9][0-9]{0,5})"
_COUNT = r"(?:x([1-9][0-9]{0,3}))?"
_ATTACK = re.compile(rf"(?:fgsm|pgd-{_STEPS}{_COUNT})(-margin)?(?:@([a-z]+(?:-[0-9]+)?))?")
_STEERING = re.compile(rf"steer-{_STEPS}{_COUNT}")
_ROUTING = re.compile(rf"routing-{_STEPS}")

GRAMMAR = (
    "fgsm, pgd-STEPS or pgd-STEPSxRESTARTS, each with -margin for the margin objective and @SURFACE for a part of the "
    "model, steer-STEPS or steer-STEPSxCLASSES, or routing-STEPS for all of a mixture's surfaces, joined by commas"
)


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
    if steering := _STEERING.fullmatch(name):
        return RouteSteering(steps=int(steering[1]), classes=int(steering[2] or 0))
    found = _ATTACK.fullmatch(name)
    if found is None:
        return None
    steps, restarts, margin, surface = found.groups()
    objective, surface = "margin" if margin else "cross_entropy", surface or "whole"
    try:
        SURFACES.check(surface)
    except ValueError as error:
        raise InputError(f"protocol part {name!r}: {error}") from None
    if steps is None:
        return FGSM(objective=objective, surface=surface)
    return PGD(steps=int(steps), restarts=int(restarts or 1), objective=objective, surface=surface)


def _expanded(part: str) -> list[str]:
    """ "routing-50" is every surface of a mixture, with and without the gate's gradient, and route steering."""
    routing = _ROUTING.fullmatch(part)
    if routing is None:
        return [part]
    pgd = f"pgd-{routing[1]}"
    surfaces = ("pinned", "experts", "router", "dense")
    return [pgd, f"{pgd}-margin@pinned", *(f"{pgd}@{surface}" for surface in surfaces), f"steer-{routing[1]}"]


def protocol(name: str, threat: ThreatModel) -> Protocol:
    """The protocol that a name such as "pgd-50", "pgd-50x10@experts", "fgsm,steer-20" or "routing-50" stands for.

    Raises InputError naming the part that is not understood.
    """
    members: list[Member] = []
    parts = itertools.chain.from_iterable(_expanded(part.strip()) for part in name.split(","))
    for part in parts:
        attack = _attack(part)
        if attack is None:
            raise InputError(f"protocol has no attack {part!r}; write {GRAMMAR}; for example pgd-50")
        if part in {member.name for member in members}:
            raise InputError(f"protocol names {part!r} twice; once is enough")
        members.append(Member(part, attack.within(threat)))
    return Protocol(name, tuple(members))
