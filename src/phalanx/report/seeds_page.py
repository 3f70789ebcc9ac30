"""What is shown of a study under several seeds: text, JSON, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from phalanx import __version__
from phalanx.report import threefold_section
from phalanx.report.figures import Plot
from phalanx.report.html import render
from phalanx.report.lines import MEASURED, REPORTED, Line, legend, printed
from phalanx.report.plots import Series, line_plot
from phalanx.report.records import Fields
from phalanx.report.seeds import SeedRow, SeedSweep, SeedTable, Spread
from phalanx.report.sweeps import printed_points
from phalanx.report.table import Table
from phalanx.report.text import aligned, wrapped
from phalanx.report.threats import NOTE, PARTLY, TITLE, of_models
from phalanx.report.threefold import PARTS
from phalanx.report.words import ABSENT, listed, plural, rated
from phalanx.runs.rate import Rate
from phalanx.runs.threats import HOW

SEEDS_SCHEMA = 1
_COLUMNS = 6
"""The terminal shows so many beside each other."""


# -- the first table -----------------------------------------------------------------------------------------------


def seed_lines(row: SeedRow, table: SeedTable) -> list[Line]:
    """What was measured, as mean and deviation; beside a paper's numbers also those and what released attacks say."""
    keys = [column.key for column in table.columns]
    lines = [Line(row.label, MEASURED, tuple(_cell(row.columns.get(key)) for key in keys))]
    if any(key in row.reported for key in keys):
        lines.append(Line(row.label, REPORTED, tuple(printed(row.reported.get(key)) for key in keys)))
    if table.reported_source:
        for name, spreads in row.released.items():
            lines.append(Line(row.label, name, tuple(_cell(spreads.get(key)) for key in keys)))
    return lines


def _cell(spread: Spread | None) -> str:
    return ABSENT if spread is None else spread.text


def _remarks(table: SeedTable) -> Iterator[str]:
    sizes = listed(list(dict.fromkeys(f"{row.n:,}" for row in table.rows)))
    yield (
        f"In percent of all images (n = {sizes}): mean ± sample standard deviation of "
        f"{plural(len(table.seeds), 'seed')} ({', '.join(map(str, table.seeds))}). Every perturbation is judged on the "
        "whole real model."
    )
    if any(row.reported for row in table.rows):
        yield (
            f"Reported: what {table.reported_source or 'the paper'} printed. "
            "Measured: what the runs of these seeds hold."
        )


# -- text ----------------------------------------------------------------------------------------------------------


def seeds_text(table: SeedTable) -> str:
    """The first table, its columns and what to distrust; lines of at most 100 characters."""
    parts = [
        wrapped(table.title),
        *_blocks(table),
        "\n".join(wrapped(f"{key}: {says}", 4) for key, says in legend(table.columns)),
        "\n".join(map(wrapped, _remarks(table))),
        *(f"{found.title}\n\n{aligned(found.head, 'llrrrr', found.lines)}" for found in _threefold(table)),
        "Each attack and each seed by itself are in report.html and table.json.",
        "\n".join(wrapped(f"{notice.kind.upper()}  {notice.label}: {notice.text}", 4) for notice in table.notices),
        "\n".join(wrapped(f"- {caveat}", 2) for caveat in table.caveats),
        "\n".join([f"{TITLE} (none of it in the headline)", "", *_threat_lines(table)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(table: SeedTable) -> Iterator[str]:
    for start in range(0, len(table.columns), _COLUMNS):
        heads = [column.head for column in table.columns[start : start + _COLUMNS]]
        lines: list[tuple[str, ...]] = []
        for row in table.rows:
            own = [(line.kind, line.cells[start : start + _COLUMNS]) for line in seed_lines(row, table)]
            if len(own) == 1:
                lines.append((row.label, *own[0][1]))
            else:
                lines += [(row.label,), *((f"  {kind}", *cells) for kind, cells in own)]
        yield aligned(("model", *heads), "l" + "r" * len(heads), lines)


# -- JSON ----------------------------------------------------------------------------------------------------------


def seeds_json(table: SeedTable) -> dict[str, Any]:
    """The whole table as JSON values: of each number its mean, its deviation, and the counts of each seed."""
    return {
        "schema": SEEDS_SCHEMA,
        "phalanx": __version__,
        "title": table.title,
        "description": table.description,
        "command": table.command,
        "seeds": list(table.seeds),
        "columns": [asdict(column) for column in table.columns],
        "reported_source": table.reported_source,
        "rows": [_row_json(row) for row in table.rows],
        "sweeps": [_sweep_json(sweep, table) for sweep in table.sweeps],
        "notices": [asdict(notice) for notice in table.notices],
        "caveats": list(table.caveats),
    }


def _row_json(row: SeedRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "n": row.n,
        "columns": _spreads_json(row.columns),
        "threefold": _spreads_json(row.threefold) or None,
        "reported": dict(row.reported),
        "released_columns": {name: _spreads_json(spreads) for name, spreads in row.released.items()},
        "attacks": _spreads_json(row.attacks),
        "threats": {threat: [line.values for line in lines] for threat, lines in row.threats.items()},
    }


def _spreads_json(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {key: _spread_json(spread) for key, spread in spreads.items()}


def _spread_json(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    counts = {"held": [rate.held for rate in spread.rates], "n": [rate.n for rate in spread.rates]}
    return {"mean": spread.mean, "deviation": spread.deviation, **counts}


def _sweep_json(sweep: SeedSweep, table: SeedTable) -> dict[str, Any]:
    by_row = zip(table.rows, zip(*sweep.spreads, strict=True), strict=True)
    return {
        "attack": sweep.kind,
        "over": sweep.over,
        "values": list(sweep.values),
        "as_written": list(sweep.names),
        "attacks": list(sweep.attacks),
        "rows": [{"label": row.label, "accuracies": list(map(_spread_json, spreads))} for row, spreads in by_row],
    }


# -- HTML ----------------------------------------------------------------------------------------------------------


def seeds_html(table: SeedTable) -> str:
    """The whole page; the same table gives the same text, byte for byte."""
    return render(
        "seeds.html.j2",
        page=table,
        headline=[seed_lines(row, table) for row in table.rows],
        fact_heads=(),
        facts=[() for _ in table.rows],
        legend=list(legend(table.columns)),
        remarks=list(_remarks(table)),
        sweeps=[_sweep_plot(f"sweep-{number}", sweep, table) for number, sweep in enumerate(table.sweeps)],
        threats=_threats(table),
        tables=[*_threefold(table), _each_seed(table), *([_each_attack(table)] if table.attacks else [])],
    )


def _threats(table: SeedTable) -> Table:
    """What every seed has measured of each threat, and what would measure the rest."""
    lines = []
    for threat in HOW:
        known = [row for row in table.rows if threat in row.threats]
        lines += [(threat, row.label, *_threat_cells(row.threats[threat])) for row in known]
        if unknown := [row.label for row in table.rows if row not in known]:
            lines.append((threat, of_models(unknown, len(table.rows)), "not measured", HOW[threat]))
    return Table(TITLE, NOTE, ("threat", "model", "result", "attacks, or what would measure it"), tuple(lines))


def _threat_cells(lines: Sequence[Fields]) -> tuple[str, str]:
    attacks = dict.fromkeys(str(attack) for line in lines for attack in line.values["attacks"])
    under = f"{listed(list(attacks))}, {lines[0].text('within')}"
    if all(line.values["held"] is not None for line in lines):
        rates = tuple(Rate(line.integer("held"), line.integer("n")) for line in lines)
        return f"RA {Spread(rates).text} %", under
    broken = ", ".join(f"{line.integer('broken'):,} of {line.integer('tried'):,}" for line in lines)
    return f"broke {broken}", under + (PARTLY if lines[0].text("status") == "partly" else "")


def _threat_lines(table: SeedTable) -> Iterator[str]:
    for threat, label, found, says in _threats(table).lines:
        yield wrapped(f"{threat}: {label}: {found}; {says}", 4)


def _threefold(table: SeedTable) -> list[Table]:
    """Of the models that have certificates under every seed; none where there is no such model."""
    certified = [row for row in table.rows if row.threefold]
    lines = [(row.label, row.threat, *(row.threefold[part].text for part in PARTS), f"{row.n:,}") for row in certified]
    note = f"{threefold_section.NOTE} Mean ± deviation over the seeds."
    return [Table(threefold_section.TITLE, note, threefold_section.HEAD, tuple(lines))] if lines else []


def _each_seed(table: SeedTable) -> Table:
    lines = [
        (
            row.label,
            str(seed),
            *(rated(row.columns[c.key].rates[place]) if c.key in row.columns else ABSENT for c in table.columns),
        )
        for row in table.rows
        for place, seed in enumerate(table.seeds)
    ]
    return Table(
        "Each seed by itself",
        "In percent, with the 95 % Wilson interval. Training curves and analysis: the report in each seed's folder.",
        ("model", "seed", *(column.head for column in table.columns)),
        tuple(lines),
    )


def _each_attack(table: SeedTable) -> Table:
    return Table(
        "Each attack by itself",
        "Accuracy in percent, mean ± deviation over the seeds; those outside the threat are in no other number.",
        ("attack", *(row.label for row in table.rows)),
        tuple((label, *(_cell(row.attacks.get(label)) for row in table.rows)) for label in table.attacks),
    )


def _sweep_plot(name: str, sweep: SeedSweep, table: SeedTable) -> Plot:
    shown = [place for place in range(len(table.rows)) if any(spreads[place] for spreads in sweep.spreads)]
    across = "radius" if sweep.over == "eps" else "steps"
    title = f"Robust accuracy by {across}: {sweep.kind}"
    series = [_line(sweep, table.rows[place].label, place) for place in shown]
    points = printed_points(sweep.attacks, len(sweep.values), {row.label: row.reported for row in table.rows})
    return Plot(
        title,
        "Each attack by itself, in percent of all images; the bands are the mean ± the deviation over the seeds."
        + points.note,
        Markup(line_plot(name, series, "accuracy, %", title, across=across, percent=True)),
        (across, *(f"{table.rows[place].label}, %" for place in shown), *points.head),
        tuple(
            (value, *(_cell(spreads[place]) for place in shown), *said)
            for value, spreads, said in zip(sweep.names, sweep.spreads, points.lines, strict=True)
        ),
    )


def _line(sweep: SeedSweep, label: str, row: int) -> Series:
    points = [(v, spread) for v, spreads in zip(sweep.values, sweep.spreads, strict=True) if (spread := spreads[row])]
    means = [100 * spread.mean for _, spread in points]
    deviations = [100 * (spread.deviation or 0.0) for _, spread in points]
    return Series(
        label,
        [value for value, _ in points],
        means,
        row,
        low=[max(0.0, mean - deviation) for mean, deviation in zip(means, deviations, strict=True)],
        high=[min(100.0, mean + deviation) for mean, deviation in zip(means, deviations, strict=True)],
    )
