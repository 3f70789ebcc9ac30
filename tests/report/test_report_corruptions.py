from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.errors import CorruptError
from phalanx.report.corruptions import corruptions_table, covered, read_corruptions
from phalanx.report.threats import result, under
from phalanx.runs.threats import coverage

RECORD: dict[str, Any] = {
    "schema": 1,
    "n": 10,
    "clean": 9,
    "corruptions": [
        {"name": "gaussian_noise", "correct": [9, 8, 7, 6, 5]},
        {"name": "contrast", "correct": [9, 9, 9, 9, 9]},
    ],
}


def written(tmp_path: Path, **changed: Any) -> Path:
    path = tmp_path / "corruptions.json"
    path.write_text(json.dumps(RECORD | changed))
    return path


def test_the_table_has_a_line_for_each_corruption(tmp_path: Path) -> None:
    found = read_corruptions(written(tmp_path))
    assert found is not None and found.mean == pytest.approx(0.8)
    assert found.to_json()["accuracy"]["contrast"] == [0.9] * 5
    table = corruptions_table([("A", found), ("B", None)])
    assert table is not None and len(table.head) == 8 and {len(line) for line in table.lines} == {8}
    assert [line[1] for line in table.lines] == ["none (n = 10)", "gaussian noise", "contrast", "mean of all"]
    assert [line[-1] for line in table.lines][1:] == ["70.0", "90.0", "80.0"]
    assert table.lines[1][6].startswith("50.0 [")
    assert corruptions_table([("B", None)]) is None


def test_it_fills_its_line_of_the_threat_coverage_and_no_other(tmp_path: Path) -> None:
    threats = coverage([], {}, "Linf", "8/255")
    assert covered(threats, None) == threats
    filled = covered(threats, read_corruptions(written(tmp_path)))
    changed = [line for line, before in zip(filled, threats, strict=True) if line != before]
    (line,) = changed
    assert (line.threat, line.status, line.tried, line.broken) == ("corruption", "measured", 100, 20)
    assert result(line).startswith("broke 20 of 100 images, 20.0 %")
    assert under(line) == "gaussian_noise and contrast, severities 1 to 5"


@pytest.mark.parametrize(
    "changed",
    [
        {"clean": 11},
        {"corruptions": []},
        {"corruptions": [{"name": "x", "correct": []}]},
        {"corruptions": [{"name": "x", "correct": [11]}]},
        {"corruptions": [{"name": "x", "correct": [1.5]}]},
        {"corruptions": [{"name": "x", "correct": [None]}]},
        {"n": "many"},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"corruptions\.json"):
        read_corruptions(written(tmp_path, **changed))
    assert read_corruptions(tmp_path / "gone.json") is None
