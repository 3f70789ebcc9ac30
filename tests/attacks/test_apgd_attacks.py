"""APGD and APGDTargeted as attacks: effort, budgets, batches, models that are broken by construction."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from attack_samples import Counting, Linear, build, images, labels_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.attacks import APGD, OBJECTIVES, APGDTargeted, Attack
from phalanx.rng import SampleRng
from phalanx.routing import Routed
from phalanx.threat import NORMS, ThreatModel

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
RADII = {"Linf": 0.06, "L2": 0.3, "L1": 1.0}
KINDS: dict[str, Attack] = {
    "ce": APGD(),
    "dlr": APGD(objective="dlr"),
    "margin": APGD(objective="margin"),
    "targeted": APGDTargeted(),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Attack:
    return KINDS[request.param]


class RowByRow(nn.Module):
    """Smooth logits of 16 pixels without a matrix product: the same bytes in a batch of any size."""

    def __init__(self, classes: int, scale: float = 6.0) -> None:
        super().__init__()
        draws = torch.randn(classes, 16, generator=torch.Generator().manual_seed(classes))
        self.weight = nn.Parameter(scale * draws)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1) - 0.5
        return (self.weight * (pixels + pixels**3)[:, None]).sum(-1)


def own_answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_a_linear_model_breaks_exactly_within_its_margin(kind: Attack, norm: Any, classes: int) -> None:
    # logits [w.x + b, 0, -9, ...]: the smallest margin in the ball is w.x + b - eps * |w| in the dual norm
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(1, 12, generator=generator, dtype=torch.float64)
    eps = {"Linf": 0.1, "L2": 0.2, "L1": 0.3}[norm]
    reach = eps * float(w.norm(p=DUAL[norm]))
    for share in (0.5, 0.98, 1.02, 2.0):
        rows = [w.tolist(), *([[0.0] * 12] * (classes - 1))]
        model = Linear(rows, [share * reach - float(x @ w), 0.0, -9.0, -9.0][:classes])
        result = replace(kind, eps=eps, norm=norm, steps=20).run(model, x, torch.tensor([0]))
        assert bool(result.broken) == (share < 1) and not result.invalid.any()


@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(NORMS),
    st.sampled_from([0.0, 1e-3, "8/255", 0.3, 1.0]),
    st.sampled_from([(1, 1, 1), (3, 2, 2), (5,), (1, 4, 4)]),
    st.integers(2, 5),
    st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_ball_and_range(name: str, norm: Any, eps: Any, shape: tuple[int, ...], classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Linear(torch.randn(classes, math.prod(shape), generator=generator).tolist())
    x = (torch.rand(4, *shape, generator=generator, dtype=torch.float64) * 1.3 - 0.15).clamp(0, 1)
    attack = replace(KINDS[name], norm=norm, eps=eps, steps=6)
    rng = SampleRng.for_batch(4, seed)
    result = attack.run(model, x, own_answers(model, x), rng=rng)
    assert ThreatModel(norm, eps).contains(result.x_adv, x).all()
    assert torch.equal(result.predicted, own_answers(model, result.x_adv))
    if eps == 0:
        assert torch.equal(result.x_adv, x) and not result.broken.any()


@given(st.sampled_from(list(KINDS)), st.sampled_from(NORMS), st.integers(0, 2**20), st.integers(2, 4))
@settings(max_examples=10, deadline=None)
def test_more_restarts_and_targets_never_break_fewer(name: str, norm: Any, seed: int, restarts: int) -> None:
    model, x = RowByRow(5).double(), images(12, torch.float64, seed=seed)
    y, rng = own_answers(model, x), SampleRng.for_batch(12, seed)
    base = replace(KINDS[name], norm=norm, eps=0.5 * RADII[norm], steps=5)
    few = base.run(model, x, y, rng=rng)
    more = replace(base, restarts=restarts).run(model, x, y, rng=rng)
    assert not (few.broken & ~more.broken).any()
    if isinstance(base, APGDTargeted):
        fewer = replace(base, targets=1).run(model, x, y, rng=rng)
        assert not (fewer.broken & ~few.broken).any()
    else:  # the first run does not know how many follow
        assert (more.restart[few.broken] == 0).all() and torch.equal(more.x_adv[few.broken], few.x_adv[few.broken])


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_break_more(kind: Attack, norm: Any) -> None:
    # of one sample nothing follows: with other steps come other checkpoints
    model = build("soft")
    assert isinstance(model, nn.Module)
    x = images(40, torch.float64)
    y = labels_for(model.double(), x)
    attack = replace(kind, eps=RADII[norm], norm=norm)
    one, some, many = (int(replace(attack, steps=steps).run(model, x, y).broken.sum()) for steps in (1, 5, 25))
    assert 8 < one <= some <= many < 40


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_bytes_in_any_batch_and_order(kind: Attack, norm: Any) -> None:
    model, x = RowByRow(4), images(64)
    y, keys = own_answers(model, x), SampleRng(3, torch.arange(500, 564))
    attack = replace(kind, eps=0.5 * RADII[norm], norm=norm, steps=4)
    whole = attack.run(model, x, y, rng=keys)
    assert 3 < int(whole.broken.sum()) < 61
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for rows in (order, *order.split(7)[:3], *order.split(1)[:5]):
        part = attack.run(model, x[rows], y[rows], rng=keys[rows])
        for one, other in zip(part, whole, strict=True):
            assert one is other is None or torch.equal(one.nan_to_num(), other[rows].nan_to_num())


def test_queries_by_hand(kind: Attack) -> None:
    # nothing breaks: two verdicts, a look at the clean image for its classes, and steps + 1 points a run
    model, x = RowByRow(4, scale=0.0), images(3)
    with torch.no_grad():
        model.weight[0] += 1e-6
    counted = Counting(model)
    y = own_answers(model, x)
    runs = 2 * (3 if isinstance(kind, APGDTargeted) else 1)
    for eot in (1, 3):
        counted.sizes.clear()
        attack = replace(kind, eps=1e-9, steps=4, restarts=2, eot=eot)
        result = attack.run(counted, x, y)
        expected = 2 + isinstance(kind, APGDTargeted) + eot * runs * 5
        assert result.queries.tolist() == [expected] * 3 and sum(counted.sizes) == 3 * expected


def test_in_l1_the_larger_balls_cost_queries_and_never_count() -> None:
    model, x = RowByRow(4), images(40)
    y = own_answers(model, x)
    counted = Counting(model)
    result = APGD(eps=0.4, norm="L1", steps=10).run(counted, x, y)
    held = ~result.broken
    # phases of 3, 3 and 4 steps
    assert (result.queries[held] == 2 + 4 + 4 + 5).all() and sum(counted.sizes) == int(result.queries.sum())
    assert result.broken.any() and (result.first_success[result.broken] >= 6).all()
    assert ThreatModel("L1", 0.4).contains(result.x_adv, x).all()


def test_a_sample_is_dropped_where_it_breaks() -> None:
    model, x = build("float64"), images(20, torch.float64)
    y = labels_for(model, x)
    counted = Counting(model)
    result = APGD(eps=0.1, steps=10).run(counted, x, y)
    searched = result.first_success > 0
    assert searched.any() and (result.queries[searched] == 2 + 1 + result.first_success[searched]).all()
    assert sum(counted.sizes) == int(result.queries.sum())


def test_another_surface_is_judged_by_the_whole_model() -> None:
    model, x = build("top-1"), images(30)
    y = labels_for(model, x)
    for attack in (APGD(eps=0.1, steps=9, surface="router"), APGD(eps=0.1, steps=9, surface="dense")):
        result = attack.run(model, x, y)
        predicted = own_answers(model, result.x_adv)  # type: ignore[arg-type]
        assert torch.equal(result.broken, predicted != y) and 6 < int(result.broken.sum()) < 30
        # ten points, of which 0, 1, 2, 4, 8 and the last are judged
        assert (result.queries[~result.broken] == 2 + 10 + 6).all()
        assert set(result.first_success.tolist()) <= {-1, 0, 1, 2, 4, 8, 9}


def test_each_run_starts_elsewhere_and_as_its_stream_says() -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return torch.stack([9 + x.sum(1), 0 * x.sum(1), 0 * x.sum(1)], 1)

    x, y, rng = torch.full((2, 5), 0.5), torch.tensor([0, 0]), SampleRng(4, torch.tensor([30, 31]))
    for attack, first in ((APGD(restarts=3), 1), (APGDTargeted(targets=1, restarts=3), 2)):
        seen.clear()
        attack = replace(attack, eps=0.2, steps=1)
        attack.run(watched, x, y, rng=rng)
        starts = seen[first : first + 6 : 2]
        assert len({float(start[0, 0]) for start in starts}) == 3
        for restart, start in enumerate(starts):
            assert torch.equal(start, attack.threat.random_start(x, rng, restart=restart))


def test_the_steps_of_earlier_runs_count() -> None:
    # classes 0 and 1 are constant, so that the run towards 1 does not move; 2 wins from .595 upwards
    model, x = Linear([[0.0], [0.0], [10.5]], [1.0, 0.5, -5.25]), torch.tensor([[0.5]], dtype=torch.float64)
    result = APGDTargeted(eps=0.1, steps=7).run(model, x, torch.tensor([0]))
    assert result.broken.all() and result.restart.tolist() == [1] and result.first_success.tolist() == [7 + 1]


class Spoilt(nn.Module):
    """A mean over the image, with a fault."""

    def __init__(self, fault: str, classes: int) -> None:
        super().__init__()
        self.fault = fault
        self.shares = nn.Parameter(torch.linspace(1, 0, classes))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        if self.fault == "constant":
            return self.shares.expand(len(x), -1)
        if self.fault == "equal":
            return 0 * pixels.mean(1, keepdim=True) * self.shares
        if self.fault == "zero gradient":
            return (pixels.mean(1, keepdim=True) > 2) + self.shares
        if self.fault == "NaN":
            return pixels.mean(1, keepdim=True) * self.shares * math.nan
        if self.fault == "NaN gradient":
            return (0 * (pixels - pixels.detach())).sqrt().sum(1, keepdim=True) + self.shares
        # NaN wherever a pixel has moved
        moved = (pixels != 0.5).any(1, keepdim=True)
        return torch.where(moved, math.nan, pixels.mean(1, keepdim=True) * self.shares)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 3, 4])
@pytest.mark.parametrize("fault", ["constant", "equal", "zero gradient", "NaN gradient"])
def test_a_model_that_cannot_be_climbed_stands_and_says_so(kind: Attack, norm: Any, classes: int, fault: str) -> None:
    model, x = Spoilt(fault, classes), torch.full((5, 1, 2, 2), 0.5)
    result = replace(kind, eps=0.2, norm=norm, steps=5).run(model, x, torch.zeros(5, dtype=torch.int64))
    assert not result.broken.any() and not result.invalid.any()
    assert ThreatModel(norm, 0.2).contains(result.x_adv, x).all()
    looked = not (classes == 1 and isinstance(kind, APGDTargeted))
    assert fault == "NaN gradient" or (result.zero_gradient == looked).all()


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("fault", ["NaN", "NaN nearby"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_model_without_an_answer_is_invalid(kind: Attack, norm: Any, classes: int, fault: str) -> None:
    model, x = Spoilt(fault, classes), torch.full((5, 1, 2, 2), 0.5)
    result = replace(kind, eps=0.2, norm=norm, steps=5).run(model, x, torch.zeros(5, dtype=torch.int64))
    assert result.invalid.all() and not result.broken.any()


def test_all_wrong_and_one_sample(kind: Attack) -> None:
    model, x = RowByRow(4), images(6)
    y = own_answers(model, x)
    wrong = replace(kind, eps=0.1).run(model, x, (y + 1) % 4)
    assert wrong.broken.all() and (wrong.queries == 2).all() and torch.equal(wrong.x_adv, x)
    one = replace(kind, eps=0.3, steps=20).run(model, x[:1], y[:1])
    assert one.broken.all()


def test_a_search_returns_its_best_point(kind: Attack) -> None:
    model, x = RowByRow(4), images(6)
    y = own_answers(model, x)
    found = replace(kind, eps=0.02, steps=10).search(model, x, y)
    assert (found.x_adv - x).abs().max() <= 0.02 + 1e-6 and (found.queries > 10).all()


# -- the difference of logits ratio ------------------------------------------------------------------------------------

LOGITS = torch.tensor([[5.0, 3.0, 1.0, -1.0, -4.0], [2.0, 3.0, 4.0, 8.0, 0.0]], dtype=torch.float64)


def gains(name: str, classes: int, y: list[int], clean: Tensor | None = None) -> Tensor:
    seen = Routed(LOGITS[:, :classes] if clean is None else clean, None)
    return OBJECTIVES[name](Routed(LOGITS[:, :classes], None), seen, torch.tensor(y))


def test_the_ratios_by_hand() -> None:
    # -(5 - 3) / (5 - 1): right; -(2 - 8) / (8 - 3): wrong
    assert gains("dlr", 5, [0, 0]).tolist() == pytest.approx([-2 / 4, 6 / 5])
    # the first from 0 to 1: (5 - 3) / (5 - (1 - 1) / 2); the second from 3 to 2: (8 - 4) / (8 - (3 + 2) / 2)
    assert gains("dlr_targeted", 5, [1, 2]).tolist() == pytest.approx([2 / 5, 4 / 5.5])
    # what is left is the clean image's answer, not the attacked one's; never the class to reach
    clean = torch.tensor([[0.0, 0.0, 9.0, 0.0, 0.0], [0.0, 1.0, 9.0, 0.0, 0.0]], dtype=torch.float64)
    assert gains("dlr_targeted", 5, [1, 2], clean).tolist() == pytest.approx([-2 / 5, -1 / 5.5])


@pytest.mark.parametrize(("name", "least"), [("dlr", 3), ("dlr_targeted", 4)])
def test_too_few_classes_make_it_the_margin(name: str, least: int) -> None:
    for classes in range(2, 6):
        same = torch.equal(gains(name, classes, [1, 0]), gains("margin", classes, [1, 0]))
        assert same == (classes < least)


@given(st.floats(-50, 50), st.floats(1e-3, 1e3), st.sampled_from(["dlr", "dlr_targeted"]))
@settings(max_examples=30, deadline=None)
def test_neither_shift_nor_scale_of_the_logits_matters(shift: float, scale: float, name: str) -> None:
    objective, y = OBJECTIVES[name], torch.tensor([1, 2])
    changed = Routed(scale * LOGITS + shift, None)
    torch.testing.assert_close(objective(changed, changed, y), objective(Routed(LOGITS, None), Routed(LOGITS, None), y))


def test_the_fallback_is_named_and_is_what_happens() -> None:
    assert [APGD(objective="dlr").for_classes(k).objective for k in (2, 3, 4)] == ["margin", "dlr", "dlr"]
    assert APGD().for_classes(2) == APGD()
    named = [APGDTargeted().for_classes(k) for k in (2, 3, 4, 100)]
    assert [attack.objective for attack in named] == ["margin", "margin", "dlr_targeted", "dlr_targeted"]
    assert [attack.targets for attack in named] == [1, 2, 3, 9]
    for classes in (2, 3, 4):
        model, x = RowByRow(classes), images(12)
        y = own_answers(model, x)
        for attack in (APGD(objective="dlr", eps=0.03, steps=4), APGDTargeted(eps=0.03, steps=4)):
            plain, resolved = (a.run(model, x, y) for a in (attack, attack.for_classes(classes)))
            assert torch.equal(plain.x_adv, resolved.x_adv) and torch.equal(plain.broken, resolved.broken)


def test_targets_are_the_most_likely_wrong_classes() -> None:
    # from pixel 0: classes 1, 2, 3 follow in this order, each out of reach of the others
    model = Linear([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    x = torch.tensor([[0.9, 0.6, 0.5, 0.4]], dtype=torch.float64)
    for targets, wanted in ((1, [1]), (2, [1, 2]), (9, [1, 2, 3])):
        attack = APGDTargeted(eps=0.1, steps=3, targets=targets)
        aims = list(attack._aims(attack._target(model, model, x, torch.tensor([0]), None, judged=True)))
        assert [int(aim.wanted) for aim in aims if aim.wanted is not None] == wanted
    assert APGDTargeted(steps=3, targets=2, restarts=2).gradient_steps == 12


@pytest.mark.parametrize(
    ("attack", "arguments", "message"),
    [
        (APGD, {"steps": 0}, "steps must be at least 1, got 0"),
        (APGD, {"restarts": 0}, "restarts must be at least 1, got 0"),
        (APGDTargeted, {"eot": 0}, "eot must be at least 1, got 0"),
        (APGDTargeted, {"targets": 0}, "targets must be at least 1, got 0"),
        (APGDTargeted, {"targeted": True}, "targeted of targeted APGD is fixed, got True; leave it out"),
        (APGDTargeted, {"objective": "dlr"}, "objective must be one of dlr_targeted, margin, cross_entropy, got 'dlr'"),
        (APGD, {"objective": "loss"}, "objective must be one of cross_entropy, margin, dlr"),
    ],
)
def test_settings_that_make_no_attack(attack: type[Attack], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attack(**{"eps": 0.1, **arguments})
