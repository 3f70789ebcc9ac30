"""The results as plain text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from phalanx import __version__
from phalanx.report.page import Attack, Page, Rate, Row
from phalanx.report.words import ABSENT, bounds, clipped, percent
from phalanx.runs import AttackSummary

TABLE_SCHEMA = 1
WIDTH = 100
"""Characters of the terminal table."""

_GAP = "  "


# -- text ----------------------------------------------------------------------------------------------------------


def terminal_table(page: Page) -> str:
    """Results, models, and under them whatever must be known before believing them; lines of at most 100 characters.

    Every robust accuracy stands beside its attack, n and 95 % Wilson interval, in percent.
    """
    parts = [
        _wrapped(page.title),
        _aligned(("model", "measured", "n", "held", "accuracy %", "95 % interval"), "llrrrr", _result_lines(page)),
        _aligned(
            ("model", "method", "expert", "experts", "top-k", "parameters", "largest load"),
            "lllrrrr",
            [_model_line(row) for row in page.rows],
        ),
        "\n".join(_wrapped(f"{notice.kind.upper()}  {notice.label}: {notice.text}", 4) for notice in page.notices),
        "\n".join(_wrapped(f"- {caveat}", 2) for caveat in page.caveats),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _result_lines(page: Page) -> list[tuple[str, ...]]:
    return [line for row in page.rows for line in _row_lines(row, page.attacks)]


def _row_lines(row: Row, attacks: Sequence[Attack]) -> Iterator[tuple[str, ...]]:
    yield _result(row.label, "SA, clean", row.clean)
    faced = [(attack, done) for attack, done in zip(attacks, row.attacks, strict=True) if done]
    for attack, done in faced:
        under = attack.label if attack.threat in attack.label else f"{attack.label}, {attack.threat}"
        yield _result(row.label, f"RA, {under}", Rate(done.held, done.n))
    if row.worst is not None and len(faced) > 1:
        yield _result(row.label, f"RA, worst case of these {len(faced)}", row.worst)


def _result(label: str, measured: str, rate: Rate) -> tuple[str, ...]:
    return label, measured, f"{rate.n:,}", f"{rate.held:,}", percent(rate.share), bounds(rate)


def _model_line(row: Row) -> tuple[str, ...]:
    load = ABSENT if row.largest_load is None else f"{percent(row.largest_load)} %"
    top_k = ABSENT if row.experts == 1 else str(row.top_k)
    return row.label, row.method, row.expert, str(row.experts), top_k, f"{row.parameters:,}", load


def _aligned(head: tuple[str, ...], sides: str, lines: Sequence[tuple[str, ...]]) -> str:
    """Columns at their natural width; text columns ("l") give way until the table fits."""
    table = [[_printable(cell) for cell in line] for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [place for place, side in enumerate(sides) if side == "l"]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
        widths[max(text, key=lambda place: widths[place])] -= 1
    rendered = [
        _GAP.join(
            f"{clipped(cell, width):{'<' if side == 'l' else '>'}{width}}"
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in table
    ]
    rule = _GAP.join("-" * width for width in widths)
    return "\n".join([rendered[0], rule, *rendered[1:]])


def _wrapped(text: str, indent: int = 0) -> str:
    lines = [""]
    for word in _printable(text).split():
        pieces = [word[start : start + WIDTH - indent] for start in range(0, len(word), WIDTH - indent)]
        for piece in pieces:
            if lines[-1].strip() and len(lines[-1]) + 1 + len(piece) > WIDTH:
                lines.append(" " * indent)
            lines[-1] += f" {piece}" if lines[-1].strip() else piece
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Without control characters: a label must not be able to drive the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


# -- JSON ----------------------------------------------------------------------------------------------------------


def to_json(page: Page) -> dict[str, Any]:
    """The whole table as JSON values: counts, accuracies and intervals in [0, 1], attacks with their budgets."""
    return {
        "schema": TABLE_SCHEMA,
        "phalanx": __version__,
        "title": page.title,
        "description": page.description,
        "command": page.command,
        "attacks": [asdict(attack) for attack in page.attacks],
        "rows": [_row_json(row, page.attacks) for row in page.rows],
        "notices": [asdict(notice) for notice in page.notices],
        "caveats": list(page.caveats),
    }


def _row_json(row: Row, attacks: Sequence[Attack]) -> dict[str, Any]:
    return {
        "label": row.label,
        "status": row.status,
        "method": row.method,
        "expert": row.expert,
        "experts": row.experts,
        "top_k": row.top_k,
        "parameters": row.parameters,
        "seed": row.seed,
        "weights": row.weights,
        "n": row.n,
        "clean": {**_rate_json(row.clean), "invalid": row.clean_invalid},
        "attacks": [
            _attack_json(attack.label, done) for attack, done in zip(attacks, row.attacks, strict=True) if done
        ],
        "worst_case": None if row.worst is None else _rate_json(row.worst),
        "load": None if row.load is None else list(row.load),
        "settings": dict(row.settings),
        "data": dict(row.data),
        "measurement": dict(row.measurement),
        "environment": dict(row.environment),
    }


def _rate_json(rate: Rate) -> dict[str, Any]:
    return {"held": rate.held, "n": rate.n, "accuracy": rate.share, "interval": list(rate.interval)}


def _attack_json(label: str, done: AttackSummary) -> dict[str, Any]:
    counts = {name: getattr(done, name) for name in ("broken", "invalid", "timeout", "untried")}
    return {"label": label, **_rate_json(Rate(done.held, done.n)), **counts}
