"""Accuracy against the radius and the steps, and attacks outside the threat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_sample import make_source, page_of, spec

from phalanx.report import Page, render_html, terminal_table, to_json
from phalanx.report.lines import headline_lines
from phalanx.report.sections import outside_table
from phalanx.report.sweeps import kind, printed_points, sweep_plot
from phalanx.report.text import WIDTH
from phalanx.runs.rate import Rate


def fgsm(*radii: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """Budgets by name; FGSM has no steps."""
    budgets = {f"fgsm:{eps}": spec("FGSM", eps=eps, **changes) for eps in radii}
    for budget in budgets.values():
        del budget["steps"], budget["restarts"]
    return budgets


def pgd(*steps: int, **changes: Any) -> dict[str, dict[str, Any]]:
    return {f"pgd-{count}": spec(steps=count, **changes) for count in steps}


def swept(
    folder: Path, attacks: Mapping[str, str], budgets: Mapping[str, Mapping[str, Any]], label: str = "A", **more: Any
) -> Any:
    """A row of ten images, eight right when clean."""
    return make_source(folder, label, attacks=attacks, specs=budgets, **more)


RADII = {"fgsm:0.01": "hhhhhhhb", "fgsm:0.02": "hhhhhhbb", "fgsm:0.03": "hhhhbbbb", "fgsm:0.09": "hbbbbbbb"}


@pytest.fixture
def radii(tmp_path: Path) -> Page:
    """Two rows; the second faced one radius less. The ledgers' is 8/255."""
    fewer = {name: "hhhhhhhh" for name in RADII if name != "fgsm:0.09"}
    budgets = fgsm("0.01", "0.02", "0.03", "0.09")
    first = swept(tmp_path, RADII, budgets, "A")
    return page_of(first, swept(tmp_path, fewer, {name: budgets[name] for name in fewer}, "B"))


def test_attacks_that_differ_in_their_radius_alone_are_a_sweep(radii: Page) -> None:
    (sweep,) = radii.sweeps
    assert (sweep.over, sweep.names, sweep.values) == (
        "eps",
        ("0.01", "0.02", "0.03", "0.09"),
        (0.01, 0.02, 0.03, 0.09),
    )
    assert [rate and rate.held for rates in sweep.rates for rate in rates] == [7, 8, 6, 8, 4, 8, 1, None]
    assert [attack.name for attack in sweep.attacks] == list(RADII)
    assert kind(sweep) == "FGSM"


def test_a_radius_beyond_the_threat_is_in_no_column(radii: Page) -> None:
    first, second = radii.rows
    # 0.01, 0.02 and 0.03 lie inside 8/255
    assert first.worst == first.columns["RA"] == Rate(4, 10)
    assert second.worst == Rate(8, 10)
    assert [attack.name for attack in radii.attacks] == ["fgsm:0.01", "fgsm:0.02", "fgsm:0.03"]
    assert [attack.name for attack in radii.outside] == ["fgsm:0.09"]
    assert [done and done.held for row in radii.rows for done in row.outside] == [1, None]
    assert radii.columns[1].attacks == ("fgsm:0.01", "fgsm:0.02", "fgsm:0.03")
    assert [found.worst for found in first.classes] == [Rate(4, 10)]


def test_the_curve_has_a_line_for_each_model(radii: Page) -> None:
    plot = sweep_plot("sweep", radii, radii.sweeps[0])
    assert plot.title == "Robust accuracy by Linf radius: FGSM"
    assert plot.head == ("Linf radius", "A, %", "B, %")
    assert all(f"var(--series-{number})" in plot.svg for number in (1, 2))
    assert [line[0] for line in plot.lines] == ["0.01", "0.02", "0.03", "0.09"]
    # Wilson: 7 of 10 is [0.397, 0.892]
    assert plot.lines[0] == ("0.01", "70.0 [39.7, 89.2]", "80.0 [49.0, 94.3]")
    assert plot.lines[-1] == ("0.09", "10.0 [1.8, 40.4]", "–")
    text = render_html(radii)
    assert text.count("<figcaption>Robust accuracy by Linf radius: FGSM</figcaption>") == 1
    assert "fgsm:0.01, fgsm:0.02, fgsm:0.03 and fgsm:0.09." in text


def test_the_curve_is_in_the_table_file(radii: Page) -> None:
    table = json.loads(json.dumps(to_json(radii), allow_nan=False))
    (sweep,) = table["sweeps"]
    assert (sweep["attack"], sweep["over"], sweep["values"]) == ("FGSM", "eps", [0.01, 0.02, 0.03, 0.09])
    assert (sweep["as_written"], sweep["attacks"]) == (["0.01", "0.02", "0.03", "0.09"], list(RADII))
    first, second = sweep["rows"]
    assert [rate["held"] for rate in first["accuracies"]] == [7, 6, 4, 1]
    assert (second["label"], second["accuracies"][3]) == ("B", None)
    assert [attack["label"] for attack in table["outside_attacks"]] == ["fgsm:0.09"]
    assert [len(row["outside_attacks"]) for row in table["rows"]] == [1, 0]
    assert [attack["label"] for attack in table["rows"][0]["attacks"]] == ["fgsm:0.01", "fgsm:0.02", "fgsm:0.03"]


STEPS = {"pgd-10": "hhhhhhhh", "pgd-20": "hhhhhhhb", "pgd-50": "hhhhhhbb"}


def test_what_a_paper_printed_of_a_curve_stands_in_its_data(tmp_path: Path) -> None:
    printed = {"A": {"SA": 92.35, "fgsm:0.01": 52.32, "fgsm:0.09": 11.0}, "B": {"pgd-20": 1.0}}
    budgets = fgsm("0.01", "0.02", "0.03", "0.09")
    rows = [swept(tmp_path, RADII, budgets, label) for label in "AB"]
    page = page_of(*rows, reported=printed, reported_source="a paper")
    (sweep,) = page.sweeps
    plot = sweep_plot("curve", page, sweep)
    assert plot.head == ("Linf radius", "A, %", "B, %", "A, reported, %")
    assert [line[3] for line in plot.lines] == ["52.32", "–", "–", "11.00"]
    assert "What the paper printed stands in the data" in plot.note
    # whose number it would be is not clear where two attacks share a radius
    assert printed_points(["fgsm:0.01", "fgsm:2/200", "fgsm:0.02"], 2, {"A": {"fgsm:0.01": 52.32}}).head == ()
    # one that is printed for a curve alone has no line in the first table
    assert len(headline_lines(page.rows[0], page)) == 2 and len(headline_lines(page.rows[1], page)) == 1
    with pytest.raises(ValueError, match=r"reported columns must be among .* got 'fgsm-0.01'"):
        page_of(rows[0], reported={"A": {"fgsm-0.01": 1.0}})


def test_steps_are_swept_too(tmp_path: Path) -> None:
    page = page_of(swept(tmp_path, STEPS, pgd(10, 20, 50)))
    (sweep,) = page.sweeps
    assert (sweep.over, sweep.names) == ("steps", ("10", "20", "50"))
    assert [rate and rate.held for (rate,) in sweep.rates] == [8, 7, 6]
    assert sweep_plot("sweep", page, sweep).title == "Robust accuracy by steps: PGD, Linf 8/255"
    assert sweep_plot("sweep", page, sweep).head == ("steps", "A, %")


def test_two_points_are_no_curve(tmp_path: Path) -> None:
    two = {name: STEPS[name] for name in ("pgd-10", "pgd-50")}
    assert page_of(swept(tmp_path, two, pgd(10, 50), "A")).sweeps == ()
    # three over both rows, two in each
    other = {name: STEPS[name] for name in ("pgd-10", "pgd-20")}
    rows = [swept(tmp_path, two, pgd(10, 50), "B"), swept(tmp_path, other, pgd(10, 20), "C")]
    assert page_of(*rows).sweeps == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"surface": "experts"}, "on experts"),
        ({"objective": "margin"}, "objective margin"),
        ({"restarts": 4}, "4 restarts"),
        ({"eot": 8}, "8 EoT passes"),
    ],
)
def test_only_one_number_may_differ(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    radii = {f"pgd-50:{eps}": spec(eps=eps) for eps in ("1/255", "2/255")}
    radii["other"] = spec(eps="3/255", **change)
    page = page_of(swept(tmp_path, dict.fromkeys(radii, "hhhhhhhh"), radii, "A"))
    assert page.sweeps == ()
    alike = {name: {**budget, **change} for name, budget in radii.items()}
    page = page_of(swept(tmp_path, dict.fromkeys(alike, "hhhhhhhh"), alike, "B"))
    assert [kind(sweep) for sweep in page.sweeps] == [f"PGD, 50 steps, {says}"]


def test_other_attacks_are_not_swept(tmp_path: Path) -> None:
    budgets = {f"steer-{steps}": spec("RouteSteering", steps=steps) for steps in (10, 20, 30)}
    assert page_of(swept(tmp_path, dict.fromkeys(budgets, "hhhhhhhh"), budgets)).sweeps == ()


def test_of_two_attacks_with_one_radius_the_lower_is_drawn(tmp_path: Path) -> None:
    budgets = {"fgsm": fgsm("8/255")["fgsm:8/255"], **fgsm("8/255", "0.01", "0.02")}
    attacks = {**dict.fromkeys(budgets, "hhhhhhhh"), "fgsm": "hhhbbbbb"}
    (sweep,) = page_of(swept(tmp_path, attacks, budgets)).sweeps
    assert sweep.names == ("0.01", "0.02", "8/255")
    assert sweep.rates[-1] == (Rate(3, 10),)


def test_an_attack_that_did_not_end_is_no_point(tmp_path: Path) -> None:
    page = page_of(swept(tmp_path, {**STEPS, "pgd-100": "hh......"}, pgd(10, 20, 50, 100)))
    (sweep,) = page.sweeps
    assert sweep.rates[-1] == (None,)


# -- outside the threat --------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Page:
    """One attack inside, two outside: a larger radius on a surface, and another norm."""
    budgets = {
        "pgd-50": spec(),
        "pgd-50@experts:16/255": spec(eps="16/255", surface="experts"),
        "pgd-50:1/2": spec(eps="1/2", norm="L2"),
    }
    attacks = {"pgd-50": "hhhhhbbb", "pgd-50@experts:16/255": "hbbbbbbb", "pgd-50:1/2": "bbbbbbbb"}
    return page_of(swept(tmp_path, attacks, budgets))


def test_what_is_outside_counts_nowhere(outside: Page) -> None:
    (row,) = outside.rows
    assert row.worst == Rate(5, 10) == row.columns["RA"]
    assert row.columns.get("RA-E") is None
    assert [attack.label for attack in outside.attacks] == ["pgd-50"]
    said = " ".join([*outside.summary, *outside.caveats, *(notice.text for notice in outside.notices)])
    assert "16/255" not in said and "1/2" not in said and "under pgd-50 (Linf 8/255)" in said
    assert "Not every row" not in said


def test_it_has_a_table_of_its_own(outside: Page) -> None:
    table = outside_table(outside)
    assert table is not None
    assert table.lines == (
        ("A", "pgd-50:1/2", "L2 1/2", "10", "0.0 [0.0, 27.8]"),
        ("A", "pgd-50@experts:16/255", "Linf 16/255", "10", "10.0 [1.8, 40.4]"),
    )
    text = render_html(outside)
    assert text.count("<h4>Outside the threat</h4>") == 1
    assert "<h3>Attacks outside the threat</h3>" in text
    assert "RA, pgd-50:1/2" not in text
    shown = terminal_table(outside)
    assert "Outside the threat\n\nmodel  attack " in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


def test_what_a_curve_shows_is_not_told_twice(radii: Page) -> None:
    assert "<h4>Outside the threat</h4>" not in render_html(radii)
    assert "<h3>Attacks outside the threat</h3>" in render_html(radii)
    # the terminal has no curves
    assert "Outside the threat" in terminal_table(radii)
    assert "Outside the threat" not in terminal_table(replace(radii, rows=radii.rows * 2))
    assert outside_table(radii, without=radii.outside) is None


def test_without_any_there_is_no_such_table(page: Page) -> None:
    assert page.outside == () and page.sweeps == () and outside_table(page) is None
    assert "utside the threat" not in render_html(page) + terminal_table(page)


def test_attacks_outside_the_threat_alone_are_no_attack(tmp_path: Path) -> None:
    budgets = {"pgd-50:16/255": spec(eps="16/255")}
    page = page_of(swept(tmp_path, {"pgd-50:16/255": "hhhhhhhh"}, budgets))
    assert page.rows[0].worst is None
    assert page.caveats[0].startswith("No attack has been run")


def test_smaller_radii_alone_are_said_to_be_small(tmp_path: Path, page: Page) -> None:
    small = page_of(swept(tmp_path, {"fgsm:0.01": "hhhhhhhh"}, fgsm("0.01"), "A"))
    says = "No attack on A had the whole radius of the threat: a larger perturbation may break more."
    assert says in small.caveats
    assert not [caveat for caveat in page.caveats if "whole radius" in caveat]
    assert "under fgsm:0.01 (Linf 0.01)." in small.summary[1]
    both = {**fgsm("0.01"), **fgsm("16/510")}
    whole = page_of(swept(tmp_path, dict.fromkeys(both, "hhhhhhhh"), both, "B"))
    assert not [caveat for caveat in whole.caveats if "whole radius" in caveat]
    assert "over fgsm:0.01 and fgsm:16/510 (Linf 16/510)." in whole.summary[1]
