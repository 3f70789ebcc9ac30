from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import make_evaluation, make_run, make_source, page_of

from phalanx.errors import CorruptError
from phalanx.report import RowSource, render_html, to_json
from phalanx.report.counts import Counts
from phalanx.report.sections import across_rows

COUNTED: dict[str, Any] = {
    "parameters": 11_214_396,
    "active_parameters": 2_821_566,
    "path_macs": 139_299_328,
    "router_macs": 700_672,
    "total_macs": 140_000_000,
    "executed_macs": 557_897_984,
}


def test_the_counts_are_told_in_a_table_and_in_json(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, counts=COUNTED))
    (row,) = page.rows
    assert row.counts == Counts(11_214_396, 2_821_566, 139_299_328, 700_672, 557_897_984)
    table = across_rows(page)[0]
    assert table.title == "Counts"
    assert table.head == ("model", "parameters", "active", "MACs, path", "MACs, + router", "MACs, executed")
    assert table.lines == (("AT", "11,214,396", "2,821,566", "139,299,328", "140,000,000", "557,897,984"),)
    (found,) = json.loads(json.dumps(to_json(page)))["rows"]
    assert found["counts"] == COUNTED
    text = render_html(page)
    assert "<h4>Counts</h4>" in text and "<td>557,897,984</td>" in text


def test_the_parameters_are_those_of_the_model_that_was_counted(tmp_path: Path) -> None:
    # model.json of the run says 36,282; of another gate over its experts that is not the number
    page = page_of(make_source(tmp_path, counts=COUNTED))
    assert page.rows[0].parameters == to_json(page)["rows"][0]["parameters"] == 11_214_396


def test_an_older_record_was_not_counted(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path))
    assert page.rows[0].counts is None and page.rows[0].parameters == 36_282
    assert to_json(page)["rows"][0]["counts"] is None
    assert "Counts" not in [table.title for table in across_rows(page)]


def test_beside_one_that_was_it_says_so(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "new", counts=COUNTED), make_source(tmp_path, "old"))
    assert across_rows(page)[0].lines[1] == ("old", *["not counted"] * 5)


def test_an_evaluation_that_did_not_end_has_none(tmp_path: Path) -> None:
    source = RowSource("AT", make_run(tmp_path / "run"), make_evaluation(tmp_path / "e", ended=False))
    assert page_of(source).rows[0].counts is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path_macs": "many"}, r'evaluation\.json: counts\.path_macs should be a whole number, got "many"'),
        ({"router_macs": -1}, r"counts\.router_macs should be a number of at least 0, got -1"),
        ({"active_parameters": None}, r"counts\.active_parameters should be a whole number, got null"),
    ],
)
def test_a_wrong_count_names_file_and_key(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(CorruptError, match=says):
        page_of(make_source(tmp_path, counts={**COUNTED, **change}))
