from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_sample import make_evaluation, make_run, page_of

from phalanx.errors import InputError
from phalanx.report import Page, RowSource, read_formats, write_report
from phalanx.report.files import DEFAULT_FORMATS, FORMATS
from phalanx.report.formats import to_csv, to_latex, to_markdown

NASTY = "[a] & b_1 | $x$ 50% {c} \\d"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """Two rows; of the first a paper printed RA."""
    run = make_run(tmp_path / "run", records=[])
    return page_of(
        RowSource(NASTY, run, make_evaluation(tmp_path / "first")),
        RowSource("plain", run, make_evaluation(tmp_path / "second", attacks={}, load=None)),
        reported={NASTY: {"RA": 69.09}},
        reported_source="Table 3",
    )


def test_csv_has_counts_as_shares_with_their_interval(page: Page) -> None:
    first, second = csv.DictReader(io.StringIO(to_csv(page)))
    assert first["model"] == NASTY and (first["n"], first["eps"], first["seed"]) == ("10", "8/255", "0")
    assert (first["SA"], first["RA"], first["worst"]) == ("0.8", "0.5", "0.5")
    assert (round(float(first["RA_low"]), 3), round(float(first["RA_high"]), 3)) == (0.237, 0.763)
    assert (first["RA_reported_percent"], second["RA_reported_percent"]) == ("69.09", "")
    assert second["RA"] == second["RA_low"] == "" and second["SA"] == "0.8"


def test_latex_escapes_what_it_would_read(page: Page) -> None:
    lines = to_latex(page).splitlines()
    (row,) = (line for line in lines if "measured" in line and not line.startswith("%"))
    assert row.startswith(r"{}[a] \& b\_1 | \$x\$ 50\% \{c\} \textbackslash{}d (measured) & 80.0 & 50.0 & ")
    assert row.endswith(r"50.0 [23.7, 76.3] \\")
    assert "plain & 80.0 & -- & -- \\\\" in lines
    assert lines[-1] == r"\end{tabular}" and any(line.startswith("% RA: ") for line in lines)
    width = len(
        next(line for line in lines if line.startswith(r"\begin")).removeprefix(r"\begin{tabular}{").rstrip("}")
    )
    cells = {line.count(" & ") + 1 for line in lines if line.endswith(r"\\")}
    assert cells == {width}


def test_markdown_escapes_what_it_would_read(page: Page) -> None:
    lines = to_markdown(page).splitlines()
    assert lines[0] == "| Model | SA | RA | worst case |" and lines[1] == "|---|---:|---:|---:|"
    assert lines[2].startswith(r"| \[a\] & b\_1 \| $x$ 50% {c} \\d (measured) | 80.0 | 50.0 |")
    assert lines[3] == "| (reported) | – | 69.09 | – |"
    assert lines[4] == "| plain | 80.0 | – | – |"
    assert any(line.startswith("- RA: ") for line in lines)


def test_every_format_gives_the_same_bytes_again(page: Page, tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", page, tuple(FORMATS))
    again = write_report(tmp_path / "b", page, tuple(FORMATS))
    assert {path.name: path.read_bytes() for path in first.values()} == {
        path.name: path.read_bytes() for path in again.values()
    }
    assert sorted(first) == ["report.html", "table.csv", "table.json", "table.md", "table.tex", "table.txt"]


def test_formats_are_named_with_commas_or_one_by_one() -> None:
    assert read_formats([]) == DEFAULT_FORMATS
    assert read_formats(["csv, latex", "csv", "html"]) == ("csv", "latex", "html")
    with pytest.raises(InputError, match="must be among html, json, text, csv, latex, markdown, got 'pdf'"):
        read_formats(["html,pdf"])
