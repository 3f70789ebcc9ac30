"""Certificates against verdicts: at every radius, of whatever attack, what is broken is not certified."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.runs import Verdict
from phalanx.runs.proofs import Proof, contradictions, threefold
from phalanx.runs.verdict import Outcome
from verdicts import verdict

PGD = {"attack": "PGD", "norm": "Linf", "eps": "1/10", "surface": "whole"}


def row(sample: int, attack: str, outcome: Outcome = "broken", distance: float = 0.1) -> Verdict:
    return verdict(sample, attack, outcome, distance=0.0 if attack == "clean" else distance)


CLEAN = [row(sample, "clean", "held") for sample in range(5)]


def proof(radius: float, norm: str = "Linf", sample: int = 0) -> Proof:
    return Proof(norm, "crown", {sample: radius})


def found(rows: list[Verdict], *proofs: Proof, **spec: Any) -> list[tuple[int, float, float]]:
    wrong = contradictions([*CLEAN, *rows], {"pgd": {**PGD, **spec}}, proofs)
    return [(each.sample, each.distance, each.radius) for each in wrong]


def test_inside_the_radius_is_a_contradiction_and_outside_is_none() -> None:
    assert found([row(0, "pgd", distance=0.07)], proof(0.08)) == [(0, 0.07, 0.08)]
    assert found([row(0, "pgd", distance=0.07)], proof(0.069)) == []
    assert found([row(0, "pgd", "held", 0.01)], proof(0.5)) == []
    assert found([row(0, "pgd", "invalid", float("inf"))], proof(0.5)) == [(0, 0.1, 0.5)]
    # rounding may put an image a little outside its own ball
    assert found([row(0, "pgd", distance=0.1000001)], proof(0.1)) == [(0, 0.1, 0.1)]
    # outside the ledger's threat, too
    assert found([row(0, "pgd", distance=0.3)], proof(0.4), eps="1/2") == [(0, 0.3, 0.4)]


@pytest.mark.parametrize(
    ("certificate", "attack", "wrong"),
    [("Linf", "L2", True), ("Linf", "L1", True), ("L2", "L1", True), ("L2", "Linf", False), ("L1", "L2", False)],
)
def test_a_ball_may_lie_in_another_norm_s(certificate: str, attack: str, wrong: bool) -> None:
    assert bool(found([row(0, "pgd", distance=0.05)], proof(0.06, certificate), norm=attack)) == wrong
    assert proof(0.06, certificate).held(attack, 0.05) == ({0} if wrong else set())


def test_the_nearest_of_each_certificate_is_named_and_a_paper_s_attack_is_not_asked() -> None:
    rows = [row(0, "pgd", distance=0.07), row(0, "other", distance=0.02)]
    wrong = contradictions([*CLEAN, *rows], {"pgd": PGD, "other": PGD}, [proof(0.08), proof(0.05)])
    assert [(each.attack, each.radius) for each in wrong] == [("other", 0.08), ("other", 0.05)]
    assert found([row(0, "pgd", distance=0.07)], proof(0.08), reproduction=True) == []


def test_an_image_that_is_wrong_when_clean_is_certified_nowhere() -> None:
    rows = [*CLEAN[1:], row(0, "clean")]
    assert [each.distance for each in contradictions(rows, {}, [proof(0.0, "L1"), proof(1.0)])] == [0, 0]


def test_every_sample_is_one_of_three() -> None:
    rows = [*CLEAN, row(0, "pgd"), *(row(sample, "pgd", "held") for sample in range(1, 5))]
    proofs = [
        Proof("Linf", "crown", {1: 0.2, 2: 0.05, 9: 1.0}),
        Proof("L2", "lipschitz", {3: 9.0}),
        # false, so that it counts nowhere
        Proof("Linf", "ibp", {0: 0.3}),
    ]
    head, wrong = threefold(rows, {"pgd": PGD}, "Linf", "1/10", proofs)
    assert (head.broken, head.certified, head.undecided) == ({0}, {1}, {2, 3, 4})
    assert [each.sample for each in wrong] == [0]
    # what another radius disproved is no longer believed
    wide = {"pgd": PGD, "wide": {**PGD, "eps": "1/2"}}
    head, wrong = threefold([*rows, row(1, "wide", distance=0.15)], wide, "Linf", "1/10", proofs)
    assert head.certified == set() and {each.sample for each in wrong} == {0, 1}
