"""What the honesty checks said, on the page: a banner over the headline, a table with what was skipped, and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_sample import make_source, page_of

from phalanx.errors import CorruptError, InputError
from phalanx.report import Page, honesty_text, render_html, terminal_table, to_json
from phalanx.report.honesty import LEFT_OUT, read_honesty
from phalanx.runs import write_json


def _check(id: str, status: str, **evidence: float) -> dict[str, Any]:
    sentence = f"{id} says so"
    return {"id": id, "title": f"about {id}", "status": status, "sentence": sentence, "evidence": evidence}


CHECKS = [
    _check("M1", "pass"),
    _check("M6", "warn", gates=1),
    _check("E5", "fail", accuracy=0.5, chance=0.1),
    _check("E13", "info", all=0.25),
    _check("E19", "skipped"),
]


def _page(folder: Path, checks: list[dict[str, Any]] | None, samples: int = 64) -> Page:
    source = make_source(folder)
    if checks is not None:
        write_json(source.evaluation / "honesty.json", {"schema": 1, "samples": samples, "checks": checks})
    return page_of(source)


def test_a_failure_stands_over_the_headline(tmp_path: Path) -> None:
    page = _page(tmp_path, CHECKS)
    assert [notice.kind for notice in page.notices] == ["fail", "warn"]
    html = render_html(page)
    banner = html.index('<p class="notice fail">')
    assert banner < html.index("What was trained") < html.index("not to be quoted</strong>")
    assert "Do not quote the headline" in html[banner : banner + 400]
    text = terminal_table(page)
    assert "FAIL" in text and "Honesty check E5 (about E5) failed: E5 says so." in text.replace("\n    ", " ")


def test_every_check_is_in_the_table_with_its_evidence(tmp_path: Path) -> None:
    html = render_html(_page(tmp_path, CHECKS))
    start = html.index("<h2>Honesty checks</h2>")
    table = html[start : html.index("</section>", start)]
    places = [table.index(f"{id} about {id}") for id in ("E5", "M6", "E13", "M1", "E19")]
    assert places == sorted(places) and "accuracy 0.5, chance 0.1" in table
    assert '<td class="is-skipped">skipped</td>' in table
    assert "Honesty checks on 64 images: 1 failed, 1 warned, 1 for the record, 1 passed and 1 skipped" in table


def test_checks_that_were_left_out_are_named(tmp_path: Path) -> None:
    page = _page(tmp_path, [], 0)
    (notice,) = page.notices
    assert notice.kind == "warn" and "--no-checks" in notice.text
    assert "<h2>Honesty checks</h2>" not in render_html(page)


def test_an_older_evaluation_has_none(tmp_path: Path) -> None:
    page = _page(tmp_path, None)
    assert page.rows[0].honesty is None and not page.notices
    assert to_json(page)["rows"][0]["honesty"] is None and honesty_text(tmp_path / "honesty.json") == ""


def test_json(tmp_path: Path) -> None:
    (row,) = to_json(_page(tmp_path, CHECKS))["rows"]
    assert row["honesty"]["samples"] == 64 and [check["id"] for check in row["honesty"]["checks"]][2] == "E5"


def test_lines_for_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "honesty.json"
    write_json(path, {"schema": 1, "samples": 64, "checks": CHECKS})
    first, second, last = honesty_text(path).splitlines()
    assert first == "FAIL E5 about E5: E5 says so" and second.startswith("WARN M6") and last.endswith("1 skipped")
    write_json(path, {"schema": 1, "samples": 0, "checks": []})
    assert honesty_text(path) == LEFT_OUT


def test_a_damaged_or_newer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "honesty.json"
    write_json(path, {"schema": 1, "samples": 64, "checks": [{"id": "M1"}]})
    with pytest.raises(CorruptError, match=r"honesty\.json"):
        read_honesty(path)
    write_json(path, {"schema": 2, "samples": 64, "checks": []})
    with pytest.raises(InputError, match="newer phalanx"):
        read_honesty(path)
