"""Query curves and targeted success on the page: what is read, drawn and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import make_source, page_of

from phalanx.errors import CorruptError, InputError
from phalanx.report import render_html, to_json
from phalanx.report.queries import read_queries, read_targeted
from phalanx.report.queries_section import query_plot, targeted_table, targeted_tables
from phalanx.runs import write_json
from phalanx.runs.rate import Rate

CURVES: dict[str, Any] = {
    "schema": 1,
    "curves": [
        {
            "attack": "rays-1000",
            "n": 10,
            "clean": 8,
            "points": [{"queries": 100, "held": 7}, {"queries": 200, "held": 7}, {"queries": 1000, "held": 5}],
        },
        {"attack": "square-50", "n": 10, "clean": 8, "points": []},
    ],
    "left_out": [{"attack": "square-5000", "why": "square-5000 met 5 of 8"}],
}
TARGETED: dict[str, Any] = {
    "schema": 1,
    "attack": "targeted apgd-100",
    "n": 10,
    "reached": 4,
    "already": 1,
    "invalid": 0,
    "cells": [
        {"label": 0, "target": 1, "n": 4, "reached": 3},
        {"label": 1, "target": 0, "n": 6, "reached": 1},
    ],
}


def page_with(folder: Path, *labels: str, **files: Any):
    sources = []
    for label in labels or ("A",):
        source = make_source(folder, label)
        for name, record in files.items():
            write_json(source.evaluation / f"{name}.json", record)
        sources.append(source)
    return page_of(*sources)


def test_without_the_files_there_is_no_section(tmp_path: Path) -> None:
    page = page_with(tmp_path)
    assert query_plot(page) is None and targeted_table(page) is None and targeted_tables(page.rows[0]) == []
    assert "against queries" not in render_html(page) and "Targeted success" not in render_html(page)


def test_the_curve_and_its_data(tmp_path: Path) -> None:
    page = page_with(tmp_path, "A", "B", queries=CURVES)
    plot = query_plot(page)
    assert plot is not None
    assert plot.head == ("queries", *(f"{m}, {a}, %" for m in "AB" for a in ("rays-1000", "square-50")))
    assert [line[0] for line in plot.lines] == ["0", "100", "200", "1,000"]
    assert plot.lines[0][1].startswith("80.0 [") and plot.lines[3][1].startswith("50.0 [23.7, 76.3]")
    assert plot.lines[1][2] == "–"
    assert "square-5000 on A; square-5000 on B" in plot.note and "without the two that judge it" in plot.note
    text = render_html(page)
    assert text.count("Robust accuracy against queries") >= 1 and "50.0 [23.7" in text
    # an attack of fewer queries than the least budget has no line, and none of the scale's ends is 0
    assert "square-50" not in plot.svg and "1,000" in plot.svg


def test_targeted_success(tmp_path: Path) -> None:
    page = page_with(tmp_path, targeted=TARGETED)
    table = targeted_table(page)
    assert table is not None and table.lines == (("A", "targeted apgd-100", "10", "40.0 [16.8, 68.7]", "1", "0"),)
    (matrix,) = targeted_tables(page.rows[0])
    assert matrix.lines[0][1:3] == ("–", "3 of 4") and matrix.lines[1][1:3] == ("1 of 6", "–")
    assert matrix.lines[0][-1] == "75.0" and matrix.lines[1][-1] == "16.7"
    assert "Targeted success by class" in render_html(page)


def test_what_other_programs_read(tmp_path: Path) -> None:
    (row,) = json.loads(json.dumps(to_json(page_with(tmp_path, queries=CURVES, targeted=TARGETED))))["rows"]
    first, last = row["queries"]["curves"][0]["points"][0], row["queries"]["curves"][0]["points"][-1]
    assert (first["queries"], first["held"], first["n"]) == (0, 8, 10)
    assert last["queries"] == 1000 and last["interval"] == pytest.approx(Rate(5, 10).interval)
    assert row["targeted"]["reached"] == 4 and row["targeted"]["cells"][0] == TARGETED["cells"][0]
    (bare,) = to_json(page_with(tmp_path, "bare"))["rows"]
    assert bare["queries"] is None and bare["targeted"] is None


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([{"queries": 100, "held": 9}], "no more held"),
        ([{"queries": 100, "held": 7}, {"queries": 100, "held": 6}], "more queries"),
        ([{"queries": 100, "held": "7"}], "held should be a whole number"),
    ],
)
def test_a_damaged_curve_is_named(tmp_path: Path, points: list[dict[str, Any]], message: str) -> None:
    curve = {**CURVES["curves"][0], "points": points}
    write_json(tmp_path / "queries.json", {**CURVES, "curves": [curve]})
    with pytest.raises(CorruptError, match=message):
        read_queries(tmp_path / "queries.json")


def test_a_damaged_or_newer_targeted_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "targeted.json"
    write_json(path, {**TARGETED, "reached": 11})
    with pytest.raises(CorruptError, match="no more than its n"):
        read_targeted(path)
    write_json(path, {**TARGETED, "schema": 99})
    with pytest.raises(InputError, match="newer phalanx"):
        read_targeted(path)
