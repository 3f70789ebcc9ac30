"""Robust accuracy against the number of queries: what an attacker without the model gets for how many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.attacks.base import VERDICT_QUERIES
from phalanx.errors import InputError
from phalanx.runs import Verdict, summarise, wilson
from phalanx.runs.verdict import worst_by_sample

SCHEMA = 1
"""Of `QueryCurves.to_json`."""

BUDGETS = (100, 200, 500, 1000, 2000, 5000, 10_000)
"""Queries for each sample."""

QUERY_ATTACKS = ("Square", "RayS", "HopSkipJump")
"""Attacks that see a model's answers alone."""


@dataclass(frozen=True)
class QueryCurve:
    """One attack's robust accuracy at several budgets."""

    attack: str
    n: int
    """All images."""
    clean: int
    """Of these, right without an attack: the accuracy at no queries."""
    points: tuple[tuple[int, int], ...]
    """(queries, images still standing), by increasing queries; no more than the attack had."""

    def interval(self, held: int) -> tuple[float, float]:
        """95 % Wilson interval of held / n."""
        return wilson(held, self.n)


@dataclass(frozen=True)
class QueryCurves:
    """Of an evaluation."""

    curves: tuple[QueryCurve, ...]
    left_out: Mapping[str, str]
    """By attack, why it has no curve."""

    def to_json(self) -> dict[str, Any]:
        """As queries.json."""
        return {
            "schema": SCHEMA,
            "curves": [
                {
                    "attack": curve.attack,
                    "n": curve.n,
                    "clean": curve.clean,
                    "points": [{"queries": queries, "held": held} for queries, held in curve.points],
                }
                for curve in self.curves
            ],
            "left_out": [{"attack": attack, "why": why} for attack, why in self.left_out.items()],
        }


def query_curves(rows: Sequence[Verdict], specs: Mapping[str, Mapping[str, Any]]) -> QueryCurves | None:
    """The curve of every query attack of a ledger, None if it has none; `specs` are its declared attacks."""
    asked = [name for name, spec in specs.items() if spec.get("attack") in QUERY_ATTACKS]
    if not asked:
        return None
    curves, left_out = [], {}
    for name in asked:
        try:
            curves.append(query_curve(rows, name, specs[name]))
        except InputError as error:
            left_out[name] = str(error)
    return QueryCurves(tuple(curves), left_out)


def query_curve(
    rows: Sequence[Verdict], attack: str, spec: Mapping[str, Any], budgets: Sequence[int] = BUDGETS
) -> QueryCurve:
    """Robust accuracy under `attack`, as a function of the queries that it may spend on each sample.

    Counted are the images that the search sent until it stopped, at its first error; the two that judge it, which the
    ledger's `queries` includes, are not. In the rare case that the folded copy's error was none of the model's, the
    search was made twice, and counts twice, up to the whole budget. An answer that is not finite, and an attack that
    was given up, leave nothing standing. Budgets above the attack's own are left out.

    Raises InputError for another kind of attack, and where it has not met every image that is right when clean: those
    that it did not meet would have to be guessed.
    """
    if spec.get("attack") not in QUERY_ATTACKS or spec.get("surface", "whole") != "whole":
        raise InputError(f"{attack} is no attack through a model's answers; use square-5000, rays-10000 or hsj-10000")
    summary = summarise(rows, attacks={attack: spec})
    (done,) = (found for found in summary.attacks if found.attack == attack)
    if done.tried < summary.clean_correct:
        raise InputError(
            f"{attack} met {done.tried:,} of the {summary.clean_correct:,} images that are right when clean: in a "
            f"cascade it is tried on what others have left. Name it in the protocol besides, for example "
            f"standard,{attack}"
        )
    verdicts = worst_by_sample((row.sample, row.verdict) for row in rows if row.attack == attack)
    spent: dict[int, int] = {}
    for row in rows:
        if row.attack == attack:
            spent[row.sample] = spent.get(row.sample, 0) + max(row.queries - VERDICT_QUERIES, 0)
    most = int(spec.get("queries", 0)) * int(spec.get("restarts", 1))
    # a timeout's queries are not known: it stands at no budget
    costs = {sample: 0 if verdict == "timeout" else min(spent[sample], most) for sample, verdict in verdicts.items()}
    fell = [cost for sample, cost in costs.items() if verdicts[sample] != "held"]
    points = [(budget, done.tried - sum(cost <= budget for cost in fell)) for budget in budgets if budget <= most]
    return QueryCurve(attack, summary.n, summary.clean_correct, tuple(points))
