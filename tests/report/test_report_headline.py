from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import (
    DUAL,
    RELEASED,
    ROUTING,
    config,
    epochs,
    make_evaluation,
    make_run,
    make_source,
    page_of,
    specs_of,
)

from phalanx.report import Page, RowSource, render_html, terminal_table, to_json
from phalanx.report.headline import column_of, minimum
from phalanx.report.text import WIDTH
from phalanx.runs.rate import Rate

REPORTED = {"A": {"SA": 77.81, "RA": 69.09, "RA-E": 75.71, "RA-R": 59.0}}


@pytest.mark.parametrize(
    ("kind", "surface", "column"),
    [
        ("PGD", "whole", "RA"),
        ("FGSM", "pinned", "RA"),
        ("PGD", "experts", "RA-E"),
        ("PGD", "router", "RA-R"),
        ("PGD", "dense", "smooth"),
        ("PGD", "robust", "RA-RMoE"),
        ("PGD", "standard", "RA-SMoE"),
        ("RouteSteering", "whole", "steering"),
        ("JointMargin", "halves", "steering"),
        ("PGD", "expert-2", None),
        ("Square", "whole", "RA"),
        ("APGDTargeted", "whole", "RA"),
        ("FAB", "pinned", "RA"),
        ("Unheard", "whole", None),
    ],
)
def test_an_attack_counts_in_the_column_of_its_surface(kind: str, surface: str, column: str | None) -> None:
    assert column_of({"attack": kind, "surface": surface}, surface) == column


def test_a_released_attack_has_the_column_of_its_surface() -> None:
    assert column_of({"attack": "ReleasedPGD", "reproduction": True}, "whole") == "RA"
    assert column_of({"attack": "ReleasedPGD"}, "whole") is None


RATES = st.fixed_dictionaries(
    {key: st.none() | st.builds(Rate, st.integers(0, 9), st.just(9)) for key in ("RA", "RA-E", "RA-R", "RA-RMoE")}
)


@given(RATES)
def test_the_papers_minimum_needs_all_of_its_parts(rates: dict[str, Rate | None]) -> None:
    parts = [rates["RA"], rates["RA-E"], rates["RA-R"]]
    held = [rate.held for rate in parts if rate is not None]
    assert minimum(rates, dual=False) == (Rate(min(held), 9) if len(held) == 3 else None)
    assert minimum(rates, dual=True) is None  # there is no RA-SMoE


def test_a_dual_models_minimum_is_over_its_halves() -> None:
    rates: dict[str, Rate | None] = {"RA": Rate(7, 9), "RA-RMoE": Rate(8, 9), "RA-SMoE": Rate(5, 9), "RA-E": Rate(1, 9)}
    assert minimum(rates, dual=True) == Rate(5, 9)
    assert minimum({**rates, "RA-RMoE": None}, dual=True) is None


@pytest.fixture
def routed(tmp_path: Path) -> Page:
    """One row, 10 images, 8 right when clean, attacked on every surface of a mixture."""
    attacks = {
        "pgd-50": "hhhhhhbb",
        "pgd-50@pinned": "bhhhhhhb",
        "pgd-50@experts": "hhhhhbbb",
        "pgd-50@router": "hhhhhhhb",
        "pgd-50@dense": "hhbhhhhb",
        "steer-50": "hhhbhhhb",
        "pgd-released": "hhhhhhhh",
        "pgd-released@experts": "hhhhhhh.",
    }
    return page_of(make_source(tmp_path, "A", attacks=attacks, specs=specs_of({**ROUTING, **RELEASED})))


def test_the_columns_are_unions_by_image(routed: Page) -> None:
    (row,) = routed.rows
    held = {key: rate.held for key, rate in row.columns.items() if rate}
    # RA: pgd-50 holds 0 to 5, pinned 1 to 6; the worst case leaves 1 and 4
    assert held == {"SA": 8, "RA": 5, "RA-E": 5, "RA-R": 7, "smooth": 6, "steering": 6, "min": 5, "worst": 2}
    assert row.worst == row.columns["worst"] == Rate(2, 10)
    assert [column.key for column in routed.columns] == [
        "SA",
        "RA",
        "RA-E",
        "RA-R",
        "smooth",
        "steering",
        "min",
        "worst",
    ]
    assert routed.columns[1].attacks == ("pgd-50", "pgd-50@pinned")


def test_an_image_that_an_attack_has_still_to_try_is_in_no_union(tmp_path: Path) -> None:
    attacks = {"pgd-50": "hhhh", "pgd-50@pinned": "hh.."}
    names = {name: ROUTING[name] for name in attacks}
    page = page_of(make_source(tmp_path, clean="hhhh", attacks=attacks, specs=specs_of(names)))
    assert page.rows[0].columns["RA"] == Rate(2, 4)


def test_an_attack_that_was_not_begun_leaves_its_column_empty(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hh", attacks={"pgd-50": "hh"}, specs=specs_of(ROUTING)))
    assert page.rows[0].columns["RA-E"] == page.rows[0].columns["worst"] == Rate(0, 2)


AUTOATTACK = {
    "apgd-100": ("APGD", "whole"),
    "apgd-t-100x9": ("APGDTargeted", "whole"),
    "fab-t-100x9": ("FAB", "whole"),
    "square-5000": ("Square", "whole"),
}


def test_autoattack_has_a_column_of_its_own_and_leaves_ra_to_pgd(tmp_path: Path) -> None:
    attacks = {
        "pgd-50": "hhhb",
        "apgd-100": "hhbb",
        "apgd-t-100x9": "hbhh",
        "fab-t-100x9": "hhhh",
        "square-5000": "hhhh",
    }
    # that met only what AutoAttack had left, so it says nothing of PGD alone
    attacks["pgd-50x10"] = "h..."
    specs = specs_of({**ROUTING, **AUTOATTACK, "pgd-50x10": ("PGD", "whole")})
    specs["pgd-50x10"]["after"] = ["apgd-100"]
    page = page_of(make_source(tmp_path, clean="hhhh", attacks=attacks, specs={name: specs[name] for name in attacks}))
    columns = page.rows[0].columns
    assert (columns["RA"], columns["AA"], columns["worst"]) == (Rate(3, 4), Rate(1, 4), Rate(1, 4))
    shown = {column.key: column.attacks for column in page.columns}
    assert shown["RA"] == ("pgd-50",)
    assert shown["AA"] == tuple(AUTOATTACK)
    # alone, it is what attacked the deployed model
    alone = {name: attacks[name] for name in AUTOATTACK}
    page = page_of(make_source(tmp_path, "B", clean="hhhh", attacks=alone, specs={name: specs[name] for name in alone}))
    assert page.rows[0].columns["RA"] == Rate(1, 4)


def test_released_attacks_count_nowhere(routed: Page, tmp_path: Path) -> None:
    (row,) = routed.rows
    assert [attack.label for attack in routed.attacks] == sorted(set(ROUTING), key=str)
    assert [attack.label for attack in routed.released] == list(RELEASED)
    assert [done.held for done in row.released if done] == [8, 7]
    assert row.released_columns == {"pgd-released": {"RA": Rate(8, 10), "RA-E": Rate(7, 10)}}
    said = " ".join([*routed.summary, *routed.caveats, *(notice.text for notice in routed.notices)])
    assert "eleased" not in said
    # a released attack that breaks everything changes nothing
    attacks = {"pgd-50": "hhh", "pgd-released": "bbb"}
    names = {name: {**ROUTING, **RELEASED}[name] for name in attacks}
    broken = page_of(make_source(tmp_path, "B", clean="hhh", attacks=attacks, specs=specs_of(names)))
    assert broken.rows[0].worst == broken.rows[0].columns["RA"] == Rate(3, 3)


def test_released_attacks_alone_are_no_attack(tmp_path: Path) -> None:
    names = {"pgd-released": RELEASED["pgd-released"]}
    page = page_of(make_source(tmp_path, attacks={"pgd-released": "hhhhhhhh"}, specs=specs_of(names)))
    assert page.rows[0].worst is None
    assert "worst" not in [column.key for column in page.columns]
    assert page.summary[1].endswith("it has not been attacked.")
    assert page.caveats[0].startswith("No attack has been run")


def test_the_interval_plot_leaves_released_attacks_out(routed: Page) -> None:
    text = render_html(routed)
    assert "RA, pgd-50@experts: 50.0 %" in text
    assert "RA, pgd-released" not in text
    assert "<h4>What the released attacks say of these models</h4>" in text
    assert "<td>pgd-released@experts</td><td>10</td><td>70.0 [39.7, 89.2]</td><td>20.0 [5.7, 51.0]</td>" in text


# -- what a paper printed ------------------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path: Path) -> Page:
    attacks = {"pgd-50": "hhhhhbbb", "pgd-released": "hhhhhhhb"}
    names = {name: {**ROUTING, **RELEASED}[name] for name in attacks}
    sources = [make_source(tmp_path, label, attacks=attacks, specs=specs_of(names)) for label in ("A", "B")]
    return page_of(*sources, reported={**REPORTED, "not made": {"SA": 1.0}}, reported_source="Table 3")


def test_reported_stands_beside_measured_and_is_told_apart(beside: Page) -> None:
    text = terminal_table(beside)
    assert (
        "model              SA     RA   RA-E   RA-R         worst case\n"
        "--------------  -----  -----  -----  -----  -----------------\n"
        "A\n"
        "  measured       80.0   50.0      –      –  50.0 [23.7, 76.3]\n"
        "  reported      77.81  69.09  75.71  59.00                  –\n"
        "  pgd-released      –   70.0      –      –                  –\n"
        "B\n"
        "  measured       80.0   50.0      –      –  50.0 [23.7, 76.3]\n"
        "  pgd-released      –   70.0      –      –                  –\n"
    ) in text
    assert "Reported: what Table 3 printed, without an interval." in text
    assert "Released attacks (pgd-released): run with the defects" in text
    assert "not made" not in text


def test_reported_is_its_own_line_in_html_and_its_own_key_in_json(beside: Page) -> None:
    text = render_html(beside)
    assert '<tr class="beside">\n<th scope="row">A<small>reported</small></th>' in text
    assert '<td class="number">69.09</td>' in text
    table = json.loads(json.dumps(to_json(beside), allow_nan=False))
    first, second = table["rows"]
    assert (first["reported"], second["reported"], table["reported_source"]) == (REPORTED["A"], {}, "Table 3")
    assert first["columns"]["RA"]["held"] == 5
    assert first["columns"]["RA-E"] is None
    assert first["released_columns"]["pgd-released"]["RA"]["accuracy"] == 0.7
    assert [attack["label"] for attack in first["attacks"]] == ["pgd-50"]
    assert [attack["label"] for attack in first["released_attacks"]] == ["pgd-released"]


def test_a_reported_column_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"among SA, RA, RA-E.*got 'RA-X' for 'A'"):
        page_of(make_source(tmp_path, "A"), reported={"A": {"RA-X": 1.0}})


# -- the terminal --------------------------------------------------------------------------------------------------


def test_every_column_fits_beside_a_label(tmp_path: Path) -> None:
    attacks = dict.fromkeys({**DUAL, **RELEASED}, "h" * 1000)
    specs = specs_of({**DUAL, **RELEASED})
    reported = {"JTDMoE 0.7": dict.fromkeys(("SA", "RA", "RA-E", "RA-R", "smooth", "RA-RMoE", "RA-SMoE"), 92.14)}
    page = page_of(
        make_source(tmp_path, "JTDMoE 0.7", clean="h" * 1000, attacks=attacks, specs=specs),
        reported=reported,
        reported_source="Table 3",
    )
    text = terminal_table(page)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\n  pgd-released " in text
    assert "100.0 [99.6, 100.0]\n" in text


def test_of_more_than_three_rows_the_attacks_are_left_to_the_files(tmp_path: Path) -> None:
    text = terminal_table(page_of(*(make_source(tmp_path, label) for label in "ABCD")))
    assert "Each attack by itself is in report.html and table.json." in text
    assert "RA, pgd-50" not in text


def test_different_numbers_of_images_are_told_row_by_row(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "A"), make_source(tmp_path, "B", clean="hhb", attacks={"pgd-50": "hb"}))
    assert "(n = 10 of A and 3 of B)" in terminal_table(page)


def test_a_single_network_has_the_whole_models_columns(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(experts=1), epochs(1, experts=1))
    page = page_of(RowSource("one", run, make_evaluation(tmp_path / "e", load=None)))
    assert [column.key for column in page.columns] == ["SA", "RA", "worst"]
