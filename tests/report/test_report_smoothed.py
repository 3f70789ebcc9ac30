"""Smoothed classifiers on the page: named as what they are, and beside no attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import MODEL_SHA256, make_source, page_of

import tiny
from phalanx.certification import certify_smoothed, smoothed_json
from phalanx.errors import CorruptError
from phalanx.report import Page, render_html, to_json
from phalanx.report.opening import headlines


def record(**changes: Any) -> dict[str, Any]:
    """What is written of ten images, here with counts by hand."""
    data = tiny.digits().test.first(10)
    written = smoothed_json(certify_smoothed(tiny.mixture(2).eval(), data, samples=20), data.ids.tolist())
    grid = [{"radius": 0.25, "certified": 7, "low": 0.4, "high": 0.9}]
    return {**written, "correct": 9, "abstentions": 1, "grid": grid, "model_sha256": MODEL_SHA256, **changes}


def smoothed(tmp_path: Path, **changes: Any) -> Page:
    source = make_source(tmp_path)
    assert source.run is not None
    folder = source.run / "certificates" / "L2-smoothing-0.25-20-best-all"
    folder.mkdir(parents=True)
    (folder / "smoothed.json").write_text(json.dumps(record(**changes)))
    return page_of(source)


def test_it_stands_in_a_table_of_its_own_and_in_no_headline(tmp_path: Path) -> None:
    page = smoothed(tmp_path)
    html = render_html(page)
    assert "<h4>Smoothed classifiers</h4>" in html and "Certified beside" not in html
    # Wilson: 9 and 7 of 10
    assert "<td>90.0 [59.6, 98.2]</td><td>0.25</td><td>70.0 [39.7, 89.2]</td>" in html
    assert page.rows[0].certificates == () and len(headlines(page)[0].figures) == 3
    (found,) = to_json(page)["rows"][0]["smoothed"]
    assert (found["correct"], found["abstentions"], found["sigma"], found["confidence"]) == (9, 1, 0.25, 0.999)


def test_without_any_there_is_no_table(tmp_path: Path) -> None:
    page = smoothed(tmp_path, model_sha256="00" * 32)
    assert page.rows[0].smoothed == () and "Smoothed classifiers" not in render_html(page)


@pytest.mark.parametrize(
    "changes", [{"correct": 11}, {"grid": [{"radius": 0.1, "certified": 11}]}, {"sigma": "x"}, {"confidence": 2}]
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"smoothed\.json"):
        smoothed(tmp_path, **changes)
