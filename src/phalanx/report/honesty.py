"""What the honesty checks said: honesty.json as a table, as alarms over the headline and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phalanx.report.records import Fields, read_record
from phalanx.report.words import listed, plural

HONESTY_NAME = "honesty.json"

STATUSES = ("fail", "warn", "info", "pass", "skipped")
"""Worst first."""
LEFT_OUT = "the honesty checks were left out (--no-checks): nothing looked for what makes such numbers wrong"


@dataclass(frozen=True)
class CheckLine:
    """One check, done or skipped."""

    id: str
    title: str
    status: str
    """Of `STATUSES`."""
    sentence: str
    evidence: dict[str, float]


@dataclass(frozen=True)
class Honesty:
    """What the checks said of one evaluation."""

    samples: int
    """Images that were looked at; 0 where the checks were left out."""
    checks: tuple[CheckLine, ...]
    """In the order of the checklist."""

    def having(self, status: str) -> tuple[CheckLine, ...]:
        return tuple(check for check in self.checks if check.status == status)

    @property
    def failed(self) -> tuple[str, ...]:
        """Ids of the checks that invalidate the headline."""
        return tuple(check.id for check in self.having("fail"))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_honesty(path: Path) -> Honesty | None:
    """The checks in a file, None if there is none: an evaluation that has not ended, or is older than they.

    Raises CorruptError naming the key, InputError for a file of a newer version.
    """
    if not path.exists():
        return None
    record = read_record(path, missing="")
    return Honesty(record.integer("samples"), tuple(map(_line, record.items("checks"))))


def _line(check: Fields) -> CheckLine:
    evidence = check.fields("evidence")
    numbers = {name: evidence.number(name) for name in evidence.values}
    return CheckLine(
        id=check.text("id"),
        title=check.text("title"),
        status=check.text("status"),
        sentence=check.text("sentence"),
        evidence={name: value for name, value in numbers.items() if value is not None},
    )


def alarms(honesty: Honesty | None) -> Iterator[tuple[str, str]]:
    """(status, text) of what must be read before the headline: each failure, then all warnings at once."""
    if honesty is None:
        return
    if not honesty.samples:
        yield "warn", LEFT_OUT[:1].upper() + LEFT_OUT[1:] + "."
    for check in honesty.having("fail"):
        yield "fail", f"Honesty check {check.id} ({check.title}) failed: {check.sentence}. Do not quote the headline."
    for check in honesty.having("warn"):
        yield "warn", f"Honesty check {check.id} ({check.title}): {check.sentence}."


def honesty_text(path: Path) -> str:
    """The failures and warnings in a file and a count of the rest, as lines; empty if there is no file.

    Raises as `read_honesty`.
    """
    honesty = read_honesty(path)
    if honesty is None:
        return ""
    if not honesty.samples:
        return LEFT_OUT
    lines = [
        f"{status.upper():<4} {check.id} {check.title}: {check.sentence}"
        for status in ("fail", "warn")
        for check in honesty.having(status)
    ]
    return "\n".join([*lines, counted(honesty)])


def counted(honesty: Honesty) -> str:
    """How many checks ended how."""
    counts = ((status, len(honesty.having(status))) for status in STATUSES)
    words = {"fail": "failed", "warn": "warned", "info": "for the record", "pass": "passed", "skipped": "skipped"}
    told = listed([f"{count} {words[status]}" for status, count in counts if count])
    return f"honesty checks on {plural(honesty.samples, 'image')}: {told}"
