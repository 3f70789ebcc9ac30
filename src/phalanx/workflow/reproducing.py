"""A paper's table: the rows of a study it shows, with what the paper printed beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from phalanx.config import load_reproduction, shipped_recipes
from phalanx.errors import InputError
from phalanx.workflow.studies import Plan, plan

Scale = Literal["digits", "reduced", "full"]
"""Real digits in minutes on a CPU; the paper's data with narrow networks and few epochs; the paper's own size."""


@dataclass(frozen=True)
class Reproduction:
    """What `phalanx run NAME` or `phalanx reproduce NAME --scale SCALE` will make."""

    plan: Plan
    """The study, or the part of it that a paper's table needs, with its title and description."""
    study: str
    """The study's recipe: tables of one paper share its runs."""
    command: str
    """What makes it, without the settings of the command line."""
    report_in: Path = Path()
    """Where the report goes, in the study's folder."""
    reported: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By row label and column or swept attack, in percent, as the paper printed them."""
    source: str = ""
    """Where they were printed, and under what setting."""

    def folder(self, out: Path | None) -> Path:
        """Where the study's runs go."""
        return out or Path("runs") / self.study


def whole_study(name: str, overrides: tuple[str, ...] = ()) -> Reproduction:
    """Every row of a study or recipe, as it is. Raises as `plan`."""
    return Reproduction(plan(name, overrides), Path(name).stem, f"phalanx run {name}")


def reproduction(name: str, scale: str, overrides: tuple[str, ...] = ()) -> Reproduction:
    """The table `name`, such as "dual/table3", at a scale.

    Raises InputError for an unknown name or scale, and for a scale that the table's study does not come in.
    """
    if scale not in get_args(Scale):
        raise InputError(f"--scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    table = load_reproduction(name).value
    study = f"{table.study}-{scale}"
    sizes = [size for size in get_args(Scale) if f"{table.study}-{size}" in shipped_recipes()]
    if scale not in sizes:
        raise InputError(f"{name} cannot be made at --scale {scale}, only at {' or '.join(sizes)}; give one of those")
    whole = plan(study, overrides)
    part = whole.only(table.rows)
    sized = Plan(
        title=f"{table.title} ({scale} scale)",
        description=" ".join(filter(None, (table.description, whole.description))),
        runs=part.runs,
        views=part.views,
        rows=part.rows,
        sources=part.sources,
    )
    reported = {part.label(row): dict(printed) for row, printed in table.rows.items() if printed}
    return Reproduction(
        plan=sized,
        study=study,
        command=f"phalanx reproduce {name} --scale {scale}",
        report_in=Path("tables") / name.replace("/", "-"),
        reported=reported,
        source=table.source,
    )
