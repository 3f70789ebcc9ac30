"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from phalanx.attacks import FGSM, PGD, Attack, JointMargin, ReleasedAPGD, ReleasedPGD, RouteSteering
from phalanx.errors import InputError
from phalanx.threat import ThreatModel

_STEPS = r"([1-9][0-9]{0,5})"
_COUNT = r"(?:x([1-9][0-9]{0,3}))?"
_SURFACE = r"(?:@([a-z]+(?:-[0-9]+)?))?"
_ROUTING = re.compile(rf"routing-{_STEPS}")

GRAMMAR = (
    "fgsm[-margin][@SURFACE], pgd-STEPS[xRESTARTS][-margin][@SURFACE], steer-STEPS[xCLASSES], joint-STEPS[xCLASSES], "
    "routing-STEPS for every surface that the model has, pgd-released[-STEPS][@SURFACE] or apgd-released[-STEPS], "
    "joined by commas; brackets hold what may be left out"
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


def _objective(margin: str | None) -> str:
    return "margin" if margin else "cross_entropy"


_Build = Callable[..., Attack]

# a pattern, and what makes an attack of its groups
_KINDS: tuple[tuple[str, _Build], ...] = (
    (
        rf"fgsm(-margin)?{_SURFACE}",
        lambda margin, surface: FGSM(objective=_objective(margin), surface=surface or "whole"),
    ),
    (
        rf"pgd-{_STEPS}{_COUNT}(-margin)?{_SURFACE}",
        lambda steps, restarts, margin, surface: PGD(
            steps=int(steps), restarts=int(restarts or 1), objective=_objective(margin), surface=surface or "whole"
        ),
    ),
    (rf"steer-{_STEPS}{_COUNT}", lambda steps, classes: RouteSteering(steps=int(steps), classes=int(classes or 0))),
    (rf"joint-{_STEPS}{_COUNT}", lambda steps, classes: JointMargin(steps=int(steps), classes=int(classes or 0))),
    (
        rf"pgd-released(?:-{_STEPS})?{_SURFACE}",
        lambda steps, surface: ReleasedPGD(steps=int(steps or 50), surface=surface or "whole"),
    ),
    (rf"apgd-released(?:-{_STEPS})?", lambda steps: ReleasedAPGD(steps=int(steps or 10))),
)


def _attack(name: str, threat: ThreatModel) -> Attack:
    for pattern, build in _KINDS:
        if found := re.fullmatch(pattern, name):
            try:
                return build(*found.groups()).within(threat)
            except ValueError as error:
                raise InputError(f"protocol part {name!r}: {error}") from None
    raise InputError(f"protocol has no attack {name!r}; write {GRAMMAR}; for example pgd-50")


def _expanded(part: str, halves: bool) -> list[str]:
    """ "routing-50" is every surface of a mixture, with and without the gate's gradient, and route steering; of a dual
    model also its halves, each alone and both at once."""
    routing = _ROUTING.fullmatch(part)
    if routing is None:
        return [part]
    steps = routing[1]
    pgd = f"pgd-{steps}"
    surfaces = ("pinned", "experts", "router", "dense", *(("standard", "robust") if halves else ()))
    # as many classes as AutoAttack's targeted members aim at
    aimed = [f"steer-{steps}", f"steer-{steps}x9", *([f"joint-{steps}x9"] if halves else [])]
    return [pgd, f"{pgd}-margin@pinned", *(f"{pgd}@{surface}" for surface in surfaces), *aimed]


def protocol(name: str, threat: ThreatModel, *, halves: bool = False) -> Protocol:
    """The protocol that a name such as "pgd-50", "pgd-50x10@experts", "fgsm,steer-20" or "routing-50" stands for.

    `halves` says that it is for a dual model, whose halves are then among the surfaces of "routing-STEPS".

    Raises InputError naming the part that is not understood, and for a protocol of reproductions alone.
    """
    members: list[Member] = []
    parts = itertools.chain.from_iterable(_expanded(part.strip(), halves) for part in name.split(","))
    for part in parts:
        attack = _attack(part, threat)
        if part in {member.name for member in members}:
            raise InputError(f"protocol names {part!r} twice; once is enough")
        members.append(Member(part, attack))
    if all(member.attack.reproduction for member in members):
        raise InputError(
            f"protocol {name!r} holds reproductions of published attacks only, which says nothing about robustness; "
            "add pgd-50"
        )
    return Protocol(name, tuple(members))
