"""E1 to E21: each check has an evaluation that it passes and one that it objects to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from honesty_samples import (
    EPS,
    SOUND,
    THREAT,
    WEAK,
    Wrapped,
    answer,
    blocks,
    bright_and_dark,
    by_block,
    distance,
    edited,
    margin_of,
    mixture,
    probed,
    result,
    status,
)
from known_answers import Sum
from torch import Tensor

from phalanx.attacks import PGD
from phalanx.evaluation.honesty import CHECKS, Probe, look
from phalanx.evaluation.honesty.planted import CornerPGD, Oracle, fragile, hard_routing
from phalanx.evaluation.transfer import Surrogate, with_surrogates
from phalanx.runs.proofs import Proof
from phalanx.runs.verdict import CLEAN

SURE = Oracle()
"""Nothing in the ball breaks it."""


def test_e1_ball_and_range() -> None:
    probe = probed()
    found = result("E1", probe)
    assert found.status == "pass" and found.evidence["made_again"] == 16 and found.evidence["recorded"] == 24
    assert status("E1", edited(probe, "pgd-20", distance=0.04)) == "fail"


def test_e2_errors_made_and_judged_again() -> None:
    assert status("E2", probed()) == "pass"
    assert status("E2", probed(SURE)) == "skipped"
    found = result("E2", probed(judged=SURE))
    assert found.status == "fail" and found.evidence["not_found_again"] == 16
    # right in batches of five: of sixteen errors three such batches
    depends = Wrapped(lambda x: torch.where(torch.tensor(len(x) == 5), SURE(x), SOUND(x)))
    found = result("E2", probed(judged=depends))
    assert found.status == "fail" and found.evidence["judged_otherwise"] == 15


def test_errors_are_made_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, searches = probed(), []
    search = PGD.perturb
    monkeypatch.setattr(PGD, "perturb", lambda *given: searches.append(0) or search(*given))
    look(probe, [check for check in CHECKS if check.id in ("E1", "E2")])
    assert len(searches) == 1


def test_e2_is_skipped_where_answers_are_random() -> None:
    noisy = Wrapped(lambda x: SOUND(x) + 0.1 * torch.randn(len(x), 10))
    assert status("E2", probed(noisy)) == "skipped"


def test_e3_single_step() -> None:
    assert status("E3", probed(SURE)) == "pass"
    found = result("E3", probed(name=WEAK))
    assert found.status == "warn" and found.evidence == {"lost": 24, "images": 24, "points": 100}


def test_e4_monotone_in_eps() -> None:
    assert status("E4", probed()) == "pass"
    # a start in the larger ball lands where nothing has a gradient
    sturdy = Wrapped(lambda x: torch.where(distance(x)[:, None] > 1.01 * EPS, SURE(x).detach(), SOUND(x)))
    found = result("E4", probed(sturdy))
    assert found.status == "warn" and found.evidence["at_eps"] == 0 and found.evidence["at_twice"] == 1


def test_e5_large_eps() -> None:
    assert status("E5", probed()) == "pass"
    found = result("E5", probed(Wrapped(by_block), data=blocks()))
    assert found.status == "fail" and found.evidence["accuracy"] > 0.5


def test_e6_eps_of_zero() -> None:
    probe = probed()
    assert status("E6", probe) == "pass"
    assert status("E6", edited(probe, CLEAN, predicted=3, verdict="broken")) == "fail"


def test_e7_convergence() -> None:
    assert status("E7", probed(SURE)) == "pass"
    found = result("E7", probed(name="pgd-2"))
    assert found.status == "warn" and found.evidence["steps"] == 4
    assert result("E7", probed(SURE, "fgsm")).evidence["steps"] == 10
    assert status("E7", probed()) == status("E7", probed(SURE, "square-5")) == "skipped"


def test_e8_best_iterate() -> None:
    probe = probed(SURE)
    assert status("E8", probe) == "pass"
    assert status("E8", edited(probe, "pgd-20", first_success=3)) == "warn"
    # wrong in the middle of the way: two steps of this length go there and back
    band = Wrapped(lambda x: answer(x, (margin_of(x) - 0.6).square() - 0.04))
    lazy = PGD(steps=2, step_size=0.65 * EPS, keep="last", early_drop=False)
    assert status("E8", probed(band, lazy)) == "warn"
    assert status("E8", probed(band, replace(lazy, keep="best"))) == "pass"


def test_e9_starts_and_restarts() -> None:
    found = result("E9", probed())
    assert found.status == "pass" and found.evidence["seeds_differ"] == 1
    found = result("E9", probed(fragile("dead corner"), CornerPGD(steps=20)))
    assert found.status == "warn" and found.evidence["at_a_corner"] == 1
    # half of the starts lie where there is no gradient
    lucky = Wrapped(lambda x: torch.where(x.flatten(1)[:, 50:51] > 128 / 255, SOUND(x), SURE(x).detach()))
    found = result("E9", probed(lucky, PGD(steps=20)))
    assert found.status == "warn" and 0 < found.evidence["lost"] < found.evidence["images"]


def test_e9_a_start_that_ignores_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def middle(self: PGD, target: Any, rng: object, restart: int) -> Tensor:
        return self.threat.project(target.x + 0.5 * self.threat.epsilon, target.x)

    probe = probed()
    monkeypatch.setattr(PGD, "_start", middle)
    assert "two seeds start at the same point" in result("E9", probe).sentence


def test_e10_black_box() -> None:
    assert status("E10", probed(SURE)) == "pass"
    assert status("E10", probed(fragile("quantised"))) == "warn"
    found = result("E10", probed(fragile("quantised"), "pgd-5,square-500"))
    assert found.status == "warn" and found.evidence["points"] == 100
    assert status("E10", probed(name="pgd-20,square-50")) == "pass"


def test_e10_counts_what_gradients_left_standing() -> None:
    # gradients see nothing of half of the images, and break the other half
    half = Wrapped(lambda x: SOUND(torch.where(x[:, :1, :1, :5].amax(3, True) > 0.5, (x * 15).round() / 15, x)))
    found = result("E10", probed(half, "pgd-5,square-500"))
    assert found.evidence["images"] == 14 and "breaks 14 of 14 images" in found.sentence


def test_e11_random_noise() -> None:
    assert status("E11", probed(SURE)) == "pass"
    near = Wrapped(lambda x: answer(x, 0.1 * EPS - distance(x)))
    found = result("E11", probed(near, WEAK))
    assert found.status == "warn" and found.evidence["draws"] == 10_000 and found.evidence["lost"] == 8


def test_e12_transfer() -> None:
    assert status("E12", probed(SURE)) == "skipped"
    assert status("E12", probed(mixture(True, True), data=bright_and_dark())) == "pass"
    found = result("E12", probed(hard_routing(), "pgd-5"))
    assert found.status == "warn" and found.evidence["dense"] == 24


def test_e13_and_e14_are_for_the_record() -> None:
    found = result("E13", probed())
    assert found.status == "info" and found.evidence["all"] == 0
    assert result("E14", probed(name=WEAK)).evidence["images"] == 8
    assert status("E14", probed()) == "skipped"


def test_e15_active_test() -> None:
    found = result("E15", probed())
    assert found.status == "pass" and found.evidence == {"planted": 20, "found": 20, "could_not_plant": 0}
    assert status("E15", probed(fragile("quantised"))) == "fail"
    assert status("E15", probed(name="pgd-1:1/2550")) == "fail"
    assert status("E15", probed(SURE, "square-5")) == "skipped"


def test_e16_planted_route() -> None:
    assert status("E16", probed()) == "skipped"
    data, model = bright_and_dark(), mixture(True, True)
    found = result("E16", probed(model, "pgd-5,square-5", data))
    assert found.status == "fail" and found.evidence["held"] == 1 and found.evidence["attacks_tried"] == 2
    assert status("E16", probed(model, "pgd-5,steer-5", data)) == "pass"


def test_e16_a_surrogate_changes_nothing() -> None:
    data, model = bright_and_dark(), mixture(True, True)
    probe = probed(model, "pgd-5", data)
    tried = with_surrogates(probe.protocol, [Surrogate("other", SURE)], THREAT)
    found = result("E16", replace(probe, protocol=tried))
    assert found.status == "fail" and found.evidence["attacks_tried"] == 1
    alone = replace(tried, members=tried.members[1:])
    assert status("E16", replace(probe, protocol=alone)) == "skipped"


def test_e17_consistency_of_components() -> None:
    probe = probed()
    assert status("E17", probe) == "pass"
    assert status("E17", _headline(probe, 3)) == "fail"
    found = result("E17", probed(name="pgd-20,steer-1:1/2550"))
    assert found.status == "warn" and found.evidence["missed_by_aimed"] == 1


def _headline(probe: Probe, robust: int) -> Probe:
    """The probe of an evaluation that counts so many images as robust."""
    found = replace(probe.evaluation)
    found.__dict__["summary"] = replace(probe.evaluation.summary, robust=robust)
    return replace(probe, evaluation=found)


def test_e18_forced_route() -> None:
    assert status("E18", probed()) == "skipped"
    found = result("E18", probed(hard_routing(), "pgd-5"))
    assert found.status == "info" and found.evidence["worst_route"] == 0 and found.evidence["gap_points"] == 100
    told = {"whole": {"held": 3, "n": 4}, "parts": [{"name": "", "worst_route": {"held": 1, "n": 4}}]}
    found = result("E18", probed(hard_routing(), "pgd-5", attribution=told))
    assert found.evidence["gap_points"] == 50 and "50.0 points, at least this much under PGD-20" in found.sentence


def test_e18_speaks_of_the_whole_model() -> None:
    half = {"whole": {"held": 3, "n": 4}, "parts": [{"name": "standard", "worst_route": {"held": 1, "n": 4}}]}
    assert result("E18", probed(hard_routing(), "pgd-5", attribution=half)).evidence["gap_points"] == 100


def test_e18_counts_no_image_that_the_evaluation_broke() -> None:
    # no expert by itself errs, the mixture of both does: attacks may not be said to gain less than nothing
    found = result("E18", edited(probed(mixture(True, True), "pgd-5", bright_and_dark()), "pgd-5", verdict="broken"))
    assert found.evidence["worst_route"] == found.evidence["measured"] < 1 and found.evidence["gap_points"] == 0


def test_e18_is_skipped_for_several_gates() -> None:
    both = Sum(mixture(True, True), mixture(True, True))
    found = result("E18", probed(both, "pgd-5", bright_and_dark()))
    assert found.status == "skipped" and "several gates" in found.sentence


def test_e19_certified_at_most_empirical() -> None:
    assert status("E19", probed()) == "skipped"
    proved = Proof("Linf", "crown", {0: EPS, 1: EPS})
    assert status("E19", probed(SURE, proofs=[proved])) == "pass"
    found = result("E19", probed(proofs=[proved]))
    assert found.status == "fail" and found.evidence == {"certified": 2, "contradicted": 2}
    assert status("E19", probed(proofs=[Proof("Linf", "crown", {0: EPS / 100})])) == "pass"


@pytest.mark.parametrize(("attack", "verdict"), [("pgd-20", "invalid"), (CLEAN, "broken"), (CLEAN, "invalid")])
def test_e19_sees_every_wrong_answer(attack: str, verdict: str) -> None:
    probe = probed(SURE, proofs=[Proof("Linf", "crown", {0: EPS})])
    found = result("E19", edited(probe, attack, verdict=verdict))
    assert found.status == "fail" and "sample 0 is certified" in found.sentence


def test_e20_worst_case_per_image() -> None:
    assert status("E20", probed()) == "pass"
    assert status("E20", _headline(probed(), 3)) == "fail"


def test_e21_convergence_of_averages() -> None:
    assert status("E21", probed()) == "skipped"
    trembling = Wrapped(lambda x: SOUND(x) + 0.01 * torch.randn(len(x), 10))
    found = result("E21", probed(trembling, "pgd-5-eot:2"))
    assert found.status == "pass" and found.evidence["clean_worst"] == 1

    def shaken(x: Tensor) -> Tensor:
        # nothing on the way forward, noise on the way back: only the mean of many passes shows the way
        noise = 12 * torch.randn_like(x).flatten(1)
        zero = ((x - x.detach()).flatten(1) * noise).sum(1)[:, None] / (EPS * 182)
        return answer(x, 1 - 2 * margin_of(x) - 2 * zero[:, 0]) + 0.01 * torch.randn(len(x), 10)

    found = result("E21", probed(Wrapped(shaken), "pgd-2-eot:2"))
    assert found.status == "warn" and found.evidence["passes_80"] < found.evidence["passes_20"]
