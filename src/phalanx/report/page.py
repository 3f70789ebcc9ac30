"""What a report says, as plain values: made once from the folders, read by every output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phalanx.report.analysis import Analysis, MarginChange
from phalanx.report.attribution import Attribution
from phalanx.report.certificates import Certificates
from phalanx.report.corruptions import Corruptions
from phalanx.report.counts import Counts
from phalanx.report.curves import Curves
from phalanx.report.gallery import Gallery
from phalanx.report.headline import WORST, Column
from phalanx.report.honesty import Honesty
from phalanx.report.mixture import Mixture
from phalanx.report.printed import PrintedLine
from phalanx.report.queries import QueryCurves, Targeted
from phalanx.report.reach import Reach
from phalanx.report.smoothed import SmoothedRow
from phalanx.report.threefold import Threefold
from phalanx.runs import AttackSummary
from phalanx.runs.canonical import JSON
from phalanx.runs.headline import Challenge
from phalanx.runs.rate import Rate
from phalanx.runs.threats import Coverage

UNTRAINED = "none"
"""The method of a run of no epochs: its weights came with it."""
FOREIGN = "foreign"
"""The view of a model that was made elsewhere."""


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
class ClassRates:
    """The images of one class."""

    name: str
    clean: Rate
    worst: Rate | None
    """None if there was no attack."""


@dataclass(frozen=True)
class Row:
    """One run, or a dual model put together from two, and one evaluation of it."""

    label: str
    status: str
    """Of the training run: finished, running, diverged or interrupted; of two, that of the one that is not finished."""
    method: str
    """Of training, or `UNTRAINED`; for a model that is put together from runs its kind."""
    view: str | None
    """The kind of a model that is put together from runs, with no training of its own: "dual", "mixed_nuts",
    "ensemble" or "gate"; `FOREIGN`; None for a run as it is."""
    gate: str | None
    """The gate that a mixture's experts were put behind."""
    mixtures: tuple[Mixture, ...]
    """One, or a dual model's standard and robust half."""
    alpha: float | None
    """Weight of a dual model's robust half; None for another, and where the evaluation of a view did not end."""
    parameters: int
    counts: Counts | None
    """None where they were not counted."""
    reach: Reach | None
    """None where no route is proved."""
    seed: int
    weights: str | None
    """"best" or "last"; None where the evaluation did not end."""
    clean: Rate
    clean_invalid: int
    """Clean images with a non-finite answer."""
    attacks: tuple[AttackSummary | None, ...]
    """In the order of the page's attacks; None for one that this row was not to face."""
    columns: Mapping[str, Rate | None]
    """Of the first table, by `Column.key`; None for what was not measured."""
    released: tuple[AttackSummary | None, ...]
    """In the order of the page's released attacks; they have no part in `worst` and `columns`."""
    released_columns: Mapping[str, Mapping[str, Rate | None]]
    """What each released attack, named without its surface, says in the columns of the first table."""
    outside: tuple[AttackSummary | None, ...]
    """In the order of the page's attacks outside the threat; they have no part in `worst` and `columns` either."""
    challenges: tuple[Challenge, ...]
    """Images that somebody submitted: of all numbers, they have a part in `worst` alone."""
    unchallenged: Rate | None
    """What `worst` would be without them."""
    threats: tuple[Coverage, ...]
    """The threat-coverage table."""
    reported: Mapping[str, float]
    """What a paper printed, in percent, by `Column.key`, or by the name of an attack that is part of a curve."""
    class_names: tuple[str, ...]
    """Of every class of the data, by label."""
    classes: tuple[ClassRates, ...]
    """Of the classes that were evaluated."""
    load: tuple[float, ...] | None
    """Share of the clean images that each expert answers; None without a router."""
    analysis: Analysis | None
    attribution: Attribution | None
    queries: QueryCurves | None
    targeted: Targeted | None
    honesty: Honesty | None
    """None where the evaluation did not end, or is older than the checks."""
    gallery: Gallery | None
    """None where no image was kept."""
    corruptions: Corruptions | None
    """None where accuracy under them was not asked for."""
    certificates: tuple[Certificates, ...]
    """Of this very model."""
    printed: tuple[PrintedLine, ...]
    """What the printed theorems claim of it, attacked."""
    threefold: Threefold | None
    """None where no certificate is of the threat that it was attacked within."""
    smoothed: tuple[SmoothedRow, ...]
    """Of the classifiers that it makes when it is averaged over noise."""
    curves: Curves
    """Empty for a dual model put together from two runs."""
    settings: Mapping[str, JSON]
    """The resolved recipe by dotted key; of both halves under "standard." and "robust."."""
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
    def worst(self) -> Rate | None:
        """Right on clean input and held against everything; an image not tried by all of them does not count as held.
        None if there was no attack."""
        return self.columns[WORST]

    @property
    def is_dual(self) -> bool:
        """Whether it has a standard and a robust half."""
        return len(self.mixtures) > 1 and self.view != "ensemble"

    @property
    def is_view(self) -> bool:
        """Whether it is put together from runs, with no training of its own."""
        return self.view is not None and not self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """Whether it was made elsewhere."""
        return self.view == FOREIGN

    @property
    def has_router(self) -> bool:
        return any(mixture.experts > 1 for mixture in self.mixtures)

    @property
    def architecture(self) -> str:
        """For example "4 x mlp, top-1", or of a dual model "dual 0.7: " and both halves, the standard one first."""
        if self.is_foreign:
            return "made elsewhere"
        if self.view == "ensemble":
            counted = Counter(mixture.text for mixture in self.mixtures)
            return "mean of " + " + ".join(f"{count} x ({text})" for text, count in counted.items())
        text = " + ".join(mixture.text for mixture in self.mixtures)
        if self.gate is not None:
            return f"{self.gate} gate: {text}"
        if not self.is_dual:
            return text
        kind = "MixedNUTS" if self.view == "mixed_nuts" else "dual"
        return f"{kind}: {text}" if self.alpha is None else f"{kind} {self.alpha:.6g}: {text}"

    @property
    def largest_load(self) -> float | None:
        """The share of the clean images that the busiest expert answers."""
        return max(self.load) if self.load else None

    @property
    def invalid(self) -> int:
        """Non-finite answers, clean and over all attacks."""
        return self.clean_invalid + sum(attack.invalid for attack in self.attacks if attack)


@dataclass(frozen=True)
class Tradeoff:
    """Dual models of the same two runs, which differ in alpha alone."""

    standard: str
    """The runs' names."""
    robust: str
    rows: tuple[int, ...]
    """Places on the page, by increasing alpha; at least two."""


@dataclass(frozen=True)
class MarginComparison:
    """What training a dual model changed in the margins of one put together from two runs, at the same alpha."""

    trained: str
    """The rows' labels."""
    view: str
    alpha: float
    attack: str
    classes: tuple[str, ...]
    clean: tuple[MarginChange | None, ...]
    """By class; None for one without images."""
    attacked: tuple[MarginChange | None, ...]


Swept = Literal["eps", "steps"]


@dataclass(frozen=True)
class Sweep:
    """Attacks that differ in one number alone."""

    over: Swept
    attacks: tuple[Attack, ...]
    """By increasing value; some may lie outside the threat."""
    values: tuple[float, ...]
    """Radii in pixel units of [0, 1], or steps; increasing, each once."""
    names: tuple[str, ...]
    """The values as they were written."""
    rates: tuple[tuple[Rate | None, ...], ...]
    """By value and row; None for an attack that the row did not face, or that did not end."""


NoticeKind = Literal["fail", "alarm", "invalid", "incomplete", "warn"]
"""The gravest first: a "fail" says that the headline is worth nothing."""


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
    columns: tuple[Column, ...]
    """Of the first table."""
    attacks: tuple[Attack, ...]
    """The columns of the table of single attacks, in the rows' order."""
    released: tuple[Attack, ...]
    """Attacks of papers as released, defective: shown beside the worst case, never in it."""
    outside: tuple[Attack, ...]
    """Attacks of another norm or a larger radius than the threat: never in the worst case either."""
    rows: tuple[Row, ...]
    """At least one."""
    reported_source: str
    """Where the rows' `reported` numbers were printed; empty if there are none."""
    sweeps: tuple[Sweep, ...]
    tradeoffs: tuple[Tradeoff, ...]
    margin_comparisons: tuple[MarginComparison, ...]
    notices: tuple[Notice, ...]
    summary: tuple[str, ...]
    """What was found, in sentences."""
    caveats: tuple[str, ...]
    """What to distrust, in sentences."""
