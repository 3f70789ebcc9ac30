from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_sample import analysis, epochs, make_evaluation, make_run, make_source, page_of

from phalanx.report import Page, RowSource, render_html
from phalanx.report.honesty_tables import honesty_matrix
from phalanx.report.opening import headlines, opening
from phalanx.report.page_plots import of_row_plots, radius_plot, validation_plot
from phalanx.report.plots import Series, line_plot


def test_three_sentences_say_what_how_robust_and_what_to_distrust(page: Page) -> None:
    told = opening(page)
    assert [head for head, _ in told] == ["What was trained", "How robust it is", "What to distrust"]
    assert told[0][1] == (
        "One model was evaluated on digits: AT (4 small_cnn experts, 1 of which answers each image, 36,282 parameters, "
        "trained with method at)."
    )
    assert "50.0 % [23.7, 76.3] under pgd-50 (Linf 8/255)" in told[1][1]
    assert told[2][1].startswith("Only PGD has been run, no AutoAttack: ")
    assert told[2][1].endswith("; 4 more caveats below.")


def test_the_most_robust_row_is_told_whatever_its_place(tmp_path: Path) -> None:
    page = page_of(
        make_source(tmp_path, "weak", attacks={"pgd-50": "hbbbbbbb"}),
        make_source(tmp_path, "strong", attacks={"pgd-50": "hhhhhhbb"}),
    )
    assert "strong classifies" in opening(page)[1][1]
    assert [quoted.label for quoted in headlines(page)] == ["weak", "strong"]


def test_of_many_rows_the_headline_is_of_the_most_robust(tmp_path: Path) -> None:
    held = ("hbbbbbbb", "hhhhhhbb", "hhbbbbbb", "hhhbbbbb")
    page = page_of(*(make_source(tmp_path, f"m{n}", attacks={"pgd-50": text}) for n, text in enumerate(held)))
    assert [quoted.label for quoted in headlines(page)] == ["m1"]
    assert render_html(page).count('<details class="fold"><summary>m2</summary>') == 2


def test_the_headline_has_interval_and_protocol_and_says_that_autoattack_was_not_run(page: Page) -> None:
    (quoted,) = headlines(page)
    assert [(one.share, one.bounds) for one in quoted.figures] == [
        ("50.0 %", "[23.7, 76.3]"),
        ("–", "not run as a whole"),
        ("80.0 %", "[49.0, 94.3]"),
    ]
    assert quoted.protocol == "protocol pgd-50; Linf 8/255; n = 10; 1 attack, 0 of them aimed at routes; seed 0"
    assert not quoted.failed


def check(status: str) -> dict[str, Any]:
    return {"id": "E5", "title": "large eps", "status": status, "sentence": "says so", "evidence": {}}


def with_checks(folder: Path, label: str, status: str) -> RowSource:
    source = make_source(folder, label)
    record = {"schema": 1, "samples": 64, "checks": [check(status)]}
    (source.evaluation / "honesty.json").write_text(json.dumps(record))
    return source


def test_a_failed_check_takes_the_headline_away(tmp_path: Path) -> None:
    page = page_of(with_checks(tmp_path, "A", "fail"), with_checks(tmp_path, "B", "pass"))
    assert opening(page)[2][1] == "All of it: 1 honesty check failed, so the headline is not to be quoted."
    assert [quoted.failed for quoted in headlines(page)] == [True, False]
    matrix = honesty_matrix(page.rows)
    assert matrix is not None and (matrix.head, matrix.lines) == (
        ("check", "A", "B"),
        (("E5 large eps", "fail", "pass"),),
    )
    assert '<td class="is-fail">fail</td><td class="is-pass">pass</td>' in render_html(page)
    assert honesty_matrix(page.rows[:1]) is None


# -- plots ---------------------------------------------------------------------------------------------------------


def test_a_row_is_drawn_by_class_and_by_expert(tmp_path: Path) -> None:
    labels = [0, 1] * 5
    page = page_of(make_source(tmp_path, labels=labels, analysis=analysis()))
    plots = {drawn.title: drawn for drawn in of_row_plots("row", page.rows[0])}
    assert list(plots) == ["Accuracy by class", "Margins by class", "Router load"]
    assert plots["Accuracy by class"].lines[0] == ("0", "5", "80.0 [37.6, 96.4]", "60.0 [23.1, 88.2]")
    # the second class has no images in the analysis
    assert plots["Margins by class"].lines == (("0", "+0.600", "+0.100"),)
    assert plots["Router load"].lines == (("expert 0", "60.0", "30.0"), ("expert 1", "40.0", "70.0"))
    assert all('role="img" aria-label="' in drawn.svg for drawn in plots.values())


def test_without_an_analysis_only_the_classes_are_drawn(page: Page) -> None:
    assert [drawn.title for drawn in of_row_plots("row", page.rows[0])] == ["Accuracy by class"]
    assert radius_plot(page) is None and validation_plot(page) is None


def test_two_trained_rows_share_a_validation_plot(tmp_path: Path) -> None:
    sources = [
        RowSource(label, make_run(tmp_path / label, records=epochs(count)), make_evaluation(tmp_path / f"{label}.e"))
        for label, count in (("A", 2), ("B", 3))
    ]
    drawn = validation_plot(page_of(*sources))
    assert drawn is not None and drawn.head == ("epoch", "A, %", "B, %")
    assert [line[0] for line in drawn.lines] == ["1", "2", "3"] and drawn.lines[2][1] == "–"


def test_no_two_of_many_lines_look_alike_and_no_mark_is_written_over_another() -> None:
    series = [Series(f"m{n}", [0.5, 0.99, 1.0], [1.0, 2.0, 3.0], n) for n in range(16)]
    svg = line_plot("many", series, "y", "d", across="alpha")
    assert ">0.5<" in svg and ">0.99<" in svg and ">1<" not in svg
    looks = set(re.findall(r'<path [^>]*style="([^"]*stroke-width: 1\.7[^"]*)"', svg))
    assert len(looks) == 16


@pytest.mark.parametrize("count", [1, 41])
def test_too_many_classes_are_a_table_alone(tmp_path: Path, count: int) -> None:
    labels = [*range(count)] * 2
    made = make_evaluation(
        tmp_path / "e", clean="h" * len(labels), attacks={"pgd-50": "h" * len(labels)}, labels=labels
    )
    run = make_run(tmp_path / "run", class_names=[str(name) for name in range(count)])
    (row,) = page_of(RowSource("A", run, made)).rows
    assert bool(of_row_plots("row", row)) == (count == 1)
