"""Time and memory: what is limited changes no verdict but those that were given up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from known_answers import FIVE, THREAT, Bright
from torch import Tensor

from phalanx.errors import InputError
from phalanx.evaluation import Limits, Shard, analyse, evaluate, parse_duration, protocol
from phalanx.evaluation.alpha import pick_alpha
from phalanx.evaluation.books import Memory
from phalanx.evaluation.budget import OutOfTime, at_most, duration, estimate
from phalanx.evaluation.standing import Standing
from phalanx.evaluation.targeted import targeted_success
from phalanx.nn import frozen
from phalanx.threat import ThreatModel

PGD = protocol("pgd-8", THREAT)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5s", 1.5), ("10m", 600), ("1h30m", 5400), ("2h", 7200)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "10 m", "m", "1d", "1m1h", "nan", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="90s, 10m or 1h30m"):
        parse_duration(text)


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.2, 40, 99.6, 720, 12600)] == ["1 s", "40 s", "2 min", "12 min", "3.5 h"]


class _Slow(Bright):
    """Every pass makes the clock run by a second."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += 1
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("phalanx.evaluation.budget.time.monotonic", lambda: now[0])
    monkeypatch.setattr("phalanx.evaluation.budget.time.perf_counter", lambda: now[0])
    return now


def test_an_attack_that_takes_too_long_is_given_up_and_nothing_is_robust(clock: list[float]) -> None:
    model = _Slow(clock).train()
    model.threshold.requires_grad_(True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = evaluate(model, FIVE, protocol("fgsm,pgd-8", THREAT), THREAT, limits=Limits(attack_seconds=6))
    by_attack = {name: [row.verdict for row in found.rows if row.attack == name] for name in ("fgsm", "pgd-8")}
    assert set(by_attack["fgsm"]) == {"held", "broken"} and by_attack["pgd-8"] == ["timeout"] * 4
    assert (found.finished, found.robust_acc, found.clean_acc) == (True, 0, 4 / 5)
    assert found.summary.attacks[1].timeout == 4
    assert model.training and model.threshold.requires_grad and torch.equal(torch.get_rng_state(), before)


def test_an_attack_in_time_finds_the_same(clock: list[float]) -> None:
    limited = evaluate(_Slow(clock), FIVE, PGD, THREAT, limits=Limits(attack_seconds=1000))
    assert limited.rows == evaluate(Bright(), FIVE, PGD, THREAT).rows


def test_a_limit_raises_once(clock: list[float]) -> None:
    raised = 0
    with at_most(1, Bright()):
        clock[0] = 5
        for _ in range(3):
            try:
                torch.zeros(1)
            except OutOfTime:
                raised += 1
    assert raised == 1


def test_a_limit_that_falls_into_the_giving_back_gives_back(clock: list[float]) -> None:
    model = Bright().train()
    with pytest.raises(OutOfTime), at_most(1, model), frozen(model):
        clock[0] = 5
    assert model.training and model.threshold.requires_grad


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("fgsm", 2 + 2), ("pgd-40", 41), ("pgd-20x3", 63), ("apgd-40", 41), ("apgd-t-40x1", 41), ("fab-t-40x1", 80),
        ("square-300", 300), ("steer-40", 41),
    ],
)  # fmt: skip
def test_the_estimate_is_of_the_right_size(clock: list[float], name: str, passes: int, norm: str) -> None:
    # images that nothing breaks, so that every step is made
    threat = ThreatModel(norm, "1/1000")
    batch = next(FIVE.batches(5))
    batch = type(batch)(*(column[[0, 1, 3, 4]] for column in batch))
    members = protocol(name, threat).members
    model = _Slow(clock)
    found = estimate(model, batch, members, Standing(protocol(name, threat), Memory()), range(8))
    # two batches of four
    assert found[members[0].name] == pytest.approx(2 * passes, rel=0.35, abs=12)


def test_the_estimate_is_told_before_the_first_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    evaluate(Bright(), FIVE, protocol("fgsm,pgd-8", THREAT), THREAT, announce=heard.append)
    (line,) = heard
    assert line == "about 1 s at most: fgsm 1 s, pgd-8 1 s"


class _Full(Bright):
    """Has room for two images."""

    room = 2

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved_and_no_verdict_lost() -> None:
    heard: list[str] = []
    found = evaluate(_Full().eval(), FIVE, PGD, THREAT, notify=heard.append)
    assert found.rows == evaluate(Bright(), FIVE, PGD, THREAT).rows and found.finished
    # once: the size that was too large is not tried again
    assert heard == ["5 images do not fit into the memory; going on with 2 at a time"]


class _NoRoomForGradients(Bright):
    """Has room for two images where a gradient is wanted, and for any number without."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_the_estimate_too_goes_on_with_what_fits() -> None:
    heard: list[str] = []
    found = evaluate(_NoRoomForGradients(), FIVE, PGD, THREAT, announce=heard.append)
    assert found.rows == evaluate(Bright(), FIVE, PGD, THREAT).rows and len(heard) == 1


def test_everything_else_that_attacks_goes_on_with_what_fits() -> None:
    few, plain, heard = _NoRoomForGradients(), Bright(), []
    reached = [
        targeted_success(model, FIVE, THREAT, 5, num_classes=2, batch_size=5, seed=0, device="cpu", notify=heard.append)
        for model in (few, plain)
    ]
    assert reached[0] == reached[1] and len(heard) == 1
    attack = PGD.members[0].attack
    assert analyse(few, FIVE, attack, name="x", num_classes=2) == analyse(plain, FIVE, attack, name="x", num_classes=2)
    margins = replace(attack, objective="margin")
    assert pick_alpha(few, FIVE, margins) == pick_alpha(plain, FIVE, margins)


def test_the_cpus_allocator_has_no_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(_Full):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return Bright.forward(self, x)

    assert evaluate(Full(), FIVE, PGD, THREAT).robust_acc == 2 / 5


def test_one_image_that_does_not_fit_and_other_errors() -> None:
    model = _Full()
    model.room = 0
    with pytest.raises(InputError, match="one image alone does not fit into the memory"):
        evaluate(model, FIVE, PGD, THREAT)

    class Broken(Bright):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        evaluate(Broken(), FIVE, PGD, THREAT)


def test_shards_part_the_images() -> None:
    parts = [Shard(number, 3).of(FIVE).ids.tolist() for number in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == FIVE.ids.tolist() and all(parts)
    # by id, not by place
    turned = FIVE.select([4, 3, 2, 1, 0])
    assert [sorted(Shard(number, 3).of(turned).ids.tolist()) for number in (1, 2, 3)] == parts
    assert str(Shard.parse(" 2/5 ")) == "2/5" and Shard.parse("2/5").name == "shard-2-of-5"
    with pytest.raises(InputError, match="shard 50/99 of 5 images holds none"):
        Shard(50, 99).of(FIVE)


@pytest.mark.parametrize("text", ["", "2", "0/5", "6/5", "1/0", "-1/2", "1/2/3", "a/b"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(InputError, match="a shard is i/k"):
        Shard.parse(text)
