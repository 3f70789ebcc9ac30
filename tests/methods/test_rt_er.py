# B batch, E experts, K selected, R regularised

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_networks import LogOdds, pixel

import tiny
from phalanx.attacks import FGSM, PGD, JointMargin, RouteSteering
from phalanx.attacks.surfaces import UNDECIDED
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.config import load_run
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.methods import RTER, Loss
from phalanx.methods.base import classification_loss, mean_kl
from phalanx.methods.expert_robustness import Choices
from phalanx.rng import Rng, SampleRng
from phalanx.routing import DualModel, MixtureOfExperts, RoutedModel, only, select
from phalanx.threat import ThreatModel

RNG = Rng(3)


class _Affine(nn.Module):
    """Scores slope * pixel + offset, one for each expert."""

    def __init__(self, slope: Sequence[float], offset: Sequence[float]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([*slope], dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor([*offset], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) * self.slope + self.offset


@dataclass(frozen=True, kw_only=True)
class _Shift(PGD):
    """Finds x + eps on the mixture and x - eps on a single expert; records at whom it was aimed (-1: the mixture), and
    on which images."""

    asked: list[tuple[str, list[int], Tensor]] = field(default_factory=list)

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        route: Any = None if target.clean is None else target.clean.route
        experts = torch.full((len(target),), UNDECIDED) if route is None else route.experts.flatten()
        self.asked.append((self.surface, experts.tolist(), target.x))
        sign = torch.where(experts == UNDECIDED, 1, -1).reshape(-1, *([1] * (target.x.dim() - 1)))
        return super().perturb(target, rng)._replace(x_adv=target.x + sign * self.threat.epsilon)


def _shift() -> _Shift:
    return _Shift(eps=0.25, steps=1)


def _three(top_k: int = 1) -> MixtureOfExperts:
    """Of three experts the first is selected; second best is expert 1 at the clean pixel 1/2, expert 2 at 3/4.

    Scores at 1/2: (10, 2, 1). At 3/4: (10, 2, 3).
    """
    weights = (4 * math.log(2), 4 * math.log(3), 4 * math.log(5))
    return MixtureOfExperts(_Affine((0, 0, 8), (10, 2, -3)), [LogOdds(w) for w in weights], top_k)


def _kl(p_odds: float, q_odds: float) -> float:
    p, q = p_odds / (1 + p_odds), q_odds / (1 + q_odds)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# expert of base b has odds b**(4 * pixel): b**2 at the clean 1/2, b**3 at 3/4 (the mixture's d), b at 1/4 (its own)
CE = -math.log(8 / 9)
SHARED = {0: _kl(4, 8), 1: _kl(9, 27), 2: _kl(25, 125)}
OWN = {0: _kl(4, 2), 1: _kl(9, 3), 2: _kl(25, 5)}


def _loss(method: RTER, model: Any, batch: Batch | None = None, rng: Rng = RNG) -> Loss:
    (update,) = method.updates(model, {"train": batch or _digits()}, rng)
    return update.loss()


def _digits() -> Batch:
    return next(tiny.digits().train.batches(16))


EXPECTED = {
    ("second", "clean", "shared"): SHARED[1],
    ("second", "clean", "own"): OWN[1],
    ("second", "adversarial", "shared"): SHARED[2],
    ("second", "adversarial", "own"): OWN[2],
    ("all_others", "clean", "shared"): (SHARED[1] + SHARED[2]) / 2,
    ("all_others", "clean", "own"): (OWN[1] + OWN[2]) / 2,
    ("all_others", "adversarial", "shared"): (SHARED[1] + SHARED[2]) / 2,
    ("all_others", "adversarial", "own"): (OWN[1] + OWN[2]) / 2,
    ("all", "clean", "shared"): sum(SHARED.values()) / 3,
    ("all", "adversarial", "own"): sum(OWN.values()) / 3,
}
REGULARISED = {"second": 1, "all_others": 2, "all": 3}


@pytest.mark.parametrize("choices", EXPECTED)
@pytest.mark.parametrize(("beta", "reduction"), [(0.0, "mean"), (6.0, "mean"), (6.0, "sum")])
def test_every_choice_by_hand(choices: tuple[Any, Any, Any], beta: float, reduction: Any) -> None:
    regularised, chosen_on, kl_point = choices
    method = RTER(
        attack=_shift(),
        beta=beta,
        balance=0.0,
        regularised=regularised,
        chosen_on=chosen_on,
        kl_point=kl_point,
        kl_reduction=reduction,
    )
    loss = _loss(method, _three(), pixel())
    kl = EXPECTED[choices] * (REGULARISED[regularised] if reduction == "sum" else 1)
    assert loss.value.item() == pytest.approx(CE + beta * kl)
    assert loss.logs["kl"].item() == pytest.approx(kl)


def test_the_presets() -> None:
    assert RTER.PRESETS == {
        "paper": ("second", "adversarial", "shared", "mean", "joint"),
        "code": ("second", "clean", "own", "mean", "cross_entropy"),
        "sound": ("all_others", "adversarial", "own", "mean", "cross_entropy"),
    }
    assert RTER().preset == "sound"
    for preset, choices in RTER.PRESETS.items():
        assert RTER(preset=preset).choices == choices


@pytest.mark.parametrize("preset", RTER.PRESETS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regularised", "second"),
        ("regularised", "all_others"),
        ("regularised", "all"),
        ("chosen_on", "clean"),
        ("kl_point", "shared"),
        ("kl_reduction", "sum"),
        ("inner", "cross_entropy"),
    ],
)
def test_a_field_overrides_its_preset_and_nothing_else(preset: Any, field: str, value: str) -> None:
    method = RTER(preset=preset, **{field: value})  # type: ignore[arg-type]
    assert method.choices == RTER.PRESETS[preset]._replace(**{field: value})


def test_an_overridden_preset_can_be_seen() -> None:
    overrides = ("method.preset=code", "method.chosen_on=adversarial")
    method = load_run("digits-rt-er", overrides).value.method
    assert isinstance(method, RTER)
    assert (method.preset, method.regularised, method.chosen_on, method.kl_point) == ("code", None, "adversarial", None)
    assert method.choices == Choices("second", "adversarial", "own", "mean", "cross_entropy")
    # it survives what the recipe's threat changes
    assert replace(method.within(tiny.THREAT), attack=method.attack) == method


def test_code_attacks_the_second_expert_of_the_clean_image_only() -> None:
    attack = _shift()
    # four pixels; the released code sorts the clean scores: 2 beats 1 from 5/8 on
    x = torch.tensor([0.5, 0.6, 0.65, 0.75], dtype=torch.float64).reshape(4, 1, 1, 1)
    batch = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    _loss(RTER(attack=attack, preset="code"), _three(), batch)
    # the mixture beside them, in one search
    ((surface, experts, images),) = attack.asked
    assert (surface, experts) == ("held", [-1, -1, -1, -1, 1, 1, 2, 2])
    assert torch.equal(images, torch.cat([x, x]))


def test_sound_attacks_every_idle_expert_once() -> None:
    attack = _shift()
    _loss(RTER(attack=attack), _three(), pixel())
    asked = [(surface, experts) for surface, experts, _ in attack.asked]
    # best first, at 3/4, which is known when the mixture has been attacked
    assert asked == [("whole", [-1]), ("experts", [2, 1])]


def test_paper_attacks_the_mixture_only() -> None:
    attack = _shift()
    _loss(RTER(attack=attack, preset="paper"), _three(), pixel())
    assert [surface for surface, _, _ in attack.asked] == ["whole"]


def test_all_attacks_every_expert_on_the_whole_batch() -> None:
    attack = _shift()
    x = torch.tensor([0.5, 0.75], dtype=torch.float64).reshape(2, 1, 1, 1)
    _loss(
        RTER(attack=attack, regularised="all"), _three(), Batch(x, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    )
    ((_, experts, images),) = attack.asked
    assert experts == [-1, -1, 0, 0, 1, 1, 2, 2] and torch.equal(images, torch.cat([x] * 4))


def test_all_needs_no_idle_expert() -> None:
    method = RTER(attack=PGD(steps=1), regularised="all").within(tiny.THREAT)
    for model in (tiny.mixture(2, "all"), tiny.mixture(1)):
        method.check(model, 10)
        assert _loss(method, model).logs["kl"] > 0


def test_of_two_selected_experts_neither_is_regularised() -> None:
    # at 3/4 the gate takes 0 and 2: expert 1 is idle, though its score is second at the clean pixel
    for regularised in ("second", "all_others"):
        attack = _shift()
        loss = _loss(RTER(attack=attack, regularised=regularised), _three(2), pixel())  # type: ignore[arg-type]
        assert loss.logs["kl"].item() == pytest.approx(OWN[1])
        assert attack.asked[1][1] == [1]


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_beta_weighs_the_same_however_many_experts(experts: int) -> None:
    # a sum over the experts, as in the appendix, would give E - 1 times as much
    networks = [LogOdds(4 * math.log(3)) for _ in range(experts)]
    model = MixtureOfExperts(_Affine([0.0] * experts, [*range(experts)]), networks)
    loss = _loss(RTER(attack=_shift(), balance=0.0), model, pixel())
    assert loss.value.item() == pytest.approx(-math.log(27 / 28) + 6 * OWN[1])


@pytest.mark.parametrize("chosen_on", ["clean", "adversarial"])
def test_the_second_expert_is_of_the_image_that_was_named(chosen_on: Any) -> None:
    model = _three()
    _loss(RTER(attack=_shift(), preset="paper", chosen_on=chosen_on), model, pixel()).value.backward()
    trained = [expert.weight.grad is not None and expert.weight.grad.item() != 0 for expert in model.experts]
    assert trained == ([True, True, False] if chosen_on == "clean" else [True, False, True])


def test_gradient_flows_through_both_branches() -> None:
    model = _three()
    _loss(RTER(attack=_shift(), preset="code", balance=0.0), model, pixel()).value.backward()
    # expert 1, s = w/2 and t = w/4, w = 4 ln 3: dKL/dt = q - p = 3/4 - 9/10, dKL/ds = p (1 - p) (s - t) = .09 ln 3
    expected = 6 * ((0.75 - 0.9) / 4 + 0.09 * math.log(3) / 2)
    assert model.experts[1].weight.grad.item() == pytest.approx(expected)


def test_the_router_learns_from_cross_entropy_and_balance_alone() -> None:
    def gradient(**settings: Any) -> Tensor:
        model = tiny.mixture(3)
        method = RTER(attack=PGD(steps=2), **settings).within(tiny.THREAT)
        _loss(method, model).value.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.router.parameters()])

    free = gradient(beta=0.0, balance=0.0)
    assert free.abs().max() > 0
    torch.testing.assert_close(gradient(beta=9.0, balance=0.0), free)
    assert not torch.allclose(gradient(beta=0.0, balance=0.5), free)


def test_equal_to_a_loop_over_single_experts() -> None:
    """Against the definition, one expert and one image at a time, in float64 and evaluation mode."""
    model = tiny.mixture(4).double().eval()
    x, y, ids = _digits()
    batch = Batch(x.double(), y, ids)
    method = RTER(attack=PGD(steps=3)).within(tiny.THREAT)
    d = method.attack(model, batch.x, y, rng=RNG.fold("attack").samples(ids))
    order = model.gate(d).scores.argsort(-1, descending=True)
    terms = []
    for rank, image in itertools.product(range(1, 4), range(len(ids))):
        one, expert = slice(image, image + 1), model.experts[order[image, rank]]
        attack = PGD(eps="3/16", steps=3)
        streams = RNG.fold("attack").samples(ids).fold("own").repeated(3)
        own = attack(expert, batch.x[one], y[one], rng=streams[slice((rank - 1) * len(ids) + image, None)][:1])
        terms.append(mean_kl(expert(batch.x[one]), expert(own)))
    expected = classification_loss(model, d, y, method.balance).value + 6 * torch.stack(terms).mean()
    torch.testing.assert_close(_loss(method, model, batch).value, expected)


def test_an_attack_under_a_route_is_the_attack_on_that_expert() -> None:
    model, (x, y, _) = tiny.mixture(3).eval(), _digits()
    attack = PGD(eps="3/16", steps=3)
    for expert in range(3):
        under = replace(attack, surface="experts").search(model, x, y, route=only(model.gate(x), expert)).x_adv
        torch.testing.assert_close(under, attack(model.experts[expert], x, y))
    # without one it is the gate's own decision
    own = replace(attack, surface="experts")
    torch.testing.assert_close(own.search(model, x, y, route=model.gate(x)).x_adv, own(model, x, y))


@pytest.mark.parametrize("regularised", ["second", "all"])
def test_a_search_side_by_side_is_the_searches_apart(regularised: Any) -> None:
    model, batch = tiny.mixture(4).double().eval(), _digits()
    batch = batch._replace(x=batch.x.double())
    method = RTER(attack=PGD(steps=3), preset="code", regularised=regularised).within(tiny.THREAT)
    streams = RNG.fold("attack").samples(batch.ids)
    found = method._side_by_side(model, batch.x, batch.y, streams)
    assert found is not None and found.times == (4 if regularised == "all" else 1)
    # by the gate's own decision at each iterate, its gradient included
    torch.testing.assert_close(found.x_adv, method.attack(model, batch.x, batch.y, rng=streams))
    own, each = replace(method.attack, surface="experts"), streams.repeated(1 + found.times)
    for rank in range(found.times):
        rows = slice(rank * len(batch.x), (rank + 1) * len(batch.x))
        rng = each[slice((rank + 1) * len(batch.x), (rank + 2) * len(batch.x))]
        alone = own.search(model, batch.x, batch.y, rng=rng, route=select(found.routes, torch.arange(64)[rows]))
        torch.testing.assert_close(found.points[rows], alone.x_adv)


def test_two_answering_experts_are_attacked_one_after_the_other() -> None:
    model, batch = tiny.mixture(4, 2), _digits()
    method = RTER(attack=PGD(steps=1), preset="code").within(tiny.THREAT)
    assert method._side_by_side(model, batch.x, batch.y, RNG.samples(batch.ids)) is None
    assert _loss(method, model, batch).value.isfinite()


def test_a_held_route_needs_one_top_1_gate() -> None:
    batch = _digits()
    attack = PGD(eps="3/16", steps=1, surface="held")
    for model in (tiny.mixture(4, 2), tiny.mixture(2).experts[0], DualModel(tiny.mixture(2), tiny.mixture(2), 0.7)):
        with pytest.raises(InputError, match="surface 'held' needs a model with one top-1 gate; use 'experts'"):
            attack(model, batch.x, batch.y)


def test_a_route_that_nothing_reads_is_refused() -> None:
    model, (x, y, _) = tiny.mixture(3), _digits()
    with pytest.raises(InputError, match=r"a route was given, but surface 'whole' .* reads none; use surface"):
        PGD(eps="3/16").search(model, x, y, route=model.gate(x))


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "paper"},
        {"preset": "code"},
        {"regularised": "second"},
        {"regularised": "all"},
        {"kl_point": "shared"},
        {"kl_reduction": "sum"},
        {"kl_point": "shared", "inner": "joint"},
        {"beta": 3.0},
        {"balance": 0.5},
        {"attack": PGD(eps="1/16", steps=2)},
    ],
    ids=str,
)
def test_every_option_changes_the_loss(change: dict[str, Any]) -> None:
    base = RTER(attack=PGD(steps=2))
    first, second = (
        _loss(method.within(tiny.THREAT), tiny.mixture(4)).value for method in (base, replace(base, **change))
    )
    assert not torch.allclose(first, second)


def test_the_same_seed_gives_the_same_loss() -> None:
    method = RTER(attack=PGD(steps=2)).within(tiny.THREAT)
    first, again, other = (_loss(method, tiny.mixture(3), rng=rng).value for rng in (RNG, RNG, Rng(4)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_loss_can_be_taken_again_and_keeps_its_experts() -> None:
    model, batch = _three(), pixel()
    (update,) = RTER(attack=_shift(), preset="paper", balance=0.0).updates(model, {"train": batch}, RNG)
    before = update.loss().value
    with torch.no_grad():
        model.router.offset.copy_(torch.tensor([10.0, 5.0, -9.0]))
    assert torch.equal(update.loss().value, before)
    with torch.no_grad():
        model.experts[2].weight.mul_(2)
    # expert 2 now answers with the odds 25**(4 * pixel)
    assert update.loss().value.item() == pytest.approx(CE + 6 * _kl(25**2, 25**3))


def test_the_choice_leaves_modes_and_batchnorm_alone() -> None:
    model = tiny.mixture(3, expert="small_cnn").train()
    model.router = nn.Sequential(nn.BatchNorm2d(1), model.router)
    model.experts[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    method = RTER(attack=PGD(steps=2)).within(tiny.THREAT)
    (update,) = method.updates(model, {"train": _digits()}, RNG)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert update.loss().value.isfinite()


@pytest.mark.parametrize(
    ("experts", "top_k", "message"),
    [
        (4, 4, "rt_er needs a non-selected expert: top_k=4 of 4 experts; lower model.top_k"),
        (3, "all", "rt_er needs a non-selected expert: top_k=3 of 3 experts; lower model.top_k"),
        (1, 1, "rt_er needs a non-selected expert: top_k=1 of 1 experts; raise model.experts"),
    ],
)
def test_a_mixture_without_an_idle_expert_is_refused(experts: int, top_k: int | str, message: str) -> None:
    method, model = RTER(attack=PGD(steps=1)).within(tiny.THREAT), tiny.mixture(experts, top_k)
    with pytest.raises(InputError, match=message):
        _loss(method, model)
    # and before there is a batch
    with pytest.raises(InputError, match=message):
        method.check(model, 10)


class _Pair(nn.Module):
    """Two mixtures that answer together: a tree of routes."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList([tiny.mixture(2), tiny.mixture(2, seed=1)])

    def routed(self, x: Tensor, route: Any = None) -> Any:
        del route
        return self.halves[0].routed(x)

    def gate(self, x: Tensor) -> Any:
        return tuple(half.gate(x) for half in self.halves)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x).logits  # type: ignore[no-any-return]

    def players(self) -> dict[str, Sequence[nn.Parameter]]:
        return {"experts": list(self.parameters())}


def test_a_model_with_several_gates_is_refused() -> None:
    model = _Pair()
    assert isinstance(model, RoutedModel)
    with pytest.raises(InputError, match="rt_er trains a mixture of whole networks, got a model with several gates"):
        _loss(RTER(attack=PGD(steps=1)).within(tiny.THREAT), model)
    dual = DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.5)
    with pytest.raises(InputError, match="rt_er trains a mixture of whole networks, got a model with several gates"):
        RTER().check(dual, 10)


def test_a_mixture_with_an_idle_expert_passes_the_check() -> None:
    RTER().check(tiny.mixture(2), 10)
    RTER().check(tiny.mixture(3, 2), 10)


def test_the_threat_fills_what_was_left_open() -> None:
    method = RTER(beta=2.0, preset="code").within(ThreatModel("L2", "1/2"))
    assert (method.attack.norm, str(method.attack.eps), method.beta, method.preset) == ("L2", "1/2", 2.0, "code")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RTER(beta=-1), "beta must be at least 0, got -1"),
        (lambda: RTER(balance=-1), "balance must be at least 0, got -1"),
        (lambda: RTER(attack=PGD(surface="dense")), "attack.surface must be 'whole', got 'dense'; rt_er itself aims"),
        (
            lambda: RTER(attack=RouteSteering()),
            "attack must be one that can aim at a single expert, got route_steering",
        ),
        (lambda: RTER(attack=JointMargin()), "attack.surface must be 'whole', got 'halves'"),
        (lambda: RTER(inner="joint"), "kl_point must be 'shared' where inner is 'joint', .*, got 'own'; set kl_point"),
        (lambda: RTER(preset="paper", kl_point="own"), "kl_point must be 'shared' where inner is 'joint'"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# -- the joint inner maximum ---------------------------------------------------------------------------------------


def _joint(**settings: Any) -> RTER:
    return RTER(preset="paper", **settings).within(tiny.THREAT)


def _joint_gain(model: MixtureOfExperts, method: RTER, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
    """(B,) CE(F(x'), y) + beta KL(f_2(x) || f_2(x')), f_2 the second best at x', one image at a time."""
    gains = []
    for image, label, moved in zip(x.split(1), y, x_adv.split(1), strict=True):
        scores = model.gate(moved).scores[0]
        second = model.experts[int(scores.argsort(descending=True)[1])]
        gains.append(-model(moved).log_softmax(-1)[0, label] + method.beta * mean_kl(second(image), second(moved)))
    return torch.stack(gains)


def test_a_joint_step_follows_the_gradient_of_both_terms() -> None:
    model = tiny.mixture(4).double().eval()
    x, y, ids = _digits()
    method = _joint(attack=PGD(steps=1, random_start=False))
    # at the clean image the KL has no gradient: start elsewhere
    start = (x.double() + 0.05).clamp(0, 1).requires_grad_()
    target = Target(model, model, "whole", "cross_entropy", x.double(), y)
    climbed: list[tuple[Tensor, Tensor | None]] = []

    class Spy(PGD):
        def perturb(self, target: Target, rng: SampleRng) -> Found:
            climb = target.climb(start.detach())
            climbed.append((climb.gain, climb.gradient))
            return super().perturb(target, rng)

    spied = replace(method, attack=Spy(steps=1)).within(tiny.THREAT)
    _loss(spied, model, Batch(x.double(), y, ids))
    gain = _joint_gain(model, method, x.double(), y, start)
    torch.testing.assert_close(climbed[0][0], gain.detach())
    torch.testing.assert_close(climbed[0][1], torch.autograd.grad(gain.sum(), start)[0])
    assert not torch.allclose(climbed[0][0], target.climb(start.detach()).gain)


def test_the_joint_maximum_is_higher_than_that_of_cross_entropy() -> None:
    model = tiny.mixture(4).double().eval()
    x, y, ids = _digits()
    found: list[Tensor] = []
    for inner in ("joint", "cross_entropy"):
        method = _joint(attack=PGD(steps=10), beta=60.0, inner=inner)
        attack = method._mixture_attack()
        x_adv = attack.search(model, x.double(), y, rng=RNG.samples(ids)).x_adv
        assert float((x_adv - x).abs().max()) <= 3 / 16 + 1e-9
        found.append(_joint_gain(model, method, x.double(), y, x_adv).mean())
    assert found[0] > 1.05 * found[1]


def test_the_joint_maximum_of_one_image_does_not_depend_on_its_neighbours() -> None:
    model = tiny.mixture(3).double().eval()
    x, y, ids = _digits()
    # rows leave at their first error, so the clean images must follow them
    attack = _joint(attack=PGD(steps=4, early_drop=True, keep="best"))._mixture_attack()
    together = attack.search(model, x.double(), y, rng=RNG.samples(ids))
    alone = [
        attack.search(model, x[i : i + 1].double(), y[i : i + 1], rng=RNG.samples(ids[i : i + 1])).x_adv
        for i in range(len(x))
    ]
    assert int((together.first_success >= 0).sum()) > 0
    torch.testing.assert_close(together.x_adv, torch.cat(alone))


@pytest.mark.parametrize("regularised", ["second", "all_others", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_joint_gain_is_the_loss_at_its_own_point(regularised: Any, reduction: Any) -> None:
    """What d climbs is what the weights then descend, less the balance loss."""
    model = tiny.mixture(3).double().eval()
    x, y, ids = _digits()
    gains: list[Tensor] = []

    class Spy(PGD):
        def perturb(self, target: Target, rng: SampleRng) -> Found:
            found = super().perturb(target, rng)
            gains.append(target.look(found.x_adv).gain)
            return found

    method = _joint(attack=Spy(steps=2), regularised=regularised, kl_reduction=reduction, balance=0.0)
    loss = _loss(method, model, Batch(x.double(), y, ids)).value
    torch.testing.assert_close(loss, gains[0].mean())


@pytest.mark.parametrize("attack", [FGSM(), FGSM(targeted=True), PGD(steps=2, objective="margin")], ids=repr)
def test_any_attack_can_climb_both_terms(attack: Any) -> None:
    model, (x, y, ids) = tiny.mixture(3).eval(), _digits()
    with_kl, without = (_joint(attack=attack, beta=beta)._mixture_attack() for beta in (50.0, 0.0))
    plain = attack.within(tiny.THREAT).search(model, x, y, rng=RNG.samples(ids)).x_adv
    assert torch.equal(without.search(model, x, y, rng=RNG.samples(ids)).x_adv, plain)
    # FGSM begins at the clean image, where the KL has no gradient
    found = with_kl.search(model, x, y, rng=RNG.samples(ids)).x_adv
    assert torch.equal(found, plain) is isinstance(attack, FGSM)


def test_the_joint_attack_leaves_the_model_as_it_was() -> None:
    model = tiny.mixture(3, expert="small_cnn").train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    (update,) = _joint(attack=PGD(steps=2)).updates(model, {"train": _digits()}, RNG)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert update.loss().value.isfinite()
