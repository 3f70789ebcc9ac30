"""The threat-coverage table that closes a report, and the table of submitted images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phalanx.report.page import Page, Row
from phalanx.report.table import Table
from phalanx.report.text import wrapped
from phalanx.report.words import ABSENT, listed, percent, plural, rated
from phalanx.runs.rate import Rate
from phalanx.runs.summary import wilson
from phalanx.runs.threats import HOW, Coverage

TITLE = "Threat coverage"
NOTE = (
    "Each kind of attacker by itself; none of these numbers is mixed into the headline, or taken from it. RA: share of "
    "all n images that are right when clean and held against every attack named. Not measured means not known."
)
_NAMED = 3
"""Of more attacks, a line names the last of them and their number."""


def threats_table(page: Page) -> Table:
    """Every threat and model; the models of which nothing is known share a line."""
    return Table(
        TITLE,
        NOTE,
        ("threat", "model", "result", "n", "attacks and budget, or what would measure it"),
        tuple(line for threat in HOW for line in _lines(page.rows, threat)),
    )


def threats_text(page: Page) -> str:
    """The table as lines for a terminal."""
    lines = [
        wrapped(f"{threat}: {_label(label, page)}{_told(found, n, says)}", 4)
        for threat in HOW
        for _, label, found, n, says in _lines(page.rows, threat)
    ]
    return "\n".join([f"{TITLE} (none of it in the headline)", "", *lines])


def _label(label: str, page: Page) -> str:
    return "" if len(page.rows) == 1 else f"{label}: "


def _told(found: str, n: str, says: str) -> str:
    return f"{found}; {says}" if n == ABSENT else f"{found} of n = {n}; {says}"


def _lines(rows: Sequence[Row], threat: str) -> Iterator[tuple[str, str, str, str, str]]:
    unknown = []
    for row in rows:
        (line,) = (line for line in row.threats if line.threat == threat)
        if line.status == "not measured":
            unknown.append(row.label)
        else:
            yield threat, row.label, result(line), f"{line.n:,}" if line.held is not None else ABSENT, under(line)
    if unknown:
        yield threat, of_models(unknown, len(rows)), "not measured", ABSENT, HOW[threat]


def of_models(labels: Sequence[str], models: int) -> str:
    """Some of all models in one cell."""
    return "every model" if len(labels) == models > 1 else listed(labels)


def result(line: Coverage) -> str:
    """What was measured, with its 95 % interval."""
    if line.held is not None:
        return f"RA {rated(Rate(line.held, line.n))} %"
    low, high = wilson(line.broken, line.tried)
    share = f"{percent(line.broken / line.tried if line.tried else 0.0)} % [{percent(low)}, {percent(high)}]"
    return f"broke {line.broken:,} of {plural(line.tried, 'image')}, {share}"


def under(line: Coverage) -> str:
    """Attacks and budget, and for how many images they speak."""
    many = len(line.attacks) > _NAMED
    names = f"{len(line.attacks)} attacks, among them {line.attacks[-1]}" if many else listed(list(line.attacks))
    most = [f"{value:,} {key}" for key, value in (line.budget or {}).items()]
    budget = f"; at most {listed(most)}" if most else ""
    return f"{names}, {line.within}{budget}{_caution(line)}"


PARTLY = "; tried only on what other attacks had left standing, so no accuracy of its own"


def _caution(line: Coverage) -> str:
    if line.lowered is not None:
        return f"; submitted images, which lower the headline by {plural(line.lowered, 'image')}"
    if line.status == "partly":
        return PARTLY
    return ""


def challenges_table(page: Page) -> Table | None:
    """What submitted images did, and by how much the headline fell; None if nobody submitted any."""
    lines = [
        (
            row.label,
            challenge.name,
            challenge.spec["when"][:10],
            f"{challenge.submitted:,}",
            f"{challenge.judged:,}",
            f"{challenge.broken:,}",
            f"{challenge.lowered:,}",
            f"{rated(row.unchallenged)} to {rated(row.worst)}",
        )
        for row in page.rows
        for challenge in row.challenges
    ]
    if not lines:
        return None
    return Table(
        "Challenges",
        "Images that somebody submitted, checked and judged on the real model. Tried: those of images that are right "
        "when clean. Lowered: of the broken ones those that every attack of the protocol had left standing. The last "
        "column is the worst case without and with all of them; they can only lower it.",
        ("model", "by", "on", "images", "tried", "broken", "lowered", "worst case, %"),
        tuple(lines),
    )
