"""The results as plain text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from phalanx import __version__
from phalanx.report.analysis import MarginChange
from phalanx.report.lines import headline_lines, legend, remarks
from phalanx.report.page import Attack, MarginComparison, Page, Row, Sweep
from phalanx.report.printed import printed_json
from phalanx.report.sections import outside_table, released_table
from phalanx.report.sweeps import kind
from phalanx.report.text import aligned, wrapped
from phalanx.report.threats import challenges_table, threats_text
from phalanx.report.threefold_section import threefold_table
from phalanx.report.words import ABSENT, bounds, percent, plural
from phalanx.runs import AttackSummary
from phalanx.runs.rate import Rate

TABLE_SCHEMA = 1

_TOLD_ROWS = 3
"""Of more rows, the terminal does not print every attack."""
_COUNTED = ("broken", "invalid", "timeout", "spared", "untried", "routed", "flipped")
# so that all columns and a label of 14 characters fit beside each other
_STACKED = {
    "RA-RMoE": "RA-\nRMoE",
    "RA-SMoE": "RA-\nSMoE",
    "steering": "steer-\ning",
    "AutoAttack": "Auto-\nAttack",
}


# -- text ----------------------------------------------------------------------------------------------------------


def terminal_table(page: Page) -> str:
    """Results, models, and under them whatever must be known before believing them; lines of at most 100 characters.

    The papers' columns and the worst case first; of up to 3 rows then every attack with its n and 95 % Wilson interval.
    """
    parts = [
        wrapped(page.title),
        _headline(page),
        "\n".join(_legend(page)),
        *_attack_by_attack(page),
        *_challenges(page),
        *_threefold(page),
        aligned(
            ("model", "method", "architecture", "parameters", "largest load"),
            "lllrr",
            [_model_line(row) for row in page.rows],
        ),
        "\n".join(wrapped(f"{notice.kind.upper()}  {notice.label}: {notice.text}", 4) for notice in page.notices),
        "\n".join(wrapped(f"- {caveat}", 2) for caveat in page.caveats),
        threats_text(page),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(page: Page) -> str:
    """One line a row; where something stands beside what was measured, the row's label above its lines."""
    heads = tuple(_STACKED.get(column.head, column.head) for column in page.columns)
    lines: list[tuple[str, ...]] = []
    for row in page.rows:
        own = headline_lines(row, page)
        if len(own) == 1:
            lines.append((row.label, *own[0].cells))
        else:
            lines += [(row.label,), *((f"  {line.kind}", *line.cells) for line in own)]
    return aligned(("model", *heads), "l" + "r" * len(heads), lines)


def _legend(page: Page) -> Iterator[str]:
    for key, says in legend(page.columns):
        yield wrapped(f"{key}: {says}", 4)
    for remark in remarks(page):
        yield wrapped(remark)


def _attack_by_attack(page: Page) -> list[str]:
    if len(page.rows) > _TOLD_ROWS:
        return [*_released(page), "Each attack by itself is in report.html and table.json."]
    lines = [line for row in page.rows for line in _row_lines(row, page.attacks)]
    head = ("model", "measured", "n", "held", "accuracy %", "95 % interval")
    return [aligned(head, "llrrrr", lines), *_released(page), *_outside(page)]


def _released(page: Page) -> list[str]:
    table = released_table(page)
    if table is None or page.reported_source:
        return []
    return [f"{table.title}\n\n{aligned(table.head, 'llrrr', table.lines)}"]


def _outside(page: Page) -> list[str]:
    table = outside_table(page)
    return [] if table is None else [f"{table.title}\n\n{aligned(table.head, 'lllrr', table.lines)}"]


def _challenges(page: Page) -> list[str]:
    table = challenges_table(page)
    return [] if table is None else [f"{table.title}\n\n{aligned(table.head, 'lllrrrrr', table.lines)}"]


def _threefold(page: Page) -> list[str]:
    table = threefold_table(page)
    return [] if table is None else [f"{table.title}\n\n{aligned(table.head, 'llrrrr', table.lines)}"]


def _row_lines(row: Row, attacks: Sequence[Attack]) -> Iterator[tuple[str, ...]]:
    yield _result(row.label, "SA, clean", row.clean)
    faced = [(attack, done) for attack, done in zip(attacks, row.attacks, strict=True) if done]
    for attack, done in faced:
        under = attack.label if attack.threat in attack.label else f"{attack.label}, {attack.threat}"
        yield _result(row.label, f"RA, {under}", Rate(done.held, done.n))
    if row.worst is not None and len(faced) + len(row.challenges) > 1:
        submitted = f" and {plural(len(row.challenges), 'challenge')}" if row.challenges else ""
        yield _result(row.label, f"RA, worst case of these {len(faced)}{submitted}", row.worst)


def _result(label: str, measured: str, rate: Rate) -> tuple[str, ...]:
    return label, measured, f"{rate.n:,}", f"{rate.held:,}", percent(rate.share), bounds(rate)


def _model_line(row: Row) -> tuple[str, ...]:
    load = ABSENT if row.largest_load is None else f"{percent(row.largest_load)} %"
    return row.label, row.method, row.architecture, f"{row.parameters:,}", load


# -- JSON ----------------------------------------------------------------------------------------------------------


def to_json(page: Page) -> dict[str, Any]:
    """The whole table as JSON values: counts, accuracies and intervals in [0, 1], attacks with their budgets.

    What a paper reported is in percent, as it was printed.
    """
    return {
        "schema": TABLE_SCHEMA,
        "phalanx": __version__,
        "title": page.title,
        "description": page.description,
        "command": page.command,
        "columns": [asdict(column) for column in page.columns],
        "attacks": [asdict(attack) for attack in page.attacks],
        "released_attacks": [asdict(attack) for attack in page.released],
        "outside_attacks": [asdict(attack) for attack in page.outside],
        "reported_source": page.reported_source,
        "rows": [_row_json(row, page) for row in page.rows],
        "sweeps": [_sweep_json(sweep, page) for sweep in page.sweeps],
        "alpha_tradeoffs": [
            {**asdict(tradeoff), "rows": [page.rows[place].label for place in tradeoff.rows]}
            for tradeoff in page.tradeoffs
        ],
        "margin_changes": [_comparison_json(comparison) for comparison in page.margin_comparisons],
        "notices": [asdict(notice) for notice in page.notices],
        "caveats": list(page.caveats),
    }


def _row_json(row: Row, page: Page) -> dict[str, Any]:
    # a dual model's halves may differ in them
    single = None if row.is_dual or row.is_foreign else row.mixtures[0]
    return {
        "label": row.label,
        "status": row.status,
        "method": row.method,
        "architecture": row.architecture,
        "expert": single and single.expert,
        "experts": single and single.experts,
        "top_k": single and single.top_k,
        "alpha": row.alpha,
        "parameters": row.parameters,
        "counts": row.counts and row.counts.to_json(),
        "seed": row.seed,
        "weights": row.weights,
        "n": row.n,
        "columns": {column.key: _rate_json(row.columns.get(column.key)) for column in page.columns},
        "reported": dict(row.reported),
        "clean": {**_counts(row.clean), "invalid": row.clean_invalid},
        "attacks": _attacks_json(page.attacks, row.attacks),
        "worst_case": _rate_json(row.worst),
        "released_attacks": _attacks_json(page.released, row.released),
        "released_columns": {
            name: {column: _rate_json(rate) for column, rate in rates.items()}
            for name, rates in row.released_columns.items()
        },
        "outside_attacks": _attacks_json(page.outside, row.outside),
        "challenges": [challenge.to_json() for challenge in row.challenges],
        "without_challenges": _rate_json(row.unchallenged),
        "threats": [line.to_json() for line in row.threats],
        "classes": [
            {"name": found.name, "clean": _rate_json(found.clean), "worst_case": _rate_json(found.worst)}
            for found in row.classes
        ],
        "load": None if row.load is None else list(row.load),
        "stability": {
            "validations": len(row.curves.validation),
            "largest_drop": row.curves.largest_drop,
            "late_deviation": row.curves.late_deviation,
        },
        "analysis": None if row.analysis is None else asdict(row.analysis),
        "attribution": None if row.attribution is None else asdict(row.attribution),
        "queries": None if row.queries is None else row.queries.to_json(),
        "targeted": None if row.targeted is None else row.targeted.to_json(),
        "honesty": None if row.honesty is None else row.honesty.to_json(),
        "corruptions": None if row.corruptions is None else row.corruptions.to_json(),
        "certificates": [found.to_json() for found in row.certificates],
        "printed_unsound": printed_json(row.printed),
        "threefold": None if row.threefold is None else row.threefold.to_json(),
        "smoothed": [found.to_json() for found in row.smoothed],
        "gallery": None if row.gallery is None else row.gallery.to_json(),
        "settings": dict(row.settings),
        "data": dict(row.data),
        "measurement": dict(row.measurement),
        "environment": dict(row.environment),
    }


def _rate_json(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else _counts(rate)


def _counts(rate: Rate) -> dict[str, Any]:
    return {"held": rate.held, "n": rate.n, "accuracy": rate.share, "interval": list(rate.interval)}


def _attacks_json(attacks: Sequence[Attack], done: Sequence[AttackSummary | None]) -> list[dict[str, Any]]:
    return [_attack_json(attack.label, summary) for attack, summary in zip(attacks, done, strict=True) if summary]


def _attack_json(label: str, done: AttackSummary) -> dict[str, Any]:
    counts = {name: getattr(done, name) for name in _COUNTED}
    return {"label": label, **_counts(Rate(done.held, done.n)), **counts}


def _sweep_json(sweep: Sweep, page: Page) -> dict[str, Any]:
    by_row = zip(page.rows, zip(*sweep.rates, strict=True), strict=True)
    return {
        "attack": kind(sweep),
        "over": sweep.over,
        "values": list(sweep.values),
        "as_written": list(sweep.names),
        "attacks": [attack.label for attack in sweep.attacks],
        "rows": [{"label": row.label, "accuracies": [_rate_json(rate) for rate in rates]} for row, rates in by_row],
    }


def _comparison_json(comparison: MarginComparison) -> dict[str, Any]:
    return {
        "trained": comparison.trained,
        "view": comparison.view,
        "alpha": comparison.alpha,
        "attack": comparison.attack,
        "classes": [
            {"name": name, "clean": _change_json(clean), "attacked": _change_json(attacked)}
            for name, clean, attacked in zip(comparison.classes, comparison.clean, comparison.attacked, strict=True)
        ],
    }


def _change_json(change: MarginChange | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {**asdict(change), "points": change.points, "relative_percent": change.relative}
