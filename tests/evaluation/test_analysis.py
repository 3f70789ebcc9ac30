"""Gates, margins and experts of planted models, where every number can be worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import FIVE, THREAT, Bright, Sum, images, two_experts
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD, Attack, Found, RouteSteering, Target
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import Analysis, ExpertCounts, analyse
from phalanx.rng import SampleRng
from phalanx.routing import DualModel, LinearRouter, MixtureOfExperts

ATTACK = FGSM().within(THREAT)
"""Its one step goes two grey levels, no less."""


class Constant(nn.Module):
    """The same probabilities for every image."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class SecondPixel(nn.Module):
    """Scores whose softmax is (1, 3^d) / (1 + 3^d), d the sixteenths by which the second pixel is above one half."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(math.log(3)))

    def forward(self, x: Tensor) -> Tensor:
        above = 16 * x.flatten(1)[:, 1] - 8
        return torch.stack([torch.zeros_like(above), self.slope * above], 1)


class Reads(nn.Module):
    """Class 1 by sixteenths of the first pixel above eight, where it is finite: logits (0, sixteenths)."""

    def __init__(self, slope: float = 1.0, nan_above: float = 99.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.nan_above = nan_above

    def forward(self, x: Tensor) -> Tensor:
        above = 16 * x.flatten(1)[:, 0] - 8
        above = above.masked_fill(above > self.nan_above, float("nan"))
        return torch.stack([torch.zeros_like(above), self.slope * above], 1)


def single(network: nn.Module) -> MixtureOfExperts:
    return MixtureOfExperts(None, [network])


def look(model: Any, data: ImageSet, attack: Attack = ATTACK, num_classes: int = 2, **options: Any) -> Analysis:
    return analyse(model, data, attack, name="planted", num_classes=num_classes, **options)


def counts(*rows: tuple[int, int, int]) -> tuple[ExpertCounts, ...]:
    return tuple(ExpertCounts(*row) for row in rows)


def entropy(*levels: int) -> float:
    """Mean nats of (1, 3^d) / (1 + 3^d)."""
    p = [3**d / (1 + 3**d) for d in levels]
    return -sum(q * math.log(q) + (1 - q) * math.log(1 - q) for q in p) / len(p)


# the second pixel is the route: below 8 expert 0, which says class 0 with .6, above 8 expert 1, class 1 with .7
PLANTED = images(
    ((4, 5), 0),  # 7 under attack: stays
    ((4, 7), 0),  # 9: flips
    ((4, 9), 0),  # wrong already: not moved
    ((4, 9), 1),  # 7: flips
    ((4, 12), 1),  # 10: stays
    ((4, 9), 1),  # 7: flips
)


def planted() -> MixtureOfExperts:
    return MixtureOfExperts(SecondPixel(), [Constant(0.6, 0.3, 0.1), Constant(0.2, 0.7, 0.1)])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_number_of_a_planted_mixture(batch_size: int) -> None:
    found = look(planted(), PLANTED, num_classes=3, batch_size=batch_size).to_json()
    approx = pytest.approx
    assert found == {
        "schema": 1,
        "attack": "planted",
        "n": 6,
        "num_classes": 3,
        "gates": [
            {
                "name": "",
                "experts": 2,
                "top_k": 1,
                "load_clean": approx([2 / 6, 4 / 6]),
                "load_attacked": approx([3 / 6, 3 / 6]),
                "entropy_clean": approx(entropy(-3, -1, 1, 1, 4, 1), abs=1e-6),
                "entropy_attacked": approx(entropy(-1, 1, 1, -1, 2, -1), abs=1e-6),
                "flipped": approx(3 / 6),
                # nothing breaks a constant: right and robust are one
                "own": [{"n": 2, "clean": 2, "robust": 2}, {"n": 4, "clean": 3, "robust": 3}],
                "all": [{"n": 6, "clean": 3, "robust": 3}, {"n": 6, "clean": 3, "robust": 3}],
            }
        ],
        # one of the constants is always right
        "oracle": {"n": 6, "clean": 6, "robust": 6},
        "margins": {
            "model": {
                # expert 0 has margins .3 and -.3, expert 1 has -.5 and .5
                "clean": [approx((0.3 + 0.3 - 0.5) / 3, abs=1e-6), approx(0.5, abs=1e-6), None],
                "attacked": [
                    approx((0.3 - 0.5 - 0.5) / 3, abs=1e-6),
                    approx((-0.3 + 0.5 - 0.3) / 3, abs=1e-6),
                    None,
                ],
            }
        },
        "counts": [3, 3, 0],
        "invalid": 0,
    }
    # plain values, in the order of the schema: what is written is what is read
    assert json.loads(json.dumps(found["gates"][0]["own"], allow_nan=False)) == found["gates"][0]["own"]
    assert list(found["gates"][0]) == [
        "name", "experts", "top_k", "load_clean", "load_attacked", "entropy_clean", "entropy_attacked", "flipped",
        "own", "all",
    ]  # fmt: skip


def test_an_expert_is_judged_alone_wherever_the_gate_sends_the_image() -> None:
    model = two_experts()
    with torch.no_grad():
        model.experts[1].threshold.fill_(11)
    found = look(model, FIVE)
    (gate,) = found.gates
    # a step reaches 4 on the sum. Expert 0, threshold 16: +8, +2, wrong, -3, -8; expert 1, threshold 11: +13, +7,
    # wrong, wrong, -3
    assert gate.all == counts((5, 4, 2), (5, 3, 2))
    # dark images, the last two, are expert 0's
    assert gate.own == counts((2, 2, 1), (3, 2, 2))
    # with the label: all but the third are right, and the fourth falls, which only expert 0 has
    assert found.oracle == ExpertCounts(5, 4, 3)
    assert look(single(Bright(12.0)), FIVE).oracle is None


def test_the_first_choice_of_a_top_2_gate() -> None:
    model = MixtureOfExperts(SecondPixel(), [Constant(0.6, 0.4), Constant(0.2, 0.8)], top_k=2)
    (gate,) = look(model, PLANTED).gates
    assert gate.top_k == 2 and gate.flipped == 0
    assert [own.n for own in gate.own] == [2, 4]
    # both answer every image: their load is what their answers weigh
    weights = torch.cat([model.gate(batch.x).scores.softmax(-1) for batch in PLANTED.batches(6)]).mean(0)
    assert gate.load_clean == pytest.approx(weights.tolist(), abs=1e-6) and gate.load_clean[1] > 0.5


def dual() -> DualModel:
    """S reads the first pixel steeply, R gently; the second pixel is the route of both."""
    standard = MixtureOfExperts(SecondPixel(), [Reads(3.0), Constant(0.9, 0.1)])
    return DualModel(standard, MixtureOfExperts(SecondPixel(), [Reads(0.5), Reads(-0.5)]), 0.8)


@pytest.mark.parametrize("attack", [ATTACK, FGSM(surface="robust").within(THREAT)])
def test_a_dual_model_has_three_margins_and_two_gates(attack: Attack) -> None:
    # second pixel dark and black: everyone is far inside expert 0; the first pixel moves 2 levels
    data = images(((11, 0), 1), ((9, 0), 1), ((5, 0), 0), ((5, 0), 1))
    found = look(dual(), data, attack)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def means(p_one: Callable[[float], float]) -> list[list[float]]:
        # p_y - p_other = +-(2 p_1 - 1); the last image is wrong already and stays
        one = {d: 2 * p_one(d) - 1 for d in (3, 1, -1, -3)}
        return [[-one[-3], (one[3] + one[1] + one[-3]) / 3], [-one[-1], (one[1] + one[-1] + one[-3]) / 3]]

    halves = {"standard": lambda d: sigmoid(3 * d), "robust": lambda d: sigmoid(0.5 * d)}
    expected = {"model": lambda d: 0.2 * halves["standard"](d) + 0.8 * halves["robust"](d), **halves}
    assert list(found.margins) == ["model", "standard", "robust"]
    for view, p_one in expected.items():
        clean, attacked = means(p_one)
        assert found.margins[view].clean == pytest.approx(clean, abs=1e-6)
        assert found.margins[view].attacked == pytest.approx(attacked, abs=1e-6)
    assert [gate.name for gate in found.gates] == ["standard", "robust"] and found.oracle is None
    standard, robust = found.gates
    # the constant says 0, Reads(-0.5) the opposite of Reads
    assert standard.all == counts((4, 3, 2), (4, 1, 1))
    assert robust.all == counts((4, 3, 2), (4, 1, 1))
    assert standard.own == counts((4, 3, 2), (0, 0, 0))
    assert standard.load_clean == (1, 0)


def test_both_halves_margins_are_at_one_point() -> None:
    # S and R disagree on the direction: the deployed model follows R, and S gains by it
    model = DualModel(single(Reads(-0.1)), single(Reads(1.0)), 0.9)
    found = look(model, images(((11, 0), 1)))
    assert found.margins["robust"].attacked[1] == pytest.approx(math.tanh(0.5), abs=1e-6)
    assert found.margins["standard"].clean[1] == pytest.approx(-math.tanh(0.15), abs=1e-6)
    assert found.margins["standard"].attacked[1] == pytest.approx(-math.tanh(0.05), abs=1e-6)


@pytest.mark.parametrize(
    ("model", "views"),
    [
        (Bright(), ["model"]),
        (lambda x: Bright()(x), ["model"]),
        (MixtureOfExperts(None, [Bright()]), ["model"]),
        (DualModel(MixtureOfExperts(None, [Bright()]), MixtureOfExperts(None, [Bright(17.0)]), 0.7),
         ["model", "standard", "robust"]),
    ],
)  # fmt: skip
def test_no_gate_without_a_choice(model: Any, views: list[str]) -> None:
    found = look(model, FIVE)
    assert found.gates == () and list(found.margins) == views and found.counts == (3, 2)


def test_several_gates_are_numbered_and_forced_one_at_a_time() -> None:
    def model() -> Sum:
        one = MixtureOfExperts(SecondPixel(), [Constant(0.9, 0.1), Constant(0.1, 0.9)])
        two = MixtureOfExperts(SecondPixel(), [Constant(0.6, 0.4), Constant(0.001, 0.999)])
        return Sum(one, two)

    first, second = look(model(), PLANTED).gates
    assert (first.name, second.name) == ("gate-0", "gate-1")
    # forced to (.9, .1), the first part is outvoted where the second decides for (.001, .999): above 8
    assert [expert.clean for expert in first.all] == [2 + 3, 3]
    # (.6, .4) only follows the first part; (.001, .999) outvotes it
    assert [expert.clean for expert in second.all] == [2 + 3, 3]
    # a leaf without a choice keeps its place
    (last,) = look(Sum(single(Constant(0.5, 0.5)), model().parts[0]), PLANTED).gates
    assert last.name == "gate-1" and [expert.clean for expert in last.all] == [3, 3]
    names = [gate.name for gate in look(DualModel(model(), planted_two(), 0.7), PLANTED).gates]
    assert names == ["standard.gate-0", "standard.gate-1", "robust"]


def planted_two() -> MixtureOfExperts:
    return MixtureOfExperts(SecondPixel(), [Constant(0.6, 0.4), Constant(0.2, 0.8)])


def test_not_a_number_is_neither_right_nor_robust_and_in_no_margin() -> None:
    model = MixtureOfExperts(SecondPixel(), [Reads(-1.0, nan_above=2.5), Reads(1.0)])
    # expert 0 answers 0 above 8: 9 goes to 7 and is broken, 4 to 6 and holds; 11 and 12 are not numbers when clean
    data = images(((9, 0), 0), ((11, 0), 0), ((12, 0), 1), ((4, 0), 1))
    found = look(model, data)
    assert found.invalid == 2 and found.counts == (2, 2)
    # 9 is left of class 0, 4 of class 1
    assert found.margins["model"].clean == pytest.approx([math.tanh(0.5), math.tanh(2)], abs=1e-6)
    assert found.margins["model"].attacked == pytest.approx([math.tanh(-0.5), math.tanh(1)], abs=1e-6)
    assert found.gates[0].all[0] == ExpertCounts(4, 2, 1)
    json.dumps(found.to_json(), allow_nan=False)


class Trap(nn.Module):
    """Not a number anywhere but at levels 8 and 16 of the first pixel, where it says 0."""

    def forward(self, x: Tensor) -> Tensor:
        level = 16 * x.flatten(1)[:, :1]
        zero = torch.where((level == 8) | (level == 16), 0.0, float("nan"))
        return torch.cat([zero + 1, zero - level / 16], 1)


def test_finite_when_clean_is_right_but_not_robust() -> None:
    model = MixtureOfExperts(SecondPixel(), [Trap(), Constant(0.9, 0.1)])
    found = look(model, images(((8, 0), 0), ((9, 0), 0)))
    assert found.gates[0].all == counts((2, 1, 0), (2, 2, 2))
    # right when clean, and yet in no margin: both means would not be over the same images
    assert found.invalid == 2 and found.margins["model"].clean == (None, None)


def test_a_half_that_is_not_a_number_is_counted_though_it_has_no_weight() -> None:
    model = DualModel(single(Reads(1.0, nan_above=2.5)), single(Reads(1.0)), 1.0)
    found = look(model, images(((11, 0), 1), ((10, 0), 1)))
    assert found.invalid == 1
    for margins in found.margins.values():
        assert margins.clean == (None, pytest.approx(math.tanh(1), abs=1e-6))


def test_a_logit_of_minus_infinity_is_not_finite_though_its_softmax_is() -> None:
    found = look(Constant(1.0, 0.0), images(((4, 4), 0)))
    assert found.invalid == 1 and found.margins["model"].attacked == (None, None)


def test_scores_that_are_not_numbers_have_no_entropy() -> None:
    model = planted_two()
    with torch.no_grad():
        model.router.slope.fill_(float("nan"))
    found = look(model, PLANTED).to_json()
    (gate,) = found["gates"]
    assert gate["entropy_clean"] is gate["entropy_attacked"] is None and found["invalid"] == 6
    # an expert alone needs no gate
    assert [expert["clean"] for expert in gate["all"]] == [3, 3]
    json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def trained() -> MixtureOfExperts:
    """A mixture that is right about most digits and robust on some; its router is random and uses every expert."""
    model: MixtureOfExperts = tiny.mixture(3, seed=1)
    (batch,) = tiny.digits().train.batches(100)
    with torch.no_grad():
        model.router[-1].weight.normal_(0, 0.3)
        model.router[-1].bias -= model.router(batch.x).mean(0)
    optimizer = torch.optim.Adam(model.experts.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    return model.eval()


def _numbers(value: Any) -> list[Any]:
    """The leaves of a JSON value, in order."""
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in _numbers(child)]
    if isinstance(value, list):
        return [leaf for child in value for leaf in _numbers(child)]
    return [value]


def _same(one: Analysis, two: Analysis) -> bool:
    pairs = zip(_numbers(one.to_json()), _numbers(two.to_json()), strict=True)
    return all(a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b) for a, b in pairs)


@pytest.mark.parametrize("attack", [PGD(steps=3, restarts=2, eps="1/32"), RouteSteering(steps=3, eps="1/32")])
def test_nothing_depends_on_the_batch_size_or_the_order(trained: MixtureOfExperts, attack: Attack) -> None:
    test = tiny.digits().test.first(24)
    found = look(trained, test, attack, 10, seed=3)
    assert sum(expert.robust for expert in found.gates[0].all) < sum(expert.clean for expert in found.gates[0].all)
    assert 0 < found.gates[0].flipped < 1
    assert all(_same(found, look(trained, test, attack, 10, seed=3, batch_size=size)) for size in (1, 7))
    shuffled = test.select(np.random.default_rng(0).permutation(len(test)))
    assert _same(found, look(trained, shuffled, attack, 10, seed=3))
    assert not _same(found, look(trained, test, attack, 10, seed=4))


def test_each_search_has_its_own_stream_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[tuple[int, tuple[int, ...]]] = []
    search = FGSM.perturb

    def spy(self: FGSM, target: Target, rng: SampleRng) -> Found:
        streams.append((rng.seed, tuple(rng.keys.tolist())))
        return search(self, target, rng)

    monkeypatch.setattr(FGSM, "perturb", spy)
    seeds = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        streams.clear()
        analyse(two_experts(), FIVE, ATTACK, name=name, num_classes=2, batch_size=2, seed=seed)
        seeds.append({stream for stream, _ in streams})
        # the model, two experts and the gate that knows the label; of every batch those that are right when clean
        of_parts, of_oracle = streams[:9], streams[9:]
        assert {keys for _, keys in of_parts} == {(100, 101), (103,), (104,)}
        # class by class
        assert [keys for _, keys in of_oracle] == [(103,), (104,), (100, 101)]
        assert len(seeds[-1]) == 4
    assert seeds[0] == seeds[1] and not (seeds[0] & seeds[2] or seeds[0] & seeds[3])
    streams.clear()
    # experts of one number in two gates
    look(DualModel(two_experts(), two_experts(), 0.7), FIVE)
    assert len({stream for stream, _ in streams}) == 5


def test_the_model_is_given_back_as_it_was() -> None:
    torch.manual_seed(0)
    experts = [tiny.noisy_cnn(10, 8, 1) for _ in range(2)]
    half = MixtureOfExperts(LinearRouter((1, 8, 8), 2), experts)
    model = DualModel(half, tiny.mixture(2), 0.7).train()
    experts[0].eval()
    next(experts[1].parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = tiny.sha256_of(model.state_dict())
    state = torch.get_rng_state()
    found = look(model, tiny.digits().test.first(12), PGD(steps=2, eps="1/32"), 10)
    assert [gate.name for gate in found.gates] == ["standard", "robust"]
    assert [module.training for module in model.modules()] == modes
    assert tiny.sha256_of(model.state_dict()) == before and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in experts[1].parameters()] == [False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    # evaluation mode: dropout and batch statistics would make the second one differ
    assert _same(found, look(model, tiny.digits().test.first(12), PGD(steps=2, eps="1/32"), 10, batch_size=5))


def test_the_callers_precision_and_random_state_stay_out_of_it(trained: MixtureOfExperts) -> None:
    test, attack = tiny.digits().test.first(12), PGD(steps=2, eps="1/32")
    found = look(trained, test, attack, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _same(found, look(trained, test, attack, 10))
    state = torch.get_rng_state()
    look(lambda x: trained(x) + 0 * torch.rand(1), test, attack, 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int, str]] = []
    look(two_experts(), FIVE, batch_size=2, progress=lambda *call: seen.append(call))
    assert seen == [(2, 5, "planted"), (4, 5, "planted"), (5, 5, "planted")]


def test_mistakes() -> None:
    with pytest.raises(InputError, match="there are no images to analyse; raise the number of images"):
        look(Bright(), FIVE.select([]))
    with pytest.raises(InputError, match="num_classes must be 2, the classes that the model tells apart, got 3"):
        look(Bright(), FIVE, num_classes=3)
    with pytest.raises(InputError, match=r"labels must be in 0\.\.1"):
        look(Bright(), images(((3, 3), 2)))
    with pytest.raises(InputError, match=r"each expert by itself, and PGD on the surface 'halves' does not; use anoth"):
        look(dual(), FIVE, PGD(eps=0.1, objective="joint-1", surface="halves"))
    with pytest.raises(InputError, match="logits"):
        look(lambda x: x.flatten(), FIVE)
