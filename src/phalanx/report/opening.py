"""What stands before everything else: three sentences, and the headline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phalanx.report.findings import accuracy_sentence, aims_at_routing, most_robust, told_rows
from phalanx.report.headline import AUTOATTACK
from phalanx.report.page import Page, Row
from phalanx.report.words import ABSENT, bounds, percent, plural


def opening(page: Page) -> tuple[tuple[str, str], ...]:
    """What was trained, how robust the most robust of it is under what, and what to distrust: one sentence each."""
    return (
        ("What was trained", page.summary[0]),
        ("How robust it is", accuracy_sentence(most_robust(page.rows), page.attacks)),
        ("What to distrust", _distrust(page)),
    )


def _distrust(page: Page) -> str:
    failed = sum(notice.kind == "fail" for notice in page.notices)
    if failed:
        return f"All of it: {plural(failed, 'honesty check')} failed, so the headline is not to be quoted."
    gravest, others = page.caveats[0].removesuffix("."), len(page.caveats) - 1
    more = [
        text
        for count, text in ((others, plural(others, "more caveat")), (len(page.notices), _noticed(len(page.notices))))
        if count
    ]
    return f"{gravest}; {' and '.join(more)} below." if more else f"{gravest}."


def _noticed(count: int) -> str:
    return plural(count, "alarm or warning", "alarms and warnings")


@dataclass(frozen=True)
class Figure:
    """A number of the headline."""

    name: str
    share: str
    """In percent, or a dash."""
    bounds: str
    """Its 95 % interval, or why there is none."""


@dataclass(frozen=True)
class Headline:
    """What may be quoted of a row, with what it was measured under."""

    label: str
    figures: tuple[Figure, ...]
    """The worst case first."""
    protocol: str
    """Protocol, threat, images and attacks in half a sentence."""
    failed: bool
    """Whether a honesty check says that it may not be quoted."""


def headlines(page: Page) -> list[Headline]:
    """Of the rows that the opening tells of: AutoAttack alone stands beside the worst case, which knows of routes."""
    return [_headline(row, page) for row in told_rows(page.rows)]


def _headline(row: Row, page: Page) -> Headline:
    return Headline(
        label=row.label,
        figures=(
            _figure("Worst case over everything tried", row, "worst", "not attacked"),
            _figure("AutoAttack alone", row, AUTOATTACK, "not run as a whole"),
            _figure("Clean", row, "SA", ""),
            *_threefold(row),
        ),
        protocol=_protocol(row, page),
        failed=any(notice.kind == "fail" and notice.label == row.label for notice in page.notices),
    )


def _figure(name: str, row: Row, column: str, without: str) -> Figure:
    rate = row.columns.get(column)
    return Figure(name, ABSENT, without) if rate is None else Figure(name, f"{percent(rate.share)} %", bounds(rate))


def _threefold(row: Row) -> Iterator[Figure]:
    found = row.threefold
    if found is not None:
        parts = {"Broken": found.broken, "Certified": found.certified, "Undecided": found.undecided}
        yield from (Figure(name, f"{percent(rate.share)} %", bounds(rate)) for name, rate in parts.items())


def _protocol(row: Row, page: Page) -> str:
    faced = [attack for attack, done in zip(page.attacks, row.attacks, strict=True) if done]
    aimed = f", {sum(map(aims_at_routing, faced)):,} of them aimed at routes" if row.has_router else ""
    said: Sequence[str] = [
        f"protocol {row.measurement['protocol']}" if row.measurement["protocol"] else "protocol unknown",
        f"{row.measurement['norm']} {row.measurement['eps']}",
        f"n = {row.n:,}",
        plural(len(faced), "attack") + aimed,
        f"seed {row.measurement['seed']}",
    ]
    return "; ".join(said)
