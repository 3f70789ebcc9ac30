"""Which attackers a ledger has measured: each by its own attacks, none by another's."""

from __future__ import annotations

from typing import Any

from test_headline import CLEAN, PGD, SPEC, external, row

from phalanx.runs import Verdict
from phalanx.runs.threats import HOW, Coverage, coverage

THREATS = (
    "white-box", "transfer", "score-query", "label-query", "external", "poisoning", "backdoor", "extraction",
    "membership", "corruption", "hardware",
)  # fmt: skip


def spec(kind: str, **changes: Any) -> dict[str, Any]:
    return {**SPEC, "attack": kind, **changes}


def table(rows: list[Verdict], specs: dict[str, dict[str, Any]]) -> dict[str, Coverage]:
    return {line.threat: line for line in coverage(rows, specs, "Linf", "8/255")}


def test_every_threat_has_a_line_and_says_what_would_measure_it() -> None:
    lines = table(CLEAN, {})
    assert tuple(lines) == THREATS == tuple(HOW)
    assert {line.status for line in lines.values()} == {"not measured"} and all(line.how for line in lines.values())
    assert lines["hardware"].to_json() == {"threat": "hardware", "status": "not measured", "how": HOW["hardware"]}


def test_an_attack_measures_its_own_threat_alone() -> None:
    kinds = {
        "white-box": ("PGD", "FAB", "CarliniWagner", "RouteSteering", "ExpertTransfer"),
        "transfer": ("Transfer",),
        "score-query": ("Square",),
        "label-query": ("RayS", "HopSkipJump"),
    }
    for threat, names in kinds.items():
        for kind in names:
            rows = [*CLEAN, *(row(sample, "a", "held" if sample else "broken") for sample in range(5))]
            lines = table(rows, {"a": spec(kind, steps=50, restarts=1, queries=7)})
            assert [line.threat for line in lines.values() if line.status == "measured"] == [threat], kind
            found = lines[threat]
            assert (found.held, found.n, found.tried, found.broken) == (4, 6, 5, 1)
            assert found.budget == {"steps": 50, "queries": 7} and found.interval is not None
            assert found.to_json()["accuracy"] == 4 / 6


def test_released_attacks_and_those_outside_the_threat_measure_nothing() -> None:
    for other in (spec("PGD", reproduction=True), spec("PGD", eps="16/255"), spec("PGD", norm="L2")):
        assert {line.status for line in table([*CLEAN, *PGD], {"pgd": other}).values()} == {"not measured"}


def test_what_met_only_the_leavings_of_others_has_no_accuracy_of_its_own() -> None:
    specs = {
        "pgd": spec("PGD"),
        "square": spec("Square", after=["pgd"]),
        "steer": spec("RouteSteering", after=["pgd", "square"]),
    }
    rows = [*CLEAN, *PGD, row(2, "square", "broken"), *(row(sample, "square", "held") for sample in (3, 4))]
    rows += [row(3, "steer", "broken"), row(4, "steer", "held")]
    lines = table(rows, specs)
    assert (lines["score-query"].status, lines["score-query"].held) == ("partly", None)
    assert (lines["score-query"].tried, lines["score-query"].broken) == (3, 1)
    assert table([*CLEAN, *PGD], specs)["score-query"].status == "not measured"
    # who has the model can ask it, too: what came before in the cascade is part of the white box's own number
    assert (lines["white-box"].attacks, lines["white-box"].held) == (("pgd", "square", "steer"), 1)
    # beside the cascade it stands for itself
    specs["square"] = spec("Square")
    rows += [row(sample, "square", "held") for sample in (0, 1)]
    assert (table(rows, specs)["score-query"].status, table(rows, specs)["score-query"].held) == ("measured", 4)


def test_submitted_images_have_a_line_and_are_in_no_other() -> None:
    specs = {"pgd": SPEC, "external:a": external("1")}
    rows = [*CLEAN, *PGD, row(2, "external:a", "broken"), row(0, "external:a", "broken")]
    lines = table(rows, specs)
    assert lines["white-box"].held == 3 and lines["transfer"].status == "not measured"
    own = lines["external"]
    assert (own.status, own.held, own.tried, own.broken, own.lowered) == ("measured", None, 2, 2, 1)
    assert own.to_json()["lowered"] == 1
