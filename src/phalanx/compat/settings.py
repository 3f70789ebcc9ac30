"""The settings of AutoAttack's members under the reference's names, and the attacks they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from phalanx.attacks import APGD, FAB, APGDTargeted, Attack, Square
from phalanx.errors import InputError
from phalanx.evaluation import Member
from phalanx.threat import ThreatModel


@dataclass
class _Settings:
    """Assigning to what is not a setting is an error: the reference would take it in silence."""

    def __setattr__(self, name: str, value: object) -> None:
        known = [setting.name for setting in fields(self)]
        if name not in known:
            raise InputError(
                f"{type(self).__name__} has no {name!r}, only {', '.join(known)}; remove the line that sets it"
            )
        object.__setattr__(self, name, value)


@dataclass
class APGDSettings(_Settings):
    """Of "apgd-ce" and "apgd-dlr"."""

    n_iter: int = 100
    n_restarts: int = 5
    eot_iter: int = 1


@dataclass
class APGDTargetedSettings(_Settings):
    """Of "apgd-t"."""

    n_iter: int = 100
    n_restarts: int = 1
    n_target_classes: int = 9
    eot_iter: int = 1


@dataclass
class FABSettings(_Settings):
    """Of "fab" and "fab-t", which has one restart whatever is set."""

    n_iter: int = 100
    n_restarts: int = 5
    n_target_classes: int = 9


@dataclass
class SquareSettings(_Settings):
    """Of "square"."""

    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8


@dataclass
class Settings:
    """Of every member; the defaults are those of the version "custom"."""

    apgd: APGDSettings = field(default_factory=APGDSettings)
    apgd_targeted: APGDTargetedSettings = field(default_factory=APGDTargetedSettings)
    fab: FABSettings = field(default_factory=FABSettings)
    square: SquareSettings = field(default_factory=SquareSettings)

    def adopt(self, attacks: Iterable[Attack]) -> list[str]:
        """Sets what makes these attacks, and returns the reference's names for them."""
        return [self._adopt(attack) for attack in attacks]

    def _adopt(self, attack: Attack) -> str:
        match attack:
            case APGD():
                self.apgd = APGDSettings(attack.steps, attack.restarts, attack.eot)
                return "apgd-dlr" if attack.objective == "dlr" else "apgd-ce"
            case APGDTargeted():
                self.apgd_targeted = APGDTargetedSettings(attack.steps, attack.restarts, attack.targets, attack.eot)
                return "apgd-t"
            case FAB(targets=0):
                self.fab.n_iter, self.fab.n_restarts = attack.steps, attack.restarts
                return "fab"
            case FAB():
                self.fab.n_iter, self.fab.n_target_classes = attack.steps, attack.targets
                return "fab-t"
            case Square():
                self.square = SquareSettings(attack.queries, attack.restarts, attack.p_init)
                return "square"
            case _:
                raise TypeError(f"AutoAttack has no member {type(attack).__name__}")

    def attack(self, name: str) -> Attack:
        """The attack that the reference calls so. Raises InputError listing the names there are."""
        apgd, targeted, fab, square = self.apgd, self.apgd_targeted, self.fab, self.square
        match name:
            case "apgd-ce" | "apgd-dlr":
                objective = "cross_entropy" if name == "apgd-ce" else "dlr"
                return APGD(steps=apgd.n_iter, restarts=apgd.n_restarts, eot=apgd.eot_iter, objective=objective)
            case "apgd-t":
                return APGDTargeted(
                    steps=targeted.n_iter,
                    restarts=targeted.n_restarts,
                    targets=targeted.n_target_classes,
                    eot=targeted.eot_iter,
                )
            case "fab":
                return FAB(steps=fab.n_iter, restarts=fab.n_restarts, targets=0)
            case "fab-t":
                return FAB(steps=fab.n_iter, targets=fab.n_target_classes)
            case "square":
                return Square(queries=square.n_queries, restarts=square.n_restarts, p_init=square.p_init)
            case _:
                raise InputError(
                    f"attacks_to_run can name apgd-ce, apgd-dlr, apgd-t, fab, fab-t and square, got {name!r}"
                )

    def members(self, names: Sequence[str], threat: ThreatModel) -> tuple[Member, ...]:
        """The attacks as a cascade, each named as a protocol names it: random numbers follow from the name, so that
        `phalanx evaluate` with that protocol gives the same verdicts. Raises InputError for a setting that does not
        fit."""
        members: list[Member] = []
        for name in names:
            try:
                attack = self.attack(name).within(threat)
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}: {error}") from None
            members.append(Member(protocol_name(attack), attack, tuple(member.name for member in members)))
        return tuple(members)


def protocol_name(attack: Attack) -> str:
    """The part of a protocol that stands for an attack of AutoAttack."""
    restarts = getattr(attack, "restarts", 1)
    runs = f"x{restarts}" if restarts > 1 else ""
    eot = getattr(attack, "eot", 1)
    passes = f"-eot:{eot}" if eot > 1 else ""
    match attack:
        case APGD():
            return f"apgd{'-dlr' if attack.objective == 'dlr' else ''}-{attack.steps}{runs}{passes}"
        case APGDTargeted():
            return f"apgd-t-{attack.steps}x{attack.targets}{runs}{passes}"
        case FAB(targets=0):
            return f"fab-{attack.steps}{runs}"
        case FAB():
            return f"fab-t-{attack.steps}x{attack.targets}"
        case Square():
            return f"square-{attack.queries}{runs}"
        case _:
            raise TypeError(f"AutoAttack has no member {type(attack).__name__}")
