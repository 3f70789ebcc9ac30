"""An evaluation protocol is a list of named attacks; its name says their budgets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from phalanx.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    APGDTargeted,
    Attack,
    CarliniWagner,
    ExpertTransfer,
    HopSkipJump,
    JointMargin,
    RayS,
    ReleasedAdvMoE,
    ReleasedAPGD,
    ReleasedPGD,
    RouteSteering,
    Square,
)
from phalanx.attacks.autoattack import VERSIONS
from phalanx.errors import InputError
from phalanx.evaluation.corruptions import PART as CORRUPTIONS_PART
from phalanx.evaluation.suites import SUITES, Parts
from phalanx.rng import SampleRng, derive_seed
from phalanx.runs.summary import aside_attacks
from phalanx.threat import Norm, ThreatModel

_STEPS = r"([1-9][0-9]{0,5})"
_COUNT = r"(?:x([1-9][0-9]{0,3}))?"
_TARGETS = r"x([1-9][0-9]{0,3})"
_PASSES = r"(?:-eot:([1-9][0-9]{0,3}))?"
_SURFACE = r"(?:@(straight-through|[a-z]+(?:-t?[0-9.]+)?))?"
_RADIUS = r"(?::([0-9.]+(?:/[0-9.]+)?))?"
_ROUTING = re.compile(rf"routing-{_STEPS}")
_STEP_SWEEP = re.compile(rf"pgd-{_STEPS}\.\.{_STEPS}")

GRAMMAR = (
    "standard, plus or rand for AutoAttack, thorough or quick for what the model has to be tried with, "
    "fgsm[-margin][@SURFACE][:EPS], pgd-STEPS[xRESTARTS][-margin][-eot:PASSES][@SURFACE][:EPS], "
    "apgd[-dlr or -margin]-STEPS[xRESTARTS][-eot:PASSES][@SURFACE][:EPS], "
    "apgd-t-STEPSxTARGETS[-eot:PASSES][@SURFACE][:EPS], "
    "fab-STEPS[xRESTARTS][@SURFACE][:EPS], fab-t-STEPSxTARGETS[@SURFACE][:EPS], "
    "square-QUERIES[xRESTARTS][@SURFACE][:EPS], rays-QUERIES[:EPS], hsj-QUERIES[:EPS], "
    "cw-STEPS[xSEARCHES][@SURFACE][:EPS], "
    "steer[-apgd]-STEPS[xCLASSES][:EPS], experts-apgd-STEPS[:EPS], joint[-apgd]-STEPS[xCLASSES][:EPS], "
    "mislead-STEPS[:EPS], "
    "routing-STEPS for every surface that the model has, "
    "fgsm-sweep for fgsm:0.01 to fgsm:0.09, pgd-A..B for pgd-A to pgd-B by tens, pgd-released[-STEPS][@SURFACE], "
    "apgd-released[-STEPS] or pgd-released-advmoe[-STEPS], joined by commas; corruptions besides these, for accuracy "
    "under noise, blur and the like; brackets hold what may be left out, and "
    "EPS is an attack's own radius"
)


@dataclass(frozen=True)
class Member:
    """One attack of a protocol."""

    name: str
    """What the ledger calls it: with the threat, it determines the attack."""
    attack: Attack
    after: tuple[str, ...] = ()
    """Earlier members of its cascade: only an image that held against all of them is attacked."""

    def streams(self, seed: int, ids: Tensor) -> SampleRng:
        """The random numbers of images (B,). They belong to the attack's name: adding a member to a protocol changes no
        other member's verdicts."""
        return SampleRng(derive_seed(seed, self.name), ids)


@dataclass(frozen=True)
class Protocol:
    """What is tried on every image that is classified correctly, or on those that a cascade has left standing."""

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
        rf"apgd(?:-(dlr|margin))?-{_STEPS}{_COUNT}{_PASSES}{_SURFACE}{_RADIUS}",
        lambda objective, steps, restarts, passes, surface, eps: APGD(
            steps=int(steps),
            restarts=int(restarts or 1),
            objective=objective or "cross_entropy",
            eot=int(passes or 1),
            surface=surface or "whole",
            eps=eps,
        ),
    ),
    (
        rf"apgd-t-{_STEPS}{_TARGETS}{_PASSES}{_SURFACE}{_RADIUS}",
        lambda steps, targets, passes, surface, eps: APGDTargeted(
            steps=int(steps), targets=int(targets), eot=int(passes or 1), surface=surface or "whole", eps=eps
        ),
    ),
    (
        rf"fab-{_STEPS}{_COUNT}{_SURFACE}{_RADIUS}",
        lambda steps, restarts, surface, eps: FAB(
            steps=int(steps), restarts=int(restarts or 1), targets=0, surface=surface or "whole", eps=eps
        ),
    ),
    (
        rf"fab-t-{_STEPS}{_TARGETS}{_SURFACE}{_RADIUS}",
        lambda steps, targets, surface, eps: FAB(
            steps=int(steps), targets=int(targets), surface=surface or "whole", eps=eps
        ),
    ),
    (
        rf"square-{_STEPS}{_COUNT}{_SURFACE}{_RADIUS}",
        lambda queries, restarts, surface, eps: Square(
            queries=int(queries), restarts=int(restarts or 1), surface=surface or "whole", eps=eps
        ),
    ),
    (rf"rays-{_STEPS}{_RADIUS}", lambda queries, eps: RayS(queries=int(queries), eps=eps)),
    (rf"hsj-{_STEPS}{_RADIUS}", lambda queries, eps: HopSkipJump(queries=int(queries), eps=eps)),
    (
        rf"cw-{_STEPS}{_COUNT}{_SURFACE}{_RADIUS}",
        lambda steps, searches, surface, eps: CarliniWagner(
            steps=int(steps), searches=int(searches) if searches else None, surface=surface or "whole", eps=eps
        ),
    ),
    (
        rf"steer-{_STEPS}{_COUNT}{_RADIUS}",
        lambda steps, classes, eps: RouteSteering(steps=int(steps), classes=int(classes or 0), eps=eps),
    ),
    (
        rf"steer-apgd-{_STEPS}{_COUNT}{_RADIUS}",
        lambda steps, classes, eps: RouteSteering(
            steps=int(steps), classes=int(classes or 0), search_rule="apgd", combine=True, eps=eps
        ),
    ),
    (rf"experts-apgd-{_STEPS}{_RADIUS}", lambda steps, eps: ExpertTransfer(steps=int(steps), eps=eps)),
    (
        rf"joint(-apgd)?-{_STEPS}{_COUNT}{_RADIUS}",
        lambda apgd, steps, classes, eps: JointMargin(
            steps=int(steps), classes=int(classes or 0), search_rule="apgd" if apgd else "pgd", eps=eps
        ),
    ),
    (
        rf"mislead-{_STEPS}{_RADIUS}",
        lambda steps, eps: PGD(steps=int(steps), objective="mislead", surface="mixing", eps=eps),
    ),
    (
        rf"pgd-released(?:-{_STEPS})?{_SURFACE}",
        lambda steps, surface: ReleasedPGD(steps=int(steps or 50), surface=surface or "whole"),
    ),
    (rf"apgd-released(?:-{_STEPS})?", lambda steps: ReleasedAPGD(steps=int(steps or 10))),
    (rf"pgd-released-advmoe(?:-{_STEPS})?", lambda steps: ReleasedAdvMoE(steps=int(steps or 10))),
)


def _attack(name: str, threat: ThreatModel) -> Attack:
    for pattern, build in _KINDS:
        if found := re.fullmatch(pattern, name):
            try:
                return build(*found.groups()).within(threat)
            except ValueError as error:
                raise InputError(f"protocol part {name!r}: {error}") from None
    raise InputError(f"protocol has no attack {name!r}; write {GRAMMAR}; for example pgd-50")


def _expanded(part: str, norm: Norm, parts: Parts) -> list[str]:
    """The attacks that a name for several stands for; any other name by itself."""
    if part in VERSIONS:
        return list(VERSIONS[part][norm])
    if part in SUITES:
        return SUITES[part](norm, parts)
    if routing := _ROUTING.fullmatch(part):
        return _routing(routing[1], parts.halves, parts.mixing)
    if part == "fgsm-sweep":
        return [f"fgsm:0.0{hundredths}" for hundredths in range(1, 10)]
    if sweep := _STEP_SWEEP.fullmatch(part):
        return _step_sweep(part, int(sweep[1]), int(sweep[2]))
    return [part]


def _routing(steps: str, halves: bool, mixing: bool) -> list[str]:
    """Every surface of a mixture, with and without the gate's gradient, and route steering; of a dual model also its
    halves, each alone and both at once, and what misleads its mixing network."""
    pgd = f"pgd-{steps}"
    surfaces = ("pinned", "experts", "router", "dense", "dense-t0.1", *(("standard", "robust") if halves else ()))
    # as many classes as AutoAttack's targeted members aim at
    aimed = [f"steer-{steps}", f"steer-{steps}x9", *([f"joint-{steps}x9"] if halves else [])]
    aimed += [f"mislead-{steps}"] if mixing else []
    return [pgd, f"{pgd}-margin@pinned", *(f"{pgd}@{surface}" for surface in surfaces), *aimed]


def _step_sweep(part: str, first: int, last: int) -> list[str]:
    if first % 10 or last % 10 or first >= last:
        raise InputError(
            f"protocol part {part!r} must go up from one multiple of 10 to another; write for example pgd-10..50"
        )
    return [f"pgd-{steps}" for steps in range(first, last + 1, 10)]


def _after(part: str, groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The members before it in its cascade; of several that it is in, those that are before it in each: what one of
    them wants attacked is attacked. A part that is asked for outside a cascade attacks everything."""
    cascades = {*VERSIONS, *SUITES}
    before = [group[: group.index(part)] if name in cascades else [] for name, group in groups.items() if part in group]
    return tuple(earlier for earlier in before[0] if all(earlier in others for others in before))


def protocol(
    name: str,
    threat: ThreatModel,
    *,
    gates: bool = True,
    halves: bool = False,
    mixing: bool = False,
    random: bool = False,
) -> Protocol:
    """The protocol that a name such as "pgd-50", "pgd-50x10@experts", "fgsm:4/255,steer-20", "routing-50" or "standard"
    stands for. The members of "standard", "plus" and "rand" are a cascade, in AutoAttack's order, and so are those of
    "thorough" and "quick".

    What "thorough", "quick" and "routing-STEPS" hold depends on the model: see `Parts`. A radius in a member's name is
    in the threat's norm, and may be larger than the threat's: see `aside_attacks`.

    Raises InputError naming the part that is not understood, and where every member stands aside: reproductions, and
    attacks outside the threat.
    """
    written = [part.strip() for part in name.split(",")]
    for part in written:
        if written.count(part) > 1:
            raise InputError(f"protocol names {part!r} twice; once is enough")
    # no attack: `phalanx.evaluation.corruptions` measures it besides
    if CORRUPTIONS_PART in written:
        written.remove(CORRUPTIONS_PART)
    if not written:
        raise InputError("protocol 'corruptions' alone holds no attack; add one, as in quick,corruptions")
    # two names for several attacks may share some
    parts = Parts(gates=gates, halves=halves, mixing=mixing, random=random)
    groups = {part: _expanded(part, threat.norm, parts) for part in written}
    attacks = {part: _attack(part, threat) for part in itertools.chain.from_iterable(groups.values())}
    if all(attack.reproduction for attack in attacks.values()):
        raise InputError(
            f"protocol {name!r} holds reproductions of published attacks only, which says nothing about robustness; "
            "add pgd-50"
        )
    found = Protocol(name, tuple(Member(part, attack, _after(part, groups)) for part, attack in attacks.items()))
    if len(found.aside(threat)) == len(attacks):
        raise InputError(
            f"protocol {name!r} holds no attack within the threat {threat}, so it says nothing about it; add pgd-50"
        )
    return found
