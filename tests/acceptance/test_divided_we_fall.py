"""Divided We Fall's table on digits, and what must hold of it whatever the numbers are."""

from __future__ import annotations

from typing import Any

import pytest
from quiet import check_worst_is_below_every_component, held, made, rows_of

from phalanx.workflow import plan

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return rows_of(made(plan("dwf-digits"), tmp_path_factory.mktemp("dwf")))


def test_no_component_is_below_the_worst_case(rows: dict[str, dict[str, Any]]) -> None:
    check_worst_is_below_every_component(rows)


def test_an_undefended_network_keeps_nothing(rows: dict[str, dict[str, Any]]) -> None:
    # the paper prints 36.95 %: its attack does not work at the radius it names
    assert rows["ST, single network"]["columns"]["RA"]["accuracy"] <= 0.03


def test_more_steps_leave_no_more(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        named = {attack["label"]: attack["held"] for attack in row["attacks"]}
        # each has random starts of its own: a hundredth of the images is chance
        assert named["pgd-50"] <= named["pgd-10"] + 0.01 * row["n"], row["label"]
        assert named["pgd-100x3"] <= min(named[f"pgd-{count}"] for count in (10, 20, 30, 40, 50)) + 0.01 * row["n"]


def test_every_defence_beats_none(rows: dict[str, dict[str, Any]]) -> None:
    undefended = held(rows["ST, single network"], "worst")
    assert all(held(row, "worst") > undefended for label, row in rows.items() if label != "ST, single network")
