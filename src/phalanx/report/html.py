"""The page: one HTML file with everything in it, that loads nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from phalanx import __version__
from phalanx.report.attribution_tables import attribution_tables
from phalanx.report.figures import history, intervals, tradeoff_plot
from phalanx.report.honesty_tables import honesty_table
from phalanx.report.lines import headline_lines, legend, remarks
from phalanx.report.page import Page, Row
from phalanx.report.queries_section import query_plot, targeted_table, targeted_tables
from phalanx.report.rate import Rate
from phalanx.report.sections import Table, across_rows, of_row, outside_table, released_table
from phalanx.report.sweeps import sweep_plot
from phalanx.report.threats import challenges_table, threats_table
from phalanx.report.words import bounds, percent, plural, shown
from phalanx.runs.canonical import JSON

_LOOSE = re.compile(r"(?<=Linf) (?=\d)|(?<=L[12]) (?=\d)|(?<=\d) (?=%)|(?<=%) (?=\[)|(?<=\d,) (?=[\d.]+\])")


@dataclass(frozen=True)
class GridLine:
    """One key and its value in each column."""

    key: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True)
class Grid:
    """Values by key, side by side."""

    head: tuple[str, ...]
    lines: tuple[GridLine, ...]


def render_html(page: Page) -> str:
    """The whole page; the same page gives the same text, byte for byte."""
    drawn = [attack for sweep in page.sweeps for attack in sweep.attacks]
    labels = tuple(row.label for row in page.rows)
    return render(
        "page.html.j2",
        page=page,
        headline=[headline_lines(row, page) for row in page.rows],
        legend=list(legend(page.columns)),
        remarks=list(remarks(page)),
        released=released_table(page),
        outside=outside_table(page, without=drawn),
        queries=query_plot(page),
        targeted=targeted_table(page),
        intervals=intervals(page),
        tradeoffs=[tradeoff_plot(f"alpha-{number}", page, tradeoff) for number, tradeoff in enumerate(page.tradeoffs)],
        sweeps=[sweep_plot(f"sweep-{number}", page, sweep) for number, sweep in enumerate(page.sweeps)],
        histories=[(row, history(f"run-{number}", row)) for number, row in enumerate(page.rows) if row.view is None],
        challenges=challenges_table(page),
        threats=threats_table(page),
        across=across_rows(page),
        honesty=[table for row in page.rows if (table := honesty_table(row)) is not None],
        analyses=[(row, tables) for row in page.rows if (tables := _of_row(row))],
        attacks=_grid([attack.label for attack in page.attacks], [attack.spec for attack in page.attacks]),
        released_attacks=_grid([attack.label for attack in page.released], [attack.spec for attack in page.released]),
        outside_attacks=_grid([attack.label for attack in page.outside], [attack.spec for attack in page.outside]),
        data=_grid(labels, [row.data for row in page.rows]),
        measurements=_grid(labels, [row.measurement for row in page.rows]),
        environments=_grid(labels, [row.environment for row in page.rows]),
        settings=_grid(labels, [row.settings for row in page.rows]),
    )


def _of_row(row: Row) -> list[Table]:
    return [*of_row(row), *attribution_tables(row.attribution), *targeted_tables(row)]


def render(template: str, **values: Any) -> str:
    """A page from its template."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "bounds": bounds,
        "plural": plural,
        "unbroken": _unbroken,
        "rate": lambda attack: Rate(attack.held, attack.n),
    }
    return environment.get_template(template).render(version=__version__, **values)


def _template(name: str) -> str:
    return (resources.files("phalanx.report") / "templates" / name).read_text(encoding="utf-8")


def _unbroken(text: str) -> str:
    """The text with every number kept on one line with its unit and its interval."""
    return _LOOSE.sub("\N{NO-BREAK SPACE}", text)


# -- values side by side -------------------------------------------------------------------------------------------


def _grid(head: Sequence[str], columns: Sequence[Mapping[str, JSON]]) -> Grid:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Grid(
        tuple(head),
        tuple(GridLine(key, tuple(shown(column.get(key)) for column in columns)) for key in keys),
    )
