"""The honesty checks of a row: as alarms over the headline, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from phalanx.report.honesty import STATUSES, CheckLine, alarms, counted
from phalanx.report.page import Notice, NoticeKind, Row
from phalanx.report.table import Table
from phalanx.report.words import ABSENT

_SHOWN = 4
"""Numbers of its evidence that a line shows."""


def honesty_notices(row: Row) -> Iterator[Notice]:
    """What must be read before the headline."""
    for status, text in alarms(row.honesty):
        yield Notice(cast(NoticeKind, status), row.label, text)


def honesty_table(row: Row) -> Table | None:
    """Every check of a row, failures first, skipped ones last and with their reason; None where none was run."""
    honesty = row.honesty
    if honesty is None or not honesty.checks:
        return None
    return Table(
        f"Honesty checks of {row.label}",
        f"{_sentence(counted(honesty))}. M1 to M12 look at the model, E1 to E21 at the attacks. A failure invalidates "
        "the headline, a warning belongs beside it.",
        ("check", "result", "what it says", "evidence"),
        tuple(
            (f"{check.id} {check.title}", check.status, check.sentence, _evidence(check))
            for status in STATUSES
            for check in honesty.having(status)
        ),
    )


def honesty_matrix(rows: Sequence[Row]) -> Table | None:
    """How each check ended for each row; None for one row, whose table says it, and where none was run."""
    found = [(row, row.honesty) for row in rows if row.honesty is not None and row.honesty.checks]
    if len(rows) < 2 or not found:
        return None
    names = {check.id: f"{check.id} {check.title}" for _, honesty in found for check in honesty.checks}
    ended = [{check.id: check.status for check in honesty.checks} for _, honesty in found]
    return Table(
        "Honesty checks of all models",
        "M1 to M12 look at the model, E1 to E21 at the attacks. A failure invalidates a headline, a warning belongs "
        "beside it; info is for the record.",
        ("check", *(row.label for row, _ in found)),
        tuple((name, *(statuses.get(check, ABSENT) for statuses in ended)) for check, name in names.items()),
    )


def _evidence(check: CheckLine) -> str:
    numbers = list(check.evidence.items())
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers[:_SHOWN])
    return told or ABSENT


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
