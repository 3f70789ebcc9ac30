"""A paper's table: the rows of a study it shows, with what the paper printed beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from phalanx.config import load_reproduction
from phalanx.errors import InputError
from phalanx.workflow.studies import Plan, plan

Scale = Literal["digits", "reduced", "full"]
"""Real digits in minutes on a CPU; the paper's data with narrow networks and few epochs; the paper's own size."""


@dataclass(frozen=True)
class Reproduction:
    """What `phalanx reproduce NAME --scale SCALE` will make."""

    plan: Plan
    """The part of the study that the table needs, with its title and description."""
    reported: Mapping[str, Mapping[str, float]]
    """By row label and column, in percent, as the paper printed them."""
    source: str
    """Where they were printed, and under what setting."""
    study: str
    """The study's recipe: tables of one paper share its runs."""

    def folder(self, out: Path | None) -> Path:
        """Where the study's runs go."""
        return out or Path("runs") / self.study


def reproduction(name: str, scale: str, overrides: tuple[str, ...] = ()) -> Reproduction:
    """The table `name`, such as "dual/table3", at a scale. Raises InputError for an unknown name or scale."""
    if scale not in get_args(Scale):
        raise InputError(f"--scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    table = load_reproduction(name).value
    study = f"{table.study}-{scale}"
    whole = plan(study, overrides)
    part = whole.only(table.rows)
    sized = Plan(
        title=f"{table.title} ({scale} scale)",
        description=" ".join(filter(None, (table.description, whole.description))),
        runs=part.runs,
        views=part.views,
        rows=part.rows,
    )
    reported = {part.label(row): dict(printed) for row, printed in table.rows.items() if printed}
    return Reproduction(sized, reported, table.source, study)
