from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import (
    analysis,
    dual_config,
    dual_spec,
    epochs,
    make_evaluation,
    make_run,
    make_source,
    make_view,
    page_of,
    spec,
)

from phalanx.errors import CorruptError, InputError
from phalanx.report import Page, RowSource, render_html, to_json
from phalanx.report.analysis import MarginChange, margin_changes, read_analysis
from phalanx.report.curves import Curves, ValidationPoint
from phalanx.report.sections import across_rows, of_row
from phalanx.runs.rate import Rate


def _table(page: Page, title: str) -> tuple[tuple[str, ...], ...]:
    (table,) = [table for table in across_rows(page) if table.title.startswith(title)]
    return (table.head, *table.lines)


# -- analysis.json -------------------------------------------------------------------------------------------------


def test_an_analysis_is_told_gate_by_gate_and_class_by_class(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, analysis=analysis()))
    (row,) = page.rows
    assert row.analysis is not None
    assert row.analysis.gates[0].flipped == Rate(3, 10)
    gate, margins = of_row(row)
    assert gate.lines == (
        # Wilson: 5 of 6, 3 of 6, 7 of 10, 4 of 10; 4 of 4, 1 of 4, 6 of 10, 2 of 10
        ("0", "60.0", "30.0", "6", "83.3 [43.6, 97.0]", "50.0 [18.8, 81.2]", "70.0 [39.7, 89.2]", "40.0 [16.8, 68.7]"),
        ("1", "40.0", "70.0", "4", "100.0 [51.0, 100.0]", "25.0 [4.6, 69.9]", "60.0 [31.3, 83.2]", "20.0 [5.7, 51.0]"),
    )
    assert "Of 10 images, 30.0 % [10.8, 60.3] go to another set of experts under pgd-20" in gate.note
    assert "0.25 nats clean, 0.50 attacked; of an even one 0.69" in gate.note  # ln 2
    # Wilson: 9 of 10, 6 of 10
    assert "knew the label would be right on 90.0 % [59.6, 98.2] and hold 60.0 % [31.3, 83.2]" in gate.note
    assert margins.head == ("class", "n", "model, clean", "model, attacked")
    assert margins.lines == (("0", "2", "+0.600", "+0.100"), ("1", "8", "–", "–"))
    assert "without 1 whose answer was not finite" in margins.note
    text = render_html(page)
    assert "<h4>Routing and single experts</h4>" in text
    assert to_json(page)["rows"][0]["analysis"]["attack"] == "pgd-20"
    json.dumps(to_json(page), allow_nan=False)


def test_a_dual_model_has_two_gates_and_three_margins(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dual_config(), epochs(1), model_spec=dual_spec())
    page = page_of(RowSource("J", run, make_evaluation(tmp_path / "e", load=None, analysis=analysis(duals=True))))
    standard, robust, margins = of_row(page.rows[0])
    assert (standard.title, robust.title) == (
        "Routing and single experts, standard half",
        "Routing and single experts, robust half",
    )
    assert "knew the label" not in standard.note + robust.note
    assert margins.head[2:] == (
        "model, clean",
        "model, attacked",
        "standard, clean",
        "standard, attacked",
        "robust, clean",
        "robust, attacked",
    )


def test_without_the_file_there_is_no_analysis(page: Page) -> None:
    assert page.rows[0].analysis is None
    assert "Margins by class" not in render_html(page)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": "ten"}, r"analysis\.json: n should be a whole number"),
        ({"counts": [1, 2, 3]}, r"should have 2 numbers in counts, got 3"),
        ({"margins": {}}, r"margins\.model should be an object, got null"),
        ({"margins": {"model": {"clean": [0.1], "attacked": [0.1]}}}, r"model should have 2 numbers in clean, got 1"),
        (
            {"margins": {"model": {"clean": [0.1, "x"], "attacked": [0.1]}}},
            r"clean should be a list of numbers or nulls",
        ),
        ({"gates": [1]}, r"gates should be a list of objects, got \[1\]"),
        ({"oracle": {"n": 1, "clean": 2, "robust": 0}}, r"oracle should count robust <= clean <= n"),
    ],
)
def test_a_damaged_analysis_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({**analysis(), **change}))
    with pytest.raises(CorruptError, match=says):
        read_analysis(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"own": []}, r"gates\[0\] should tell of 2 experts"),
        ({"load_clean": [1.0]}, r"gates\[0\] should have 2 numbers in load_clean, got 1"),
        ({"flipped": 1.5}, r"flipped should be a number in \[0, 1\]"),
        ({"own": [{"n": 1, "clean": 2, "robust": 0}] * 2}, r"own\[0\] should count robust <= clean <= n"),
    ],
)
def test_a_damaged_gate_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    damaged = analysis()
    damaged["gates"][0].update(change)
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(CorruptError, match=says):
        read_analysis(path)


def test_a_newer_analysis_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({**analysis(), "schema": 2}))
    with pytest.raises(InputError, match="schema 2, this version reads up to 1"):
        read_analysis(path)


def test_an_entropy_may_be_missing(tmp_path: Path) -> None:
    found = analysis()
    found["gates"][0]["entropy_attacked"] = None
    page = page_of(make_source(tmp_path, analysis=found))
    assert "0.25 nats clean, – attacked" in of_row(page.rows[0])[0].note


# -- margins of two dual models ------------------------------------------------------------------------------------


def test_margins_change_in_points_and_in_percent() -> None:
    # 0.3 against 0.2 is 10 points and half as much again; against -0.2 it is 50 points, 2.5 times its size
    assert MarginChange(0.3, 0.2).points == pytest.approx(10)
    assert MarginChange(0.3, 0.2).relative == pytest.approx(50)
    assert MarginChange(0.3, -0.2).relative == pytest.approx(250)
    assert MarginChange(0.3, 0.0).relative is None
    assert margin_changes((0.1, None, 0.2), (0.1, 0.1, None)) == (MarginChange(0.1, 0.1), None, None)


def _duals(folder: Path, **view_analysis: Any) -> list[RowSource]:
    """A trained dual model with a margin of 0.3 under attack and a view with 0.2, both at alpha 0.7."""
    standard, robust = make_run(folder / "st", records=[]), make_run(folder / "rt", records=[])
    trained = make_run(folder / "jtd", dual_config(), [], model_spec=dual_spec())
    seen = {**analysis(duals=True, margins=0.2), **view_analysis}
    return [
        make_view(folder, "view", standard, robust, 0.7, analysis=seen),
        make_view(folder, "other alpha", standard, robust, 0.8, analysis=seen),
        RowSource("JTDMoE", trained, make_evaluation(folder / "e", analysis=analysis(duals=True, margins=0.3))),
    ]


def test_a_trained_dual_model_is_compared_with_the_view_of_its_alpha(tmp_path: Path) -> None:
    page = page_of(*_duals(tmp_path))
    head, *lines = _table(page, "Margin change by class: JTDMoE against view")
    assert head == ("class", "clean, points", "clean, %", "attacked, points", "attacked, %")
    # clean 0.8 against 0.7, attacked 0.3 against 0.2
    assert lines == [("0", "+10.00", "+14.29", "+10.00", "+50.00"), ("1", "–", "–", "–", "–")]
    (made,) = to_json(page)["margin_changes"]
    assert (made["trained"], made["view"], made["alpha"]) == ("JTDMoE", "view", 0.7)
    assert made["classes"][0]["attacked"]["points"] == pytest.approx(10)
    assert made["classes"][1]["attacked"] is None


@pytest.mark.parametrize("other", [{"attack": "pgd-50"}, {"counts": [3, 7]}])
def test_margins_of_other_images_or_attacks_do_not_compare(tmp_path: Path, other: dict[str, Any]) -> None:
    assert page_of(*_duals(tmp_path, **other)).margin_comparisons == ()


# -- from the ledger and the metrics -------------------------------------------------------------------------------


def test_routes_changed_are_told_of_the_attacked_images(tmp_path: Path) -> None:
    page = page_of(
        make_source(tmp_path, "A", clean="hhhhb", attacks={"pgd-50": "hhbb"}, flips="ynny"),
        make_source(tmp_path, "B", clean="hhhhb", attacks={"pgd-50": "hhbb"}),
    )
    assert _table(page, "Routes changed") == (("attack", "A", "B"), ("pgd-50", "50.0 of 4", "–"))
    (attack,) = to_json(page)["rows"][0]["attacks"]
    assert (attack["routed"], attack["flipped"]) == (4, 2)


def test_no_route_no_table(page: Page) -> None:
    assert "Routes changed by each attack" not in [table.title for table in across_rows(page)]


def test_each_class_has_its_accuracies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", class_names=["cat", "dog"])
    evaluation = make_evaluation(
        tmp_path / "e",
        clean="hhhhb",
        attacks={"pgd-50": "hbhh", "fgsm": "hhbh"},
        specs={"pgd-50": spec(), "fgsm": spec("FGSM")},
        labels=[0, 0, 1, 1, 1],
    )
    page = page_of(RowSource("A", run, evaluation))
    assert [(found.name, found.clean, found.worst) for found in page.rows[0].classes] == [
        ("cat", Rate(2, 2), Rate(1, 2)),
        ("dog", Rate(2, 3), Rate(1, 3)),
    ]
    head, *lines = _table(page, "Accuracy by class")
    assert head == ("class", "n", "A: SA", "A: worst case")
    assert lines[1] == ("dog", "3", "66.7 [20.8, 93.9]", "33.3 [6.1, 79.2]")


def test_a_label_without_a_name_is_a_number(tmp_path: Path) -> None:
    source = make_source(tmp_path, clean="hh", attacks={"pgd-50": "hh"}, labels=[12, 3])
    assert [found.name for found in page_of(source).rows[0].classes] == ["3", "12"]


def _curves(*robust: int) -> Curves:
    points = [ValidationPoint(epoch, Rate(9, 10), Rate(held, 10)) for epoch, held in enumerate(robust)]
    return Curves((), tuple(points), "pgd-10")


def test_stability_by_hand() -> None:
    # falls of 1 and 3 of 10
    assert _curves(5, 4, 8, 5).largest_drop == pytest.approx(0.3)
    assert _curves(5, 6).largest_drop == 0.0
    # mean 0.6, squares 0.04 twice: sqrt(0.08)
    assert _curves(4, 8).late_deviation == pytest.approx(0.08**0.5)
    # only the last 10 count
    assert _curves(0, *[5] * 10).late_deviation == 0.0
    assert (_curves(5).largest_drop, _curves(5).late_deviation) == (None, None)


def test_stability_is_told_of_what_was_validated(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", records=epochs(2)), make_run(tmp_path / "b", records=[])]
    page = page_of(*(RowSource(run.name, run, make_evaluation(tmp_path / f"{run.name}.e")) for run in runs))
    # epochs(2): 0.35, then 0.6: standard deviation 0.25 / sqrt(2)
    assert _table(page, "Stability")[1:] == (("a", "2", "0.0", "17.7", "pgd-10, Linf 8/255"),)
    assert to_json(page)["rows"][1]["stability"] == {"validations": 0, "largest_drop": None, "late_deviation": None}
