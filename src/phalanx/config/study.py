"""The configuration of a study: runs, what is made of them without training, and a paper's table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from phalanx.config.parts import Mix, TwoHalves, check_alpha, check_keep


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    recipe: str
    """The recipe it is made by."""
    set: tuple[str, ...] = ()
    """Settings that differ from the recipe's, each as after `--set`: "model.experts=3"."""


@dataclass(frozen=True, kw_only=True)
class DualView(TwoHalves):
    """The dual model of two runs."""

    name: Literal["dual"] = "dual"
    alpha: float | Literal["picked"] = "picked"
    """Weight of the robust half, in [0, 1]; "picked" takes the smallest one at which the dual model must keep the share
    `keep` of what its robust half holds on the validation split (see `pick_alpha`)."""
    keep: float = 0.985
    """Share of the robust half's answers to keep, where alpha is picked."""
    mix: Mix = "probabilities"
    """What is mixed; "logits" only to reproduce released code."""
    label: str = ""
    """The row's name; by default "dual" and its alpha."""

    def __post_init__(self) -> None:
        if self.alpha != "picked":
            check_alpha(self.alpha)
        super().__post_init__()
        check_keep(self.keep)

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"dual, alpha {self.alpha}"


@dataclass(frozen=True, kw_only=True)
class NutsView(TwoHalves):
    """MixedNUTS of two runs: the robust half's logits mapped and mixed with the standard half's bare choice; the map
    and alpha are searched for on the validation split (see `MixedNUTS`)."""

    name: Literal["mixed_nuts"] = "mixed_nuts"
    keep: float = 0.985
    """Share of the robust half's answers to keep."""
    label: str = ""
    """The row's name; by default "MixedNUTS"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or "MixedNUTS"


@dataclass(frozen=True, kw_only=True)
class EnsembleView:
    """Runs averaged with equal weights: an ensemble without a gate."""

    name: Literal["ensemble"] = "ensemble"
    runs: tuple[str, ...]
    """Runs of the study, at least two."""
    mix: Mix = "probabilities"
    """What is averaged."""
    label: str = ""
    """The row's name; by default "ensemble of" their number."""

    def __post_init__(self) -> None:
        if len(set(self.runs)) < max(2, len(self.runs)):
            raise ValueError(f"runs must be two different runs or more, got {', '.join(self.runs) or 'none'}")

    @property
    def made_of(self) -> Mapping[str, str]:
        """The runs it joins, by what they become; the last one says how it is measured."""
        return {f"member {number}": run for number, run in enumerate(self.runs)}

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"ensemble of {len(self.runs)}"


@dataclass(frozen=True, kw_only=True)
class GateView:
    """A mixture's experts under another gate: what is its own gate worth?"""

    name: Literal["gate"] = "gate"
    run: str
    """A run of the study, a mixture."""
    gate: Literal["uniform", "random"] = "uniform"
    """All experts with equal weight, or one chosen by an untrained linear router."""
    label: str = ""
    """The row's name; by default the run and the gate."""

    @property
    def made_of(self) -> Mapping[str, str]:
        """The run that it looks at."""
        return {"": self.run}

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or f"{self.run}, {self.gate} gate"


AnyView = Annotated[DualView | NutsView | EnsembleView | GateView, Field(discriminator="name")]
"""Models made of runs, evaluated as rows of their own; nothing is trained and no weights are written."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Several runs, and views of them, that make one table."""

    title: str = ""
    """Heading of the report."""
    description: str = ""
    """What the study asks, in a sentence or two."""
    set: tuple[str, ...] = ()
    """Settings of every run, each as after `--set`; a run's own come after them, those of the command line last."""
    runs: Mapping[str, StudyRun] = field(default_factory=dict)
    """What is trained: a folder name and how it is made."""
    views: Mapping[str, AnyView] = field(default_factory=dict)
    """Rows that are made of runs without training: dual models, ensembles, other gates."""
    rows: tuple[str, ...] = ()
    """Names of runs and views in the table's order; by default all runs, then all views."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, for example {at: {recipe: digits-at}}")
        for name, view in self.views.items():
            if name in self.runs:
                raise ValueError(f"views: {name!r} names a run already; rename one")
            for run in view.made_of.values():
                if run not in self.runs:
                    raise ValueError(f"views.{name}: {run!r} is no run of the study; it has {', '.join(self.runs)}")
        for row in self.rows:
            if row not in self.runs and row not in self.views:
                raise ValueError(f"rows: {row!r} is neither a run nor a view of the study")


@dataclass(frozen=True, kw_only=True)
class ReproductionConfig:
    """One table or figure of a paper: which rows of a study it shows, and what the paper printed for each."""

    title: str
    """What the table is."""
    description: str = ""
    """What it asks, and what to know before comparing."""
    source: str
    """The paper, and the setting its numbers were measured in."""
    study: str
    """The study's recipe at scale S is STUDY-S."""
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rows of the study in the table's order, and under each the printed percentages by column (SA, RA, RA-E, ...), or
    by attack of a curve (fgsm:0.03, pgd-20)."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows must name at least one row of the study")
