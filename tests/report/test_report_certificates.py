from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import MODEL_SHA256, make_source, page_of

from phalanx.errors import CorruptError
from phalanx.report import Page, RowSource, render_html, terminal_table, to_json
from phalanx.report.formats import to_csv
from phalanx.report.opening import headlines, opening


def record(**changes: Any) -> dict[str, Any]:
    """Of 10 images 7 right beyond rounding, 2 of them certified at 8/255."""
    radii = [0.0, 0.01, 0.02, 0.2, 8 / 255, 0.029, 0.025, 0.9, 0.0, 0.0]
    reasons = ["certified"] * 7 + ["misclassified"] * 3
    return {
        "schema": 1,
        "norm": "Linf",
        "method": "crown",
        "n": 10,
        "ids": list(range(10)),
        "radii": radii,
        "reasons": reasons,
        "grid": [{"radius": 0.0, "certified": 7, "low": 0.4, "high": 0.9}],
        "vacuous": "",
        "model_sha256": MODEL_SHA256,
        **changes,
    }


def certified(tmp_path: Path, **changes: Any) -> Page:
    source: RowSource = make_source(tmp_path)
    assert source.run is not None
    folder = source.run / "certificates" / "Linf-crown-best-all"
    folder.mkdir(parents=True)
    (folder / "certificates.json").write_text(json.dumps(record(**changes)))
    return page_of(source)


def test_certified_stands_beside_attacked_at_the_same_radius(tmp_path: Path) -> None:
    page = certified(tmp_path)
    html = render_html(page)
    assert "<h4>Certified beside attacked accuracy</h4>" in html
    # Wilson: 2 of 10 certified, 5 of 10 held
    assert "<td>8/255</td><td>20.0 [5.7, 51.0]</td><td>50.0 [23.7, 76.3]</td>" in html
    assert "<td>0</td><td>70.0 [39.7, 89.2]</td><td>–</td>" in html
    assert [one.share for one in headlines(page)[0].figures] == ["50.0 %", "–", "80.0 %", "50.0 %", "20.0 %", "30.0 %"]
    assert to_json(page)["rows"][0]["certificates"][0]["certified_at_eps"] == 2


def test_another_norm_has_no_attacked_accuracy_beside_it(tmp_path: Path) -> None:
    page = certified(tmp_path, norm="L2", vacuous="the bound is vacuous: 1e9")
    html = render_html(page)
    assert "<td>0</td><td>70.0 [39.7, 89.2]</td><td>–</td>" in html and "<td>8/255</td><td>20.0" not in html
    assert "the bound is vacuous: 1e9." in html
    assert len(headlines(page)[0].figures) == 3


def test_certificates_of_other_weights_are_left_out(tmp_path: Path) -> None:
    page = certified(tmp_path, model_sha256="00" * 32)
    assert page.rows[0].certificates == () and "Certified beside" not in render_html(page)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 11},
        {"ids": [1] * 10},
        {"reasons": "all"},
        {"radii": ["a"] * 10},
        {"grid": [{"radius": 0.0, "certified": 11}]},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"certificates\.json"):
        certified(tmp_path, **changes)


def test_every_image_is_broken_certified_or_undecided(tmp_path: Path) -> None:
    page = certified(tmp_path)
    assert to_json(page)["rows"][0]["threefold"] == {
        "n": 10,
        "broken": 5,
        "certified": 2,
        "undecided": 3,
        "contradictions": [],
    }
    assert [one.name for one in headlines(page)[0].figures][3:] == ["Broken", "Certified", "Undecided"]
    assert "Broken, certified or undecided" in render_html(page) and "undecided, %" in terminal_table(page)
    assert not [notice for notice in page.notices if notice.kind == "fail"]


def test_attacked_accuracy_of_other_images_is_not_set_beside_a_certificate(tmp_path: Path) -> None:
    (beside,) = (one for one in certified(tmp_path).rows[0].certificates)
    assert beside.same_images
    page = certified(tmp_path / "fewer", n=5, ids=[0, 1, 2, 3, 4], radii=[0.1] * 5, reasons=["certified"] * 5, grid=[])
    assert not page.rows[0].certificates[0].same_images
    assert "50.0 [23.7, 76.3]</td>" not in render_html(page).split("Certified beside attacked")[1].split("</table>")[0]


def test_a_spreadsheet_has_the_three_shares(tmp_path: Path) -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(certified(tmp_path))))
    assert (row["broken"], row["certified"], row["undecided"]) == ("0.5", "0.2", "0.3")
    assert 0.05 < float(row["certified_low"]) < 0.2 < float(row["certified_high"]) < 0.6


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_certificate_that_an_attack_disproved_is_an_alarm(tmp_path: Path, norm: str) -> None:
    """Sample 6 is broken within 8/255 in Linf: an Linf certificate of more is false, an L2 one need not be."""
    radii = [0.0] * 6 + [0.04] + [0.0] * 3
    page = certified(tmp_path, norm=norm, radii=radii)
    failed = [notice.text for notice in page.notices if notice.kind == "fail"]
    if norm == "L2":
        assert failed == [] and page.rows[0].threefold is None
        return
    (text,) = failed
    assert (
        "1 certificate is contradicted: sample 6 is certified within 0.04 (Linf, crown), but pgd-50 broke it at" in text
    )
    assert page.rows[0].threefold is not None and page.rows[0].threefold.certified.held == 0
    assert headlines(page)[0].failed and "not to be quoted" in opening(page)[2][1]
    assert "sample 6" in render_html(page) and "FAIL AT:" in terminal_table(page)
    assert to_json(page)["rows"][0]["threefold"]["contradictions"][0]["attack"] == "pgd-50"
