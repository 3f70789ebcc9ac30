"""Robust accuracy by queries: rows by hand, and against attacks that really have so many."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from phalanx.errors import InputError
from phalanx.evaluation import evaluate, protocol
from phalanx.evaluation.queries import BUDGETS, query_curve, query_curves
from phalanx.routing import MixtureOfExperts
from phalanx.runs import Verdict
from phalanx.runs.verdict import Outcome
from phalanx.threat import ThreatModel
from verdicts import verdict

SMALL = ThreatModel("Linf", "1/32")
SPEC: dict[str, Any] = {"attack": "RayS", "surface": "whole", "queries": 1000}


def row(sample: int, outcome: Outcome, queries: int, attack: str = "rays-1000") -> Verdict:
    right = outcome == "held" or attack != "clean"
    return verdict(sample, attack, outcome, clean_predicted=1 if right else 2, queries=queries)


CLEAN = [row(sample, "held" if sample < 6 else "broken", 1, "clean") for sample in range(8)]
# the two queries that judge are in the ledger's number
ATTACKED = [
    row(0, "held", 1002),
    row(1, "broken", 102),
    row(2, "broken", 103),
    row(3, "invalid", 502),
    row(4, "timeout", 0),
    row(5, "broken", 1002),
]


def test_the_curve_by_hand() -> None:
    curve = query_curve(CLEAN + ATTACKED, "rays-1000", SPEC)
    assert (curve.n, curve.clean) == (8, 6)
    # 100: sample 1, and 4 from the start; 200: 2 as well; 500: 3; 1000: 5
    assert curve.points == ((100, 4), (200, 3), (500, 2), (1000, 1))
    low, high = curve.interval(4)
    assert low < 0.5 < high
    # to the query: sample 1 fell to its hundredth
    assert query_curve(CLEAN + ATTACKED, "rays-1000", SPEC, (99, 100, 101)).points == ((99, 5), (100, 4), (101, 3))


def test_an_image_that_was_searched_twice_falls_within_the_whole_budget() -> None:
    rows = [row(0, "held", 1, "clean"), row(0, "broken", 1803)]
    assert query_curve(rows, "rays-1000", SPEC).points == ((100, 1), (200, 1), (500, 1), (1000, 0))


def test_no_budget_above_the_attack_s_own() -> None:
    square = {"attack": "Square", "surface": "whole", "queries": 600, "restarts": 2}
    rows = CLEAN + ATTACKED
    assert [queries for queries, _ in query_curve(rows, "rays-1000", square).points] == [100, 200, 500, 1000]
    assert [q for q, _ in query_curve(rows, "rays-1000", {**SPEC, "queries": 499}).points] == [100, 200]
    assert query_curve(rows, "rays-1000", {**SPEC, "queries": 10}).points == ()


def test_survivors_have_no_curve() -> None:
    with pytest.raises(InputError, match=r"met 5 of the 6 images .* Name it in the protocol besides"):
        query_curve(CLEAN + ATTACKED[1:], "rays-1000", SPEC)
    curves = query_curves(CLEAN + ATTACKED[1:], {"rays-1000": {**SPEC, "after": ["apgd-100"]}})
    assert curves is not None and not curves.curves and list(curves.left_out) == ["rays-1000"]


@pytest.mark.parametrize("changes", [{"attack": "PGD"}, {"attack": "Square", "surface": "dense"}])
def test_an_attack_that_sees_more_than_answers_has_none(changes: dict[str, str]) -> None:
    with pytest.raises(InputError, match="no attack through a model's answers"):
        query_curve(CLEAN + ATTACKED, "rays-1000", {**SPEC, **changes})


def test_without_query_attacks_there_are_no_curves() -> None:
    assert query_curves(CLEAN, {"pgd-50": {"attack": "PGD"}}) is None


@pytest.mark.parametrize(("name", "norm", "eps"), [("rays", "Linf", "1/16"), ("hsj", "L2", 0.4)])
def test_it_is_what_an_attack_of_that_budget_leaves(trained: MixtureOfExperts, name: str, norm, eps) -> None:
    threat, test = ThreatModel(norm, eps), tiny.digits().test
    found = evaluate(trained, test, protocol(f"{name}-500", threat), threat)
    curve = query_curve(found.rows, f"{name}-500", found.attacks[f"{name}-500"], (1, 20, 100, 200, 500))
    assert curve.clean == round(found.clean_acc * len(test)) and curve.points[-1][1] < curve.clean
    if name == "rays":
        # without random numbers, a smaller budget is the beginning of a larger one
        for queries, held in curve.points:
            less = evaluate(trained, test, protocol(f"rays-{queries}", threat), threat)
            assert held == round(less.robust_acc * len(test))
    assert curve.points[-1][1] == round(found.robust_acc * len(test))
    held = [held for _, held in curve.points]
    assert held == sorted(held, reverse=True) and len(set(held)) > 2


def test_the_ledger_s_queries_are_where_the_search_stopped(trained: MixtureOfExperts) -> None:
    found = evaluate(trained, tiny.digits().test, protocol("square-120", SMALL), SMALL)
    rows = [row for row in found.rows if row.attack == "square-120"]
    assert {row.verdict for row in rows} == {"held", "broken"}
    # the first of Square's images is its step 0
    assert all(row.queries == (122 if row.verdict == "held" else row.first_success + 3) for row in rows)
    curves = query_curves(found.rows, found.attacks)
    assert curves is not None and curves.to_json() == {
        "schema": 1,
        "curves": [
            {
                "attack": "square-120",
                "n": 40,
                "clean": found.summary.clean_correct,
                "points": [{"queries": 100, "held": sum(row.queries > 102 for row in rows)}],
            }
        ],
        "left_out": [],
    }


def test_the_budgets_of_the_field() -> None:
    assert BUDGETS[0] == 100 and BUDGETS[-1] == 10_000 and list(BUDGETS) == sorted(BUDGETS)
