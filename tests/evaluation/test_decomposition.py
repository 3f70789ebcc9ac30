"""Robust accuracy taken apart: every number of a small mixture by hand, and what must hold on a trained one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from known_answers import FIVE, THREAT, Bright, images, two_experts
from torch import Tensor, nn

import tiny
from phalanx.attacks import PGD, SURFACES
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import ExpertCounts, evaluate, protocol
from phalanx.evaluation.alone import Alone
from phalanx.evaluation.attribution import Attribution, attribute, has_choice
from phalanx.evaluation.decomposition import Decomposition, decompose
from phalanx.evaluation.experts import PartNumbers
from phalanx.evaluation.ladder import rungs_of
from phalanx.experts import TwoHeaded, build_backbone, build_expert
from phalanx.routing import (
    DualModel,
    Ensemble,
    FeatureRouter,
    LayerMixture,
    LinearRouter,
    MixtureOfExperts,
    RoutedLayers,
    SynergyOfExperts,
)
from phalanx.runs.rate import Rate
from phalanx.threat import ThreatModel


def planted() -> MixtureOfExperts:
    """Dark images, up to 16 together, are expert 0's, which calls them 1 above 16; expert 1 does so above 11."""
    model = two_experts()
    with torch.no_grad():
        model.experts[1].threshold.fill_(11)
    return model


def counts(*rows: tuple[int, int, int]) -> tuple[ExpertCounts, ...]:
    return tuple(ExpertCounts(*row) for row in rows)


def taken_apart(model: Any, data: ImageSet = FIVE, standing: Any = (100, 104), **options: Any) -> Decomposition:
    return decompose(model, data, standing, THREAT, **options)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_every_number_of_a_planted_mixture(batch_size: int) -> None:
    # sums 24 and 18 of class 1, 18 (wrong), 13 and 8 of class 0; an attack moves them by 4
    found = taken_apart(planted(), batch_size=batch_size)
    assert (found.attack, found.n, found.whole, found.missed) == ("pgd-20", 5, Rate(2, 5), ())
    # 18 falls to 14, which is dark; 13 rises to 17, which is bright
    assert found.parts == (
        PartNumbers(
            name="",
            experts=2,
            gates=1,
            top_k=1,
            whole=Rate(2, 5),
            all=counts((5, 4, 2), (5, 3, 2)),
            own=counts((2, 2, 1), (3, 2, 2)),
            # 24 and 18 by expert 1, 8 by expert 0
            held_route=Rate(3, 5),
            # 24: both experts keep it
            worst_route=Rate(1, 5),
            # expert 1 keeps 18 down to 14, expert 0 keeps 8
            best_route=ExpertCounts(5, 4, 3),
            # made on expert 0: 20, 14, (18), 17, 12; on expert 1: 20, 14, (18), (13), 12 where right when clean
            transfer=((2, 2), (3, 2)),
            transfer_whole=(2, 3),
            # without 0 all is expert 1's
            without=counts((5, 3, 2), (5, 4, 2)),
            undefined="",
        ),
    )
    by_multiple = {rung.multiple: rung for rung in found.ladder}
    assert list(by_multiple) == ["0", "1/4", "1/2", "1", "2"]
    assert [rung.eps for rung in found.ladder] == pytest.approx([0, 1 / 32, 1 / 16, 1 / 8, 1 / 4])
    # 1 and 2 levels on the sum: 18 to 17 and 16, which goes to expert 0 and is a tie for it; 13 to 14 and 15
    assert [rung.accuracy.held for rung in found.ladder][:4] == [4, 4, 3, 2]
    assert by_multiple["0"].gates[0].flipped == Rate(0, 5)
    assert by_multiple["1"].gates[0].flipped == Rate(2, 5)
    # softmax of (1 - s, s - 1), s the sum in units
    p = [1 / (1 + math.exp(-2 * (level / 16 - 1))) for level in (24, 18, 18, 13, 8)]
    expected = -sum(q * math.log(q) + (1 - q) * math.log(1 - q) for q in p) / 5
    assert by_multiple["0"].gates[0].entropy == pytest.approx(expected, abs=1e-6)
    # two surfaces, four radii; two experts alone, two under the oracle, two left out
    assert found.attacks_run == 12


def test_what_an_evaluation_missed_is_said() -> None:
    found = taken_apart(planted(), standing=(100, 101, 103, 104))
    assert found.whole == Rate(4, 5) and found.missed == (101, 103)
    # the lower bound knows of it
    assert found.parts[0].whole == Rate(2, 5) and found.parts[0].worst_route == Rate(1, 5)


def test_an_image_that_only_the_ledger_lost_is_held_by_no_route() -> None:
    found = taken_apart(planted(), standing=(104,))
    assert found.parts[0].whole == Rate(1, 5) and found.parts[0].worst_route == Rate(0, 5)
    assert found.missed == ()


@pytest.fixture(scope="module")
def trained() -> MixtureOfExperts:
    """A mixture that is right about most digits and robust on some; its router is random and uses every expert."""
    model: MixtureOfExperts = tiny.mixture(3, seed=1)
    (batch,) = tiny.digits().train.batches(100)
    with torch.no_grad():
        model.router[-1].weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        model.router[-1].bias -= model.router(batch.x).mean(0)
    optimizer = torch.optim.Adam(model.experts.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    return model.eval()


def whole_attribution(model: Any, name: str = "routing-5", **options: Any) -> Attribution:
    threat = ThreatModel("Linf", "1/32")
    tried = protocol(name, threat, halves=isinstance(model, DualModel))
    test = tiny.digits().test
    return attribute(model, test, evaluate(model, test, tried, threat, seed=3), tried, seed=3, **options)


def test_the_routes_order(trained: MixtureOfExperts) -> None:
    found = whole_attribution(trained).decomposition
    (part,) = found.parts
    assert found.missed == ()
    assert 0 < part.worst_route.held <= part.whole.held <= found.whole.held
    assert part.best_route is not None and part.best_route.robust >= found.whole.held
    # a top-1 mixture falls to whatever breaks the expert that an image has
    assert part.held_route is not None and part.own is not None
    assert part.held_route.held == sum(own.robust for own in part.own)
    assert part.worst_route.held <= min(expert.robust for expert in part.all)
    for expert, row in enumerate(part.transfer):
        assert row[expert] == part.all[expert].robust
        assert all(row[j] <= part.all[j].clean for j in range(3) if j == expert)
    assert found.whole.held <= min(found.router.held, found.experts.held)
    flips = [rung.gates[0].flipped.held for rung in found.ladder]
    assert flips[0] == 0 and flips[-1] > 0
    accuracies = [rung.accuracy.held for rung in found.ladder]
    assert accuracies == sorted(accuracies, reverse=True)


def test_blame_and_numbers_are_of_the_same_evaluation(trained: MixtureOfExperts) -> None:
    found = whole_attribution(trained)
    record = found.to_json()
    assert record["schema"] == 1 and record["n"] == 40
    broken = 40 - sum(1 for _ in range(record["whole"]["held"]))
    wrong = 40 - record["ladder"][0]["accuracy"]["held"]
    assert record["blame"]["broken"] == len(found.blame.samples) == broken - wrong
    total = record["blame"]["total"]
    assert total["router"] + total["expert"] + total["both"] == total["n"] == record["blame"]["broken"]
    by_attack = record["blame"]["attacks"]
    assert sum(attack["n"] for attack in by_attack) == total["n"] and len(by_attack) > 1
    low, high = record["whole"]["interval"]
    assert 0 < low < record["whole"]["held"] / 40 < high < 1
    json.dumps(record, allow_nan=False)


def test_nothing_depends_on_the_batch_size(trained: MixtureOfExperts) -> None:
    one, two = whole_attribution(trained), whole_attribution(trained, batch_size=7)
    entropies = [rung.gates[0].entropy for found in (one, two) for rung in found.decomposition.ladder]
    assert entropies[:5] == pytest.approx(entropies[5:], abs=1e-5)
    assert one.blame == two.blame and one.decomposition.parts == two.decomposition.parts


def test_both_halves_of_a_dual_model(trained: MixtureOfExperts) -> None:
    record = whole_attribution(DualModel(trained, tiny.mixture(2, 2), 0.6), "pgd-3").to_json()
    standard, robust = record["parts"]
    assert (standard["name"], standard["experts"], robust["name"], robust["top_k"]) == ("standard", 3, "robust", 2)
    assert standard["worst_route"]["held"] <= standard["whole"]["held"]
    assert robust["held_route"] is None and len(robust["without"]) == 2
    assert [gate["name"] for gate in record["ladder"][1]["gates"]] == ["standard", "robust"]
    assert record["attacks_run"] == 6 + (1 + 9) + (1 + 6)
    json.dumps(record, allow_nan=False)
    # a half without a choice is no part
    alone = whole_attribution(DualModel(tiny.mixture(1), trained, 0.6), "pgd-3").decomposition
    assert [part.name for part in alone.parts] == ["robust"]


def test_sub_models_that_choose_among_themselves() -> None:
    torch.manual_seed(0)
    networks = [build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[12]) for _ in range(2)]
    found = whole_attribution(SynergyOfExperts([TwoHeaded(network) for network in networks]), "pgd-3").decomposition
    (part,) = found.parts
    assert part.best_route is not None and part.without is not None and part.top_k == 1
    assert part.worst_route.held <= part.whole.held <= part.best_route.robust


class _TwoHeadedBright(Bright):
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self(x)
        return logits, logits[:, 0]


def test_an_expert_alone_runs_alone() -> None:
    parts = [_TwoHeadedBright(threshold) for threshold in (11.0, 16.0, 20.0)]
    model, x = SynergyOfExperts(parts), FIVE.images(slice(0, 5))
    for number, part in enumerate(parts):
        expected = SURFACES[f"expert-{number}"](model, x, x, None).logits
        before = [each.passes for each in parts]
        assert torch.equal(Alone(model, number)(x), expected)
        assert part.passes == before[number] + 1 and sum(each.passes for each in parts) == sum(before) + 1


def test_several_gates_have_no_expert_to_take_out() -> None:
    found = whole_attribution(Ensemble([tiny.mixture(3), tiny.mixture(2, seed=1)]), "pgd-3")
    (part,) = found.decomposition.parts
    assert (part.experts, part.gates, part.top_k) == (3, 2, None) and len(part.all) == 3
    assert part.own is part.without is part.best_route is part.held_route is None
    assert "several gates" in part.undefined
    assert [gate.name for gate in found.decomposition.ladder[0].gates] == ["gate-0", "gate-1"]
    json.dumps(found.to_json(), allow_nan=False)


def test_what_is_not_a_number_is_finite_in_the_record() -> None:
    class Broken(Bright):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 2), float("nan"))

    for model in (
        MixtureOfExperts(two_experts().router, [Bright(), Broken()]),
        MixtureOfExperts(Lost(), [Bright(), Bright(9.0)]),
    ):
        tried = protocol("pgd-2", THREAT)
        record = attribute(model, FIVE, evaluate(model, FIVE, tried, THREAT), tried).to_json()
        json.dumps(record, allow_nan=False)
        assert record["whole"]["held"] <= 3


def test_radii_that_no_image_can_have_are_left_out() -> None:
    wide = rungs_of(PGD(eps="3/4"))
    assert list(wide) == ["0", "1/4", "1/2", "1"] and wide["1"].eps == "3/4"
    assert list(rungs_of(PGD(eps="3/4", norm="L2"))) == ["0", "1/4", "1/2", "1", "2"]


def test_only_a_gate_with_a_choice_can_be_to_blame() -> None:
    assert has_choice(planted(), FIVE) and has_choice(
        DualModel(tiny.mixture(1), tiny.mixture(2), 0.5), tiny.digits().test
    )
    for model in (Bright(), MixtureOfExperts(None, [Bright()]), lambda x: x.flatten(1)):
        assert not has_choice(model, FIVE)
    assert not has_choice(DualModel(tiny.mixture(1), tiny.mixture(1), 0.5), tiny.digits().test)


def test_no_images() -> None:
    with pytest.raises(InputError, match="there are no images to attribute; raise the number of images"):
        taken_apart(planted(), images())


def layered(routers: str) -> LayerMixture:
    torch.manual_seed(0)
    layers = RoutedLayers(2, 0.5, routers)  # type: ignore[arg-type]
    network = build_backbone("small_cnn", layers, num_classes=10, image_size=8, channels=1, width=8)
    sites = [FeatureRouter(channels, 2) for channels in layers.sites]
    return LayerMixture(network, sites or LinearRouter((1, 8, 8), 2), 2)


def test_a_layer_level_mixture_has_an_expert_to_take_out_where_one_gate_decides() -> None:
    one, several = (whole_attribution(layered(routers), "pgd-2") for routers in ("shared", "layer"))
    (part,) = one.decomposition.parts
    assert part.gates == 1 and part.without is not None and part.own is not None and part.held_route is not None
    # the experts share layers: they are no networks that another gate could choose among
    assert part.best_route is None
    (part,) = several.decomposition.parts
    gates = [gate.name for gate in several.decomposition.ladder[1].gates]
    assert part.gates == len(gates) > 1 and gates[1] == "gate-1" and part.without is None and part.undefined
    assert [gate.name for gate in several.blame.gates] in ([], gates)
    for found in (one, several):
        json.dumps(found.to_json(), allow_nan=False)


def test_an_image_goes_on_past_the_first_error_before_it_is_shown_to_the_others() -> None:
    model = two_experts()
    with torch.no_grad():
        model.experts[1].threshold.fill_(15)
    # made on expert 0, which errs below 16: all the way down to 14, where expert 1 errs, too
    found = taken_apart(model, images(*[((9, 9), 1)] * 12), standing=())
    assert found.parts[0].transfer[0] == (0, 0)


def test_where_all_experts_err_the_one_that_answers_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = torch.zeros(5, dtype=torch.bool)
    monkeypatch.setattr("phalanx.evaluation.experts.oracle_verdicts", lambda *_, **__: (lost, lost))
    assert taken_apart(planted()).missed == (100, 104)
    # a gate that weighs several may be right where each of them errs
    soft = MixtureOfExperts(two_experts().router, [Bright(), Bright(11.0)], "all")
    assert taken_apart(soft, standing=(100,)).missed == ()


def test_attacks_outside_the_threat_have_no_say(trained: MixtureOfExperts) -> None:
    threat, test = ThreatModel("Linf", "1/64"), tiny.digits().test
    tried = protocol("fgsm,fgsm:1/4", threat)
    found = evaluate(trained, test, tried, threat)
    assert attribute(trained, test, found, tried).decomposition.whole.held == found.summary.robust > 20
