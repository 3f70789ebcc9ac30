"""A study made without a word, and its rows as a program reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phalanx.report import Page, build_page, to_json
from phalanx.training import Silent
from phalanx.workflow import Plan, default_workers, make_study


class Quiet(Silent):
    """No bars."""

    def __init__(self, title: str) -> None:
        del title

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""


def made(work: Plan, folder: Path) -> Page:
    """The page of a study, made in `folder`."""
    rows = make_study(work, folder, Quiet, workers=default_workers(work))
    return build_page(work.title, work.description, rows, "phalanx run")


def rows_of(page: Page) -> dict[str, dict[str, Any]]:
    """The rows by label."""
    return {row["label"]: row for row in to_json(page)["rows"]}


def held(row: dict[str, Any], column: str) -> int:
    """Images that a row held in a column."""
    return int(row["columns"][column]["held"])


def check_worst_is_below_every_component(rows: dict[str, dict[str, Any]]) -> None:
    """Asserts it of every column and attack of every row."""
    for row in rows.values():
        worst = held(row, "worst")
        assert all(worst <= rate["held"] for rate in row["columns"].values() if rate is not None)
        assert all(worst <= attack["held"] for attack in row["attacks"])
