"""Networks averaged: what they answer, how they learn, and their tuple of routes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.evaluation.evaluate import model_sha256
from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import (
    Ensemble,
    MixtureOfExperts,
    RoutedModel,
    build_router,
    dense,
    flipped,
    leaves,
    only,
    pin,
    select,
    with_gate,
)
from phalanx.training.players import moving

ONE = torch.zeros(1, *SHAPE)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits_C: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits_C)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def single(network: nn.Module) -> MixtureOfExperts:
    return MixtureOfExperts(None, [network])


def constant(*logits: list[float], **options: Any) -> Ensemble:
    return Ensemble([single(Constant(torch.tensor(row, dtype=torch.float64))) for row in logits], **options)


def ensemble(**options: Any) -> Ensemble:
    return Ensemble([small_mixture(3), single(small_network().double()), small_mixture(2, seed=1)], **options).eval()


# what it answers


def test_probabilities_by_hand() -> None:
    # (.9 + .2 + .1) / 3 = .4; a constant added to a member's logits changes nothing
    rows = [[math.log(p) + shift, math.log(1 - p) + shift] for p, shift in ((0.9, 0), (0.2, 5), (0.1, -3))]
    answer = constant(*rows)(ONE)
    torch.testing.assert_close(answer, torch.tensor([[0.4, 0.6]], dtype=torch.float64).log())


def test_logits_by_hand() -> None:
    # one member that is sure outvotes two in logits, not in probability
    rows = [[30.0, 0.0], [0.0, 3.0], [0.0, 6.0]]
    assert constant(*rows, mix="logits")(ONE).tolist() == [[10.0, 3.0]]
    assert int(constant(*rows)(ONE).argmax()) == 1


def test_logits_averaged_are_the_uniform_gate() -> None:
    mixture, x = small_mixture(3), images(5)
    same = Ensemble([single(expert) for expert in mixture.experts], mix="logits")
    torch.testing.assert_close(same(x), with_gate(mixture, "uniform")(x))


def test_finite_and_exact_for_huge_logits() -> None:
    answer = constant([1e4, -1e4, 0], [-1e4, 0, -1e4])(ONE)
    # each is sure of a class of its own, and both put e^-1e4 on class 2
    torch.testing.assert_close(answer, torch.tensor([[-math.log(2), -math.log(2), -1e4]], dtype=torch.float64))


def test_half_precision_is_averaged_in_float32() -> None:
    model, x = ensemble().bfloat16(), images(4).bfloat16()
    parts, answer = [member(x) for member in model.members], model(x)
    assert {part.dtype for part in parts} == {torch.bfloat16} and answer.dtype == torch.float32
    expected = sum(part.double().softmax(-1) for part in parts) / 3
    torch.testing.assert_close(answer.double().exp(), expected, rtol=1e-6, atol=1e-6)


def test_non_finite_answers_stay_visible() -> None:
    assert constant([0.0, math.nan], [1.0, 0.0])(ONE).isnan().all()


# how it learns


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_gradients_equal_finite_differences(mix: Any) -> None:
    members = [small_mixture(2, "all"), small_mixture(2, "all", seed=1)]
    assert torch.autograd.gradcheck(Ensemble(members, mix=mix), (images(2).requires_grad_(),))


def test_every_member_learns() -> None:
    model = ensemble()
    assert isinstance(model, RoutedModel)
    players = model.players()
    assert list(players) == [
        "member-0.experts",
        "member-0.router",
        "member-1.experts",
        "member-2.experts",
        "member-2.router",
    ]
    together = [id(p) for parameters in players.values() for p in parameters]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    assert moving("member-0", players) == ["member-0.experts", "member-0.router"]
    model(images(12)).square().sum().backward()
    for name, parameters in players.items():
        assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0, name


# its routes


def test_a_tuple_of_routes_and_every_function_of_them() -> None:
    model, x = ensemble(), images(6)
    answer = model.routed(x)
    assert isinstance(answer.route, tuple) and [leaf.num_experts for leaf in leaves(answer.route)] == [3, 1, 2]
    assert torch.equal(model.routed(x, model.gate(x)).logits, answer.logits)
    assert torch.equal(model.routed(x, pin(answer.route)).logits, answer.logits)
    index = torch.tensor([5, 0])
    torch.testing.assert_close(model.routed(x[index], select(answer.route, index)).logits, answer.logits[index])
    first = sum(member.experts[0](x).softmax(-1) for member in model.members) / 3
    torch.testing.assert_close(model.routed(x, only(answer.route, 0)).logits.exp(), first)
    parts = [member.routed(x, dense(member.gate(x))).logits.softmax(-1) for member in model.members]
    torch.testing.assert_close(model.routed(x, dense(answer.route)).logits.exp(), sum(parts) / 3)
    turned = (answer.route[0], answer.route[1], model.members[2].gate(images(6, seed=2)))
    assert torch.equal(flipped(answer.route, turned), flipped(answer.route[2], turned[2]))


@pytest.mark.parametrize("surface", ["whole", "pinned", "experts", "router", "dense", "expert-1"])
def test_it_can_be_attacked(surface: str) -> None:
    model, x = ensemble(), images(16)
    y = model(x).argmax(-1)
    result = PGD(eps=0.5, steps=5, surface=surface).run(model, x, y)
    assert result.flipped is not None and not result.invalid.any()
    assert surface == "router" or result.broken.any()


# its record


def recorded(seed: int = 0, **options: Any) -> Ensemble:
    torch.manual_seed(seed)
    experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(3)]
    return Ensemble([single(experts[0]), MixtureOfExperts(build_router("linear", SHAPE, 2), experts[1:])], **options)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_built_from_its_record_bit_for_bit(mix: Any) -> None:
    model, x = recorded(mix=mix).eval(), images(6).float()
    spec = spec_of(model)
    assert spec is not None and spec.name == "ensemble"
    again = build(json.loads(json.dumps(spec.to_json())))
    assert isinstance(again, Ensemble) and again.mix == mix
    assert not torch.equal(again.eval()(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and spec_of(again) == spec


def test_what_is_mixed_is_part_of_the_model() -> None:
    assert model_sha256(recorded()) != model_sha256(recorded(mix="logits"))
    assert model_sha256(ensemble()) != model_sha256(ensemble(mix="logits"))
    assert spec_of(ensemble()) is None


# mistakes


def test_members_that_do_not_fit() -> None:
    one, two = small_mixture(2), small_mixture(2, seed=1)
    with pytest.raises(ValueError, match="needs at least 2 members, got 1; use a single model as it is"):
        Ensemble([one])
    with pytest.raises(ValueError, match="mix must be one of probabilities, logits, got 'votes'"):
        Ensemble([one, two], mix="votes")
    with pytest.raises(TypeError, match=r"member 1 must be a routed model, got Sequential; wrap .*MixtureOfExperts"):
        Ensemble([one, small_network()])
    for twice in ([one, one], [one, single(one.experts[1])]):
        with pytest.raises(ValueError, match="members must not share parameters, got some in two of them; train each"):
            Ensemble(twice)
    with pytest.raises(ValueError, match=r"for the same classes, got shapes \(3, 3\) and \(3, 5\)"):
        Ensemble([one, single(small_network(5).double())])(images(3))
    model, x = Ensemble([one, two]), images(3)
    for route, kind in ((one.gate(x), "Route"), ((one.gate(x),), "a tuple of 1")):
        with pytest.raises(TypeError, match=f"an ensemble of 2 takes a tuple of that many routes, got {kind}"):
            model.routed(x, route)
