"""What a report says, as plain values: made once from the folders, read by every output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phalanx.runs import AttackSummary, wilson
from phalanx.runs.canonical import JSON


@dataclass(frozen=True)
class Rate:
    """A share of images, never without how many they were."""

    held: int
    n: int

    @property
    def share(self) -> float:
        """held / n, in [0, 1]."""
        return self.held / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share, in [0, 1]."""
        return wilson(self.held, self.n)


@dataclass(frozen=True)
class Attack:
    """One attack with its whole budget: a column of the table. Rows share it only if their budgets are the same."""

    label: str
    """Unique on the page: the name in the ledger, and where needed what tells it from its namesakes."""
    name: str
    surface: str
    norm: str
    eps: str
    """Radius in pixel units of [0, 1], as it was written."""
    spec: Mapping[str, JSON]
    """As the ledger declares it, without the seed, which may differ from row to row."""

    @property
    def threat(self) -> str:
        """For example "Linf 8/255"."""
        return f"{self.norm} {self.eps}"


@dataclass(frozen=True)
class TrainPoint:
    """An epoch of training; None where a number was not logged, or not finite."""

    epoch: int
    loss: float | None
    accuracy: float | None
    """Share of the images right as the method trained on them, attacked ones attacked."""
    load: tuple[float, ...] | None
    """Share of the epoch's images that each expert got; None without a router."""
    lr: float | None
    zero_gradient: float | None
    """Share of the images on which the training attack's first gradient was exactly zero."""


@dataclass(frozen=True)
class ValidationPoint:
    """A measurement on the validation split."""

    epoch: int
    clean: Rate
    robust: Rate


@dataclass(frozen=True)
class Curves:
    """How a run went, by epoch; both may be empty."""

    train: tuple[TrainPoint, ...]
    validation: tuple[ValidationPoint, ...]
    validation_attack: str
    """What the validation's robust accuracy was measured under."""

    @property
    def load(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(epoch, share of each expert), where it was logged."""
        return tuple((point.epoch, point.load) for point in self.train if point.load is not None)


@dataclass(frozen=True)
class Row:
    """One run and one evaluation of it."""

    label: str
    status: str
    """Of the training run: finished, running, diverged or interrupted."""
    method: str
    expert: str
    """The experts' architecture."""
    experts: int
    top_k: int | str
    parameters: int
    seed: int
    weights: str | None
    """"best" or "last"; None where the evaluation did not end."""
    clean: Rate
    clean_invalid: int
    """Clean images with a non-finite answer."""
    attacks: tuple[AttackSummary | None, ...]
    """In the order of the page's attacks; None for one that this row was not to face."""
    worst: Rate | None
    """Right on clean input and held against everything; an image not tried by all of them does not count as held.
    None if there was no attack."""
    load: tuple[float, ...] | None
    """Share of the clean images that each expert answers; None without a router."""
    curves: Curves
    settings: Mapping[str, JSON]
    """The resolved recipe by dotted key."""
    data: Mapping[str, JSON]
    measurement: Mapping[str, JSON]
    """How the evaluation was run: protocol, images, seed, hashes, wall time."""
    environment: Mapping[str, JSON]
    """Versions and hardware, of training and of evaluation, by dotted key."""

    @property
    def n(self) -> int:
        """Images evaluated."""
        return self.clean.n

    @property
    def largest_load(self) -> float | None:
        """The share of the clean images that the busiest expert answers."""
        return max(self.load) if self.load else None

    @property
    def invalid(self) -> int:
        """Non-finite answers, clean and over all attacks."""
        return self.clean_invalid + sum(attack.invalid for attack in self.attacks if attack)


NoticeKind = Literal["alarm", "invalid", "incomplete"]


@dataclass(frozen=True)
class Notice:
    """Something that a reader must see before believing a row."""

    kind: NoticeKind
    label: str
    """The row's."""
    text: str


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    description: str
    command: str
    """What makes this report again."""
    attacks: tuple[Attack, ...]
    """The columns, in the rows' order."""
    rows: tuple[Row, ...]
    """At least one."""
    notices: tuple[Notice, ...]
    summary: tuple[str, ...]
    """What was found, in sentences."""
    caveats: tuple[str, ...]
    """What to distrust, in sentences."""
