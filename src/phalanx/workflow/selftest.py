"""The self-test: models with a known flaw, each shown to fool a plain attack and to be caught by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from phalanx.attacks import Attack
from phalanx.errors import InputError
from phalanx.evaluation import Evaluation, Protocol, evaluate, protocol
from phalanx.evaluation.checks import PROBABILITIES
from phalanx.evaluation.honesty import Probe, look
from phalanx.evaluation.honesty import suite as honesty_suite
from phalanx.evaluation.honesty.finding import TROUBLE
from phalanx.evaluation.honesty.planted import CornerPGD, Planted, fragile, hard_routing, images
from phalanx.evaluation.protocols import Member
from phalanx.report.text import aligned

SELFTEST_SCHEMA = 1
STEPS = 20
FOOLED = 0.9
"""A plain attack that reads at least this is fooled: in truth nothing holds."""
HELD = 0.05
"""An attack that reads at most this has found the flaw."""


@dataclass(frozen=True)
class Case:
    """A planted flaw."""

    name: str
    make: Callable[[], Planted]
    plain: str
    """The attack that it fools: a protocol, judged as by a script that counts right answers."""
    checks: tuple[str, ...]
    """Ids of the honesty checks that have to object."""
    attack: str = ""
    """The protocol that has to read nothing, judged by Phalanx; empty where a check is all that can tell."""
    search: Attack | None = None
    """The plain attack, where no protocol names it."""


CASES: tuple[Case, ...] = (
    Case("hard routing", hard_routing, "standard", ("M6", "E16"), f"routing-{STEPS}"),
    Case("masked gradients", lambda: fragile("saturated"), f"pgd-{STEPS}", ("M5", "M7")),
    Case("not a number", lambda: fragile("not finite"), f"pgd-{STEPS}", ("M5",), f"pgd-{STEPS}"),
    Case("batch-dependent", lambda: fragile("capacity"), f"pgd-{STEPS}", ("M3",)),
    Case(
        "broken start",
        lambda: fragile("dead corner"),
        f"pgd-{STEPS}, corner start",
        ("E9",),
        f"pgd-{STEPS}",
        CornerPGD(steps=STEPS),
    ),
    Case("probabilities", lambda: fragile("probabilities"), f"pgd-{STEPS}", ("M4",)),
    Case("quantised input", lambda: fragile("quantised"), f"pgd-{STEPS}", ("M8", "E10", "E15")),
)


@dataclass(frozen=True)
class CaseResult:
    """What became of one case."""

    name: str
    plain: str
    reading: float
    """The robust accuracy that the plain attack reads, in [0, 1]."""
    truth: float
    """What is left under the perturbation that the flaw was planted for, each image by itself."""
    caught_by: tuple[str, ...]
    missed_by: tuple[str, ...]
    """Checks and attacks that should have caught it."""
    seconds: float

    @property
    def passed(self) -> bool:
        """The flaw is there, the plain attack is fooled, and everything that has to catch the flaw does."""
        return self.truth <= HELD and self.reading >= FOOLED and not self.missed_by

    @property
    def verdict(self) -> str:
        if self.missed_by:
            return f"MISSED by {', '.join(self.missed_by)}"
        return "caught" if self.passed else "plain attack not fooled"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "plain_attack": self.plain,
            "plain_reading": self.reading,
            "truth": self.truth,
            "caught_by": list(self.caught_by),
            "missed_by": list(self.missed_by),
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found."""

    cases: tuple[CaseResult, ...] = field(default=())

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the cases that went wrong."""
        return tuple(case.name for case in self.cases if not case.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": SELFTEST_SCHEMA, "cases": [case.to_json() for case in self.cases]}

    def text(self) -> str:
        """A table for the terminal."""
        lines = [
            (
                case.name,
                case.plain,
                f"{case.reading:.0%}",
                f"{case.truth:.0%}",
                ", ".join(case.caught_by) or "nothing",
                case.verdict,
            )
            for case in self.cases
        ]
        head = ("planted flaw", "plain attack", "it reads", "in truth", "caught by", "verdict")
        return aligned(head, "llrrll", lines)


def selftest(cases: Sequence[Case] = CASES, progress: Callable[[int, int, str], None] | None = None) -> SelfTest:
    """Plants every flaw, and tries to find it. Writes nothing, downloads nothing."""
    found = []
    for number, case in enumerate(cases):
        found.append(_tried(case))
        if progress is not None:
            progress(number + 1, len(cases), case.name)
    return SelfTest(tuple(found))


def _tried(case: Case) -> CaseResult:
    started, planted = time.monotonic(), case.make()
    plain = _plain_protocol(case, planted)
    reading = _read_plainly(planted, plain)
    caught: list[str] = []
    missed: list[str] = []
    for name, objects in _catchers(case, planted, plain):
        (caught if objects else missed).append(name)
    seconds = time.monotonic() - started
    return CaseResult(case.name, case.plain, reading, planted.truth(), tuple(caught), tuple(missed), seconds)


def _plain_protocol(case: Case, planted: Planted) -> Protocol:
    if case.search is None:
        return protocol(case.plain, planted.threat)
    return Protocol(case.plain, (Member(case.plain, planted.own(case.search)),))


@torch.no_grad()
def _read_plainly(planted: Planted, plain: Protocol) -> float:
    """The accuracy left by each attack in turn, by an argmax over one batch: how a plain script counts."""
    batch = planted.batch
    right = planted.model(batch.x).argmax(-1) == batch.y
    for member in plain.members:
        x_adv = member.attack.search(planted.model, batch.x, batch.y, rng=member.streams(0, batch.ids)).x_adv
        right &= planted.model(x_adv).argmax(-1) == batch.y
    return float(right.double().mean())


def _catchers(case: Case, planted: Planted, plain: Protocol) -> Iterator[tuple[str, bool]]:
    """Everything that has to catch the flaw, and whether it does."""
    found = _evaluated(planted, plain)
    probe = Probe(model=planted.model, batch=planted.batch, evaluation=found, protocol=plain)
    named = [check for check in honesty_suite.CHECKS if check.id in case.checks]
    for result in look(probe, named):
        yield result.id, result.status in TROUBLE
    if case.attack:
        yield case.attack, _evaluated(planted, protocol(case.attack, planted.threat)).robust_acc <= HELD


def _evaluated(planted: Planted, tried: Protocol) -> Evaluation:
    try:
        return evaluate(planted.model, images(), tried, planted.threat)
    except InputError:
        # it looks as if it answered with probabilities: only the one that does
        return evaluate(planted.model, images(), tried, planted.threat, allow=[PROBABILITIES])
