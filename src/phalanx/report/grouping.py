"""Warnings that say the same of several models, put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phalanx.report.page import Notice
from phalanx.report.words import listed, plural

_NAMED = 2
"""Of more rows, only their number is said."""


@dataclass(frozen=True)
class NoticeGroup:
    """One notice, or what several begin with."""

    kind: str
    who: str
    """The rows it is about."""
    head: str
    """All of a single notice's text; of several, what they have in common."""
    each: tuple[tuple[str, str], ...] = ()
    """Of several: row, and what is said of it."""


def grouped(notices: Iterable[Notice]) -> list[NoticeGroup]:
    """Warnings that are alike up to their first colon share a place, that of the first. What is graver stands alone."""
    alike: dict[tuple[str, ...], list[Notice]] = {}
    for place, notice in enumerate(notices):
        head, colon, _ = notice.text.partition(": ")
        shared = notice.kind == "warn" and bool(colon)
        alike.setdefault((notice.kind, head) if shared else (str(place),), []).append(notice)
    return [_group(found) for found in alike.values()]


def _group(found: list[Notice]) -> NoticeGroup:
    first = found[0]
    if len(found) == 1:
        return NoticeGroup(first.kind, first.label, first.text)
    said = tuple((notice.label, notice.text.partition(": ")[2]) for notice in found)
    rows = list(dict.fromkeys(notice.label for notice in found))
    who = listed(rows) if len(rows) <= _NAMED else plural(len(rows), "model")
    return NoticeGroup(first.kind, who, first.text.partition(": ")[0], said)
