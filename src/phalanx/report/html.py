"""The page: one HTML file with everything in it, that loads nothing and runs nothing but its own sorting."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from phalanx import __version__
from phalanx.report.attribution_tables import attribution_tables
from phalanx.report.certificates import certificates_table
from phalanx.report.corruptions import corruptions_table
from phalanx.report.figures import Plot, history, intervals, tradeoff_plot
from phalanx.report.gallery import Card, card, chosen, side
from phalanx.report.grouping import grouped
from phalanx.report.honesty_tables import honesty_matrix, honesty_table
from phalanx.report.lines import headline_lines, legend, remarks
from phalanx.report.opening import headlines, opening
from phalanx.report.page import Page, Row
from phalanx.report.page_plots import of_row_plots, radius_plot, validation_plot
from phalanx.report.printed import printed_table
from phalanx.report.queries_section import query_plot, targeted_table, targeted_tables
from phalanx.report.sections import across_rows, of_row, outside_table, released_table
from phalanx.report.smoothed import smoothed_table
from phalanx.report.sweeps import sweep_plot
from phalanx.report.table import Table
from phalanx.report.threats import challenges_table, threats_table
from phalanx.report.threefold_section import threefold_table
from phalanx.report.words import ABSENT, bounds, percent, plural, shown
from phalanx.runs.canonical import JSON
from phalanx.runs.rate import Rate

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


_DRAWN_ROWS = 16
"""Of more rows the analysis shows tables alone: the page stays below 2 MB."""
FACTS = ("method", "parameters", "active", "MACs")
"""Columns of the first table that are no accuracies; active parameters and MACs as in the table of counts."""


def render_html(page: Page) -> str:
    """The whole page; the same page gives the same text, byte for byte."""
    labels = tuple(row.label for row in page.rows)
    galleries = _galleries(page)
    honesty = [(row, table) for row in page.rows if (table := honesty_table(row)) is not None]
    return render(
        "page.html.j2",
        page=page,
        opening=opening(page),
        headlines=headlines(page),
        contents=_contents(honesty=bool(honesty), gallery=bool(galleries)),
        headline=[headline_lines(row, page) for row in page.rows],
        fact_heads=FACTS,
        facts=[_facts(row) for row in page.rows],
        legend=list(legend(page.columns)),
        remarks=list(remarks(page)),
        released=released_table(page),
        outside=outside_table(page, without=[attack for sweep in page.sweeps for attack in sweep.attacks]),
        targeted=targeted_table(page),
        intervals=intervals(page),
        curves=_curves(page),
        validations=validation_plot(page),
        histories=[(row, history(f"run-{number}", row)) for number, row in enumerate(page.rows) if row.view is None],
        challenges=challenges_table(page),
        certified=certificates_table(
            [(row.label, str(row.measurement["eps"]), row.worst, row.certificates) for row in page.rows]
        ),
        threefold=threefold_table(page),
        printed=printed_table([(row.label, row.printed) for row in page.rows]),
        smoothed=smoothed_table([(row.label, row.smoothed) for row in page.rows]),
        corruptions=corruptions_table([(row.label, row.corruptions) for row in page.rows]),
        threats=threats_table(page),
        across=across_rows(page),
        matrix=honesty_matrix(page.rows),
        honesty=honesty,
        galleries=galleries,
        analyses=_analyses(page),
        attacks=_grid([attack.label for attack in page.attacks], [attack.spec for attack in page.attacks]),
        released_attacks=_grid([attack.label for attack in page.released], [attack.spec for attack in page.released]),
        outside_attacks=_grid([attack.label for attack in page.outside], [attack.spec for attack in page.outside]),
        data=_grid(labels, [row.data for row in page.rows]),
        measurements=_grid(labels, [row.measurement for row in page.rows]),
        environments=_grid(labels, [row.environment for row in page.rows]),
        settings=_grid(labels, [row.settings for row in page.rows]),
    )


def _contents(*, honesty: bool, gallery: bool) -> list[tuple[str, str]]:
    """Places on the page and their names."""
    return [
        ("distrust", "What to distrust"),
        ("results", "Results"),
        *([("honesty", "Honesty checks")] if honesty else []),
        *([("gallery", "Gallery")] if gallery else []),
        ("training", "Training"),
        ("analysis", "Analysis"),
        ("attacks", "Attacks and budgets"),
        ("evaluation", "Evaluation"),
        ("data", "Data"),
        ("settings", "Settings"),
        ("environment", "Environment"),
        ("reproduce", "How to reproduce"),
        ("threats", "Threat coverage"),
    ]


def _facts(row: Row) -> tuple[str, ...]:
    counts = row.counts
    active, macs = (f"{counts.active_parameters:,}", f"{counts.total_macs:,}") if counts else (ABSENT, ABSENT)
    return row.method, f"{row.parameters:,}", active, macs


def _curves(page: Page) -> list[Plot]:
    """Accuracy against alpha, radius, steps and queries."""
    tradeoffs = [tradeoff_plot(f"alpha-{number}", page, tradeoff) for number, tradeoff in enumerate(page.tradeoffs)]
    sweeps = [sweep_plot(f"sweep-{number}", page, sweep) for number, sweep in enumerate(page.sweeps)]
    return [*tradeoffs, *sweeps, *filter(None, (query_plot(page), radius_plot(page)))]


def _galleries(page: Page) -> list[tuple[Row, list[Card]]]:
    kept = [(row, row.gallery) for row in page.rows if row.gallery is not None and row.gallery.images]
    size = side(len(page.rows), [gallery for _, gallery in kept])
    return [
        (row, [card(gallery, one, row.class_names, size) for one in chosen(gallery, len(page.rows))])
        for row, gallery in kept
    ]


def _analyses(page: Page) -> list[tuple[Row, list[Plot], list[Table]]]:
    drawn = len(page.rows) <= _DRAWN_ROWS
    found = [
        (row, of_row_plots(f"row-{number}", row) if drawn else [], _tables(row)) for number, row in enumerate(page.rows)
    ]
    return [(row, plots, tables) for row, plots, tables in found if plots or tables]


def _tables(row: Row) -> list[Table]:
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
        "grouped": grouped,
        "rate": lambda attack: Rate(attack.held, attack.n),
    }
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template)
    return page.render(version=__version__, script=Markup(script), script_sha256=digest, **values)


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
