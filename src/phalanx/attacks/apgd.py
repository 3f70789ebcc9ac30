"""Auto-PGD, untargeted and targeted: the gradient members of AutoAttack."""

# A samples given to the search

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

from torch import Tensor

from phalanx.attacks.autopgd import MakePace, MomentumPace, walk
from phalanx.attacks.autopgd_l1 import SparsePace, phases
from phalanx.attacks.base import Attack
from phalanx.attacks.objectives import fallback
from phalanx.attacks.pgd import averaged
from phalanx.attacks.target import Climb, Target, wrong_classes
from phalanx.attacks.tracker import Found, Tracker
from phalanx.rng import SampleRng

TARGETED_OBJECTIVES = ("dlr_targeted", "margin", "cross_entropy")


@dataclass(frozen=True, kw_only=True)
class _AutoPGD(Attack):
    """What both share: runs of Auto-PGD from random starts, each on the samples that none before has broken."""

    name: str
    steps: int = 100
    """Gradient steps of a run; in L1, where it comes from larger balls, of all its phases together."""
    restarts: int = 1
    """Runs from independent random starts, each on the samples still standing."""
    eot: int = 1
    """Passes that objective, gradient and logits are averaged over at every point, as in `PGD`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("steps", "restarts", "eot"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @abstractmethod
    def _aims(self, target: Target) -> Iterator[Target]:
        """What is climbed, one after the other; the samples of each are all."""

    def for_classes(self, num_classes: int) -> Self:
        """This attack with the objective that it really climbs on a model of so many classes: for a ledger's spec.

        Verdicts are the same. A DLR that has too few classes is the margin.
        """
        return replace(self, objective=fallback(self.objective, num_classes))

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        tracker = Tracker(target, keep="best", early_drop=target.judged)
        runs = (aim for aim in self._aims(target) for _ in range(self.restarts))
        for attempt, aim in enumerate(runs):
            rows = tracker.rows
            if not len(rows):
                break
            self._run(tracker, aim if len(rows) == len(aim) else aim[rows], rng[rows], attempt)
        return tracker.found

    def _run(self, tracker: Tracker, aim: Target, rng: SampleRng, attempt: int) -> None:
        sparse, done = self.threat.norm == "L1", 0
        start: Tensor | None = None
        for factor, steps in phases(self.steps) if sparse else [(1, self.steps)]:
            ball = replace(self.threat, eps=factor * self.threat.epsilon) if factor > 1 else self.threat
            fresh = start is None
            start = ball.random_start(aim.x, rng, restart=attempt) if start is None else ball.project(start, aim.x)
            pace_from: MakePace = partial(MomentumPace, ball, aim.x, steps)
            if sparse:
                pace_from = partial(SparsePace, ball, aim.x, steps, fresh=fresh)
            watch = _Watch(tracker, self.eot, attempt, attempt * self.steps + done, steps, counts=factor == 1)
            start = walk(aim, start, steps, pace_from, watch.evaluate, watch.observe).x_adv
            done += steps


@dataclass(frozen=True)
class _Watch:
    """Reports a walk of so many `steps` to the tracker."""

    tracker: Tracker
    eot: int
    attempt: int
    steps_before: int
    steps: int
    counts: bool
    """The walk is inside the threat's ball: an error there is a success."""

    def evaluate(self, aim: Target, x_adv: Tensor, last: bool) -> Climb:
        self.tracker.found.queries[self.tracker.rows] += self.eot - 1 if self.counts else self.eot
        return averaged(aim.look if last else aim.climb, x_adv, self.eot)

    def observe(self, aim: Target, x_adv: Tensor, climb: Climb, step: int) -> Tensor | None:
        if not self.counts:
            return None
        return self.tracker.observe(
            x_adv,
            climb,
            aim,
            restart=self.attempt,
            step=step,
            steps_before=self.steps_before,
            final=step == self.steps,
        )


@dataclass(frozen=True, kw_only=True)
class APGD(_AutoPGD):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): momentum, a step length that follows from how the search fares, and a
    return to the best point whenever it is shortened.

    In L1 the sparse steps of Croce & Hein 2021, Algorithm 1, coming from balls three and two times as large. Each run
    starts uniformly at random in the ball. Of AutoAttack "apgd-ce", and with objective "dlr" its "apgd-dlr".
    """

    name: Literal["apgd"] = "apgd"

    @property
    def gradient_steps(self) -> int:
        return self.steps * self.restarts

    def _aims(self, target: Target) -> Iterator[Target]:
        yield target


@dataclass(frozen=True, kw_only=True)
class APGDTargeted(_AutoPGD):
    """APGD towards the most likely wrong classes of the clean image, one after the other (Croce & Hein 2020, sec. 4).

    Any wrong answer counts as broken. Of AutoAttack "apgd-t".
    """

    name: Literal["apgd_t"] = "apgd_t"
    objective: str = "dlr_targeted"
    """What is lowered: "dlr_targeted", which on a model of fewer than 4 classes is the margin, "margin" or
    "cross_entropy"."""
    targets: int = 9
    """Classes aimed at, at most all that are wrong."""

    def __post_init__(self) -> None:
        self._check_fixed("targeted APGD", targeted=False)
        super().__post_init__()
        if self.objective not in TARGETED_OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(TARGETED_OBJECTIVES)}, got {self.objective!r}")
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")

    @property
    def reads_clean_pass(self) -> bool:
        return True

    @property
    def reads_clean_logits(self) -> bool:
        return True

    @property
    def gradient_steps(self) -> int:
        return self.steps * self.restarts * self.targets

    def for_classes(self, num_classes: int) -> Self:
        """Also with the number of targets that there are."""
        return replace(super().for_classes(num_classes), targets=max(min(self.targets, num_classes - 1), 1))

    def _aims(self, target: Target) -> Iterator[Target]:
        for wanted in wrong_classes(target, self.targets):
            yield replace(target, wanted=wanted)
