"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from phalanx.attacks import FGSM, PGD, Attack, JointMargin, ReleasedAPGD, ReleasedPGD, RouteSteering
from phalanx.errors import InputError
from phalanx.runs.summary import aside_attacks
from phalanx.threat import ThreatModel

_STEPS = r"([1-9][0-9]{0,5})"
_COUNT = r"(?:x([1-9][0-9]{0,3}))?"
_PASSES = r"(?:-eot:([1-9][0-9]{0,3}))?"
_SURFACE = r"(?:@([a-z]+(?:-[0-9]+)?))?"
_RADIUS = r"(?::([0-9.]+(?:/[0-9.]+)?))?"
_ROUTING = re.compile(rf"routing-{_STEPS}")
_STEP_SWEEP = re.compile(rf"pgd-{_STEPS}\.\.{_STEPS}")

GRAMMAR = (
    "fgsm[-margin][@SURFACE][:EPS], pgd-STEPS[xRESTARTS][-margin][-eot:PASSES][@SURFACE][:EPS], "
    "steer-STEPS[xCLASSES][:EPS], joint-STEPS[xCLASSES][:EPS], routing-STEPS for every surface that the model has, "
    "fgsm-sweep for fgsm:0.01 to fgsm:0.09, pgd-A..B for pgd-A to pgd-B by tens, pgd-released[-STEPS][@SURFACE] or "
    "apgd-released[-STEPS], joined by commas; brackets hold what may be left out, and EPS is an attack's own radius"
)


@dataclass(frozen=True)
class Member:
    """One attack of a protocol."""

    name: str
    """What the ledger calls it: with the threat, it determines the attack."""
    attack: Attack


@dataclass(frozen=True)
class Protocol:
    """What is tried on every image that is classified correctly."""

    name: str
    members: tuple[Member, ...]

    def aside(self, threat: ThreatModel) -> tuple[str, ...]:
        """The members that have no part in the worst case within `threat`: see `aside_attacks`."""
        return aside_attacks({member.name: member.attack.spec() for member in self.members}, threat.norm, threat.eps)


def _objective(margin: str | None) -> str:
    return "margin" if margin else "cross_entropy"


_Build = Callable[..., Attack]

# a pattern, and what makes an attack of its groups
_KINDS: tuple[tuple[str, _Build], ...] = (
    (
        rf"fgsm(-margin)?{_SURFACE}{_RADIUS}",
        lambda margin, surface, eps: FGSM(objective=_objective(margin), surface=surface or "whole", eps=eps),
    ),
    (
        rf"pgd-{_STEPS}{_COUNT}(-margin)?{_PASSES}{_SURFACE}{_RADIUS}",
        lambda steps, restarts, margin, passes, surface, eps: PGD(
            steps=int(steps),
            restarts=int(restarts or 1),
            objective=_objective(margin),
            eot=int(passes or 1),
            surface=surface or "whole",
            eps=eps,
        ),
    ),
    (
        rf"steer-{_STEPS}{_COUNT}{_RADIUS}",
        lambda steps, classes, eps: RouteSteering(steps=int(steps), classes=int(classes or 0), eps=eps),
    ),
    (
        rf"joint-{_STEPS}{_COUNT}{_RADIUS}",
        lambda steps, classes, eps: JointMargin(steps=int(steps), classes=int(classes or 0), eps=eps),
    ),
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
    """The attacks that a name for several stands for; any other name by itself."""
    if routing := _ROUTING.fullmatch(part):
        return _routing(routing[1], halves)
    if part == "fgsm-sweep":
        return [f"fgsm:0.0{hundredths}" for hundredths in range(1, 10)]
    if sweep := _STEP_SWEEP.fullmatch(part):
        return _step_sweep(part, int(sweep[1]), int(sweep[2]))
    return [part]


def _routing(steps: str, halves: bool) -> list[str]:
    """Every surface of a mixture, with and without the gate's gradient, and route steering; of a dual model also its
    halves, each alone and both at once."""
    pgd = f"pgd-{steps}"
    surfaces = ("pinned", "experts", "router", "dense", *(("standard", "robust") if halves else ()))
    # as many classes as AutoAttack's targeted members aim at
    aimed = [f"steer-{steps}", f"steer-{steps}x9", *([f"joint-{steps}x9"] if halves else [])]
    return [pgd, f"{pgd}-margin@pinned", *(f"{pgd}@{surface}" for surface in surfaces), *aimed]


def _step_sweep(part: str, first: int, last: int) -> list[str]:
    if first % 10 or last % 10 or first >= last:
        raise InputError(
            f"protocol part {part!r} must go up from one multiple of 10 to another; write for example pgd-10..50"
        )
    return [f"pgd-{steps}" for steps in range(first, last + 1, 10)]


def protocol(name: str, threat: ThreatModel, *, halves: bool = False) -> Protocol:
    """The protocol that a name such as "pgd-50", "pgd-50x10@experts", "fgsm:4/255,steer-20" or "routing-50" stands for.

    `halves` says that it is for a dual model, whose halves are then among the surfaces of "routing-STEPS". A radius in
    a member's name is in the threat's norm, and may be larger than the threat's: see `aside_attacks`.

    Raises InputError naming the part that is not understood, and where every member stands aside: reproductions, and
    attacks outside the threat.
    """
    written = [part.strip() for part in name.split(",")]
    for part in written:
        if written.count(part) > 1:
            raise InputError(f"protocol names {part!r} twice; once is enough")
    # two names for several attacks may share some
    parts = dict.fromkeys(itertools.chain.from_iterable(_expanded(part, halves) for part in written))
    attacks = {part: _attack(part, threat) for part in parts}
    if all(attack.reproduction for attack in attacks.values()):
        raise InputError(
            f"protocol {name!r} holds reproductions of published attacks only, which says nothing about robustness; "
            "add pgd-50"
        )
    found = Protocol(name, tuple(Member(part, attack) for part, attack in attacks.items()))
    if len(found.aside(threat)) == len(attacks):
        raise InputError(
            f"protocol {name!r} holds no attack within the threat {threat}, so it says nothing about it; add pgd-50"
        )
    return found
