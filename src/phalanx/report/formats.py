"""The first table for a spreadsheet, a paper and a README."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from phalanx.report.lines import headline_lines, legend, remarks
from phalanx.report.page import Page, Row
from phalanx.report.threefold import PARTS
from phalanx.runs.rate import Rate

_FACTS = (
    "model", "method", "architecture", "alpha", "parameters", "active_parameters", "macs",
    "norm", "eps", "protocol", "seed", "weights", "n",
)  # fmt: skip
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: "\\" + character for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "±": r"$\pm$",
    }
)
_MARKDOWN = str.maketrans({character: "\\" + character for character in "\\|*_`<>[]"})


def to_csv(page: Page) -> str:
    """A line for each model: what it is and, of each column, held / n in [0, 1] with its 95 % interval (`_low`,
    `_high`); empty for what was not measured. Where a row has certificates, the shares that are broken, certified and
    undecided at the radius attacked. What a paper printed, in percent, stands under `_reported_percent`."""
    columns = [column.key for column in page.columns]
    reported = [key for key in columns if any(key in row.reported for row in page.rows)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    parts = PARTS if any(row.threefold for row in page.rows) else ()
    measured = [f"{key}{end}" for key in (*columns, *parts) for end in ("", "_low", "_high")]
    writer.writerow([*_FACTS, *measured, *(f"{key}_reported_percent" for key in reported)])
    for row in page.rows:
        rates = {**row.columns, **(row.threefold.rates if row.threefold else {})}
        numbers = [value for key in (*columns, *parts) for value in _numbers(rates.get(key))]
        writer.writerow([*map(_cell, _facts(row)), *numbers, *(row.reported.get(key, "") for key in reported)])
    return table.getvalue()


def _cell(value: object) -> object:
    """`value`, quoted where a spreadsheet would take a text for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _facts(row: Row) -> Iterator[object]:
    counted = (row.counts.active_parameters, row.counts.total_macs) if row.counts else (None, None)
    told = ("norm", "eps", "protocol", "seed", "weights")
    yield from (row.label, row.method, row.architecture, row.alpha, row.parameters, *counted)
    yield from (" ".join(map(str, said)) if isinstance(said := row.measurement[key], list) else said for key in told)
    yield row.n


def _numbers(rate: Rate | None) -> tuple[object, ...]:
    return ("", "", "") if rate is None else (rate.share, *rate.interval)


def to_latex(page: Page) -> str:
    """A tabular environment that needs no package, what its columns are as comments above it."""
    heads = ("Model", *(column.head for column in page.columns))
    lines = [
        *(f"% {_one_line(text)}" for text in _told(page)),
        rf"\begin{{tabular}}{{l{'r' * len(page.columns)}}}",
        r"\hline",
        " & ".join(head.translate(_TEX) for head in heads) + r" \\",
        r"\hline",
        *(_tex_line(cells) for cells in _cells(page)),
        r"\hline",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex_line(cells: Sequence[str]) -> str:
    # after the end of the line before, a bracket would be a length
    return "{}" * cells[0].startswith("[") + " & ".join(cell.translate(_TEX) for cell in cells) + r" \\"


def to_markdown(page: Page) -> str:
    """A table as GitHub and many others draw it, what its columns are below it."""
    heads = ("Model", *(column.head for column in page.columns))
    lines = [
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(page.columns),
        *("| " + " | ".join(_one_line(cell).translate(_MARKDOWN) for cell in cells) + " |" for cells in _cells(page)),
        "",
        *(f"- {_one_line(text).translate(_MARKDOWN)}" for text in _told(page)),
    ]
    return "\n".join(lines) + "\n"


def _cells(page: Page) -> Iterator[tuple[str, ...]]:
    for row in page.rows:
        for number, line in enumerate(own := headline_lines(row, page)):
            label = line.label if number == 0 else ""
            yield (f"{label} ({line.kind})".strip() if len(own) > 1 else label, *line.cells)


def _told(page: Page) -> Iterator[str]:
    yield page.title
    yield from remarks(page)
    yield from (f"{head}: {says}" for head, says in legend(page.columns))
    yield from (f"{notice.kind}: {notice.label}: {notice.text}" for notice in page.notices)


def _one_line(text: str) -> str:
    return " ".join(text.split())
