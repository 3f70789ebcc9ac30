"""The checklist as a whole: which images, which order, and what a model that resists a check does to it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from honesty_samples import SOUND, Wrapped, evaluated, probed
from torch import Tensor

from phalanx.attacks import PGD, RouteSteering
from phalanx.errors import InputError, Interrupted
from phalanx.evaluation.honesty import CHECKS, LEFT_OUT, Check, Finding, Honesty, look, run_checks, samples_for
from phalanx.evaluation.honesty.finding import passed
from phalanx.evaluation.honesty.planted import fragile, hard_routing, images


def test_the_checklist_is_whole() -> None:
    assert [check.id for check in CHECKS] == [f"M{i}" for i in range(1, 13)] + [f"E{i}" for i in range(1, 22)]
    assert len({check.title for check in CHECKS}) == len({check.look for check in CHECKS}) == 33


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_planted_route_turns_in_every_norm(norm: str) -> None:
    planted = hard_routing(norm)  # type: ignore[arg-type]
    x, y, _ = planted.batch
    assert planted.truth() == 0 and bool((planted.model(x).argmax(-1) == y).all())
    for attack, broken in ((PGD(steps=5), 0), (RouteSteering(steps=5), 24)):
        assert int(planted.own(attack).run(planted.model, x, y).broken.sum()) == broken


@pytest.mark.parametrize("kind", ["fragile", "saturated", "not finite", "capacity", "dead corner", "probabilities"])
def test_planted_models_are_right_and_fragile(kind: str) -> None:
    planted = fragile(kind)
    assert bool((planted.model(planted.batch.x).argmax(-1) == planted.batch.y).all()) and planted.truth() == 0


def test_samples() -> None:
    assert samples_for("standard,routing-50") == samples_for("rand") == samples_for("thorough") == 256
    assert samples_for("quick") == samples_for("pgd-50,square-5000") == 64
    found, tried = evaluated(SOUND, "pgd-2")
    assert run_checks(SOUND, images(), found, tried, samples=0) is LEFT_OUT
    seen: list[int] = []
    check = Check("M1", "which", lambda probe: seen.extend(probe.batch.ids.tolist()) or passed(""))  # type: ignore[func-returns-value]
    assert run_checks(SOUND, images(), found, tried, samples=3, checks=[check]).samples == 3
    assert seen == [0, 12, 23]


def test_nothing_of_the_model_is_changed() -> None:
    model = fragile().model.train()
    state, mode = torch.random.get_rng_state(), [part.training for part in model.modules()]
    look(probed(), CHECKS)
    assert torch.equal(torch.random.get_rng_state(), state) and [part.training for part in model.modules()] == mode


def test_the_same_evaluation_gives_the_same_results() -> None:
    def told() -> list[tuple[object, ...]]:
        return [(check.id, check.status, dict(check.evidence)) for check in look(probed(name="pgd-2"), CHECKS)]

    assert told() == told()


def test_evidence_is_finite_and_plain() -> None:
    found, tried = evaluated(SOUND, "pgd-2")
    record = run_checks(SOUND, images(), found, tried).to_json()
    assert json.loads(json.dumps(record)) == record and record["schema"] == 1 and record["samples"] == 24
    assert all(math.isfinite(number) for check in record["checks"] for number in check["evidence"].values())
    assert passed("", lost=float("nan"), kept=1.0).evidence == {"kept": 1.0}


def test_a_model_that_resists_a_check_does_not_end_the_others() -> None:
    def refuse(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("this model takes whole batches")
        return SOUND(x)  # type: ignore[no-any-return]

    found = {check.id: check for check in look(probed(Wrapped(refuse)), CHECKS)}
    assert found["M3"].status == "skipped" and "RuntimeError: this model takes whole batches" in found["M3"].sentence
    assert found["M4"].status == "pass"


class Tight(Wrapped):
    """The sound model in a memory that holds so many images under gradients."""

    def __init__(self, room: int) -> None:
        super().__init__(SOUND)
        self.room = room
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, len(x))
        return super().forward(x)


def test_what_does_not_fit_the_memory_is_halved() -> None:
    whole, tight = (look(probed(judged=model), CHECKS) for model in (SOUND, Tight(3)))
    assert [(one.id, one.status) for one in whole] == [(other.id, other.status) for other in tight]
    for one, other in zip(whole, tight, strict=True):
        assert one.evidence == pytest.approx(dict(other.evidence), rel=1e-3, abs=1e-6), one.id


def test_no_check_is_skipped_for_want_of_memory() -> None:
    with pytest.raises(InputError, match="one image alone does not fit"):
        look(probed(judged=Tight(0)), [check for check in CHECKS if check.id == "M5"])

    def full(probe: object) -> Finding:
        raise MemoryError

    with pytest.raises(InputError, match="honesty check E15 does not fit into the memory"):
        look(probed(), [Check("E15", "full", full)])


def test_no_more_images_at_once_than_asked_for() -> None:
    model = Tight(24)
    # noise is drawn, points are planted and steps are tried for many images, of which so many go through the model
    look(probed(judged=model, batch_size=5), CHECKS)
    assert model.largest == 5


def test_a_signal_is_no_refusal() -> None:
    def stopped(probe: object) -> Finding:
        raise Interrupted(15, "stopped")

    with pytest.raises(Interrupted):
        look(probed(), [Check("M1", "stopped", stopped)])


def test_progress_and_failures() -> None:
    told: list[tuple[int, int, str]] = []
    checks = [Check("M1", "one", lambda probe: passed("")), Check("E5", "two", lambda probe: Finding("fail", "bad"))]
    found = Honesty(1, look(probed(), checks, lambda *said: told.append(said)))
    assert told == [(1, 2, "honesty M1"), (2, 2, "honesty E5")]
    assert found.failed and [check.id for check in found.with_status("fail")] == ["E5"]
