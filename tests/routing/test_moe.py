from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import nn

from phalanx.experts import build_expert
from phalanx.nn import record, spec_of
from phalanx.routing import LinearRouter, MixtureOfExperts, RoutedModel, build_router


def test_one_expert_is_its_expert() -> None:
    expert = small_network().double()
    model = MixtureOfExperts(None, [expert])
    x = images(5).requires_grad_()
    torch.testing.assert_close(model(x), expert(x), rtol=0, atol=0)
    ours, theirs = (torch.autograd.grad(f(x).tanh().sum(), x)[0] for f in (model, expert))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert model.players().keys() == {"experts"}
    # a router of a single score would be dead weight
    assert MixtureOfExperts(LinearRouter(SHAPE, 1), [expert]).router is None


def test_all_is_every_expert() -> None:
    model = small_mixture(3, "all")
    assert model.top_k == 3
    x = images(4)
    torch.testing.assert_close(model(x), small_mixture(3, 3)(x), rtol=0, atol=0)
    soft = model.gate(x).scores.softmax(-1)
    outputs = torch.stack([expert(x) for expert in model.experts], 1)
    torch.testing.assert_close(model(x), (soft[..., None] * outputs).sum(1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_given_route_is_used(top_k: int) -> None:
    model, x = small_mixture(4, top_k), images(7)
    route = model.gate(x)
    assert model.routed(x, route).route is route
    assert torch.equal(model.routed(x, route).logits, model(x)) and isinstance(model, RoutedModel)
    # the route of other images: the experts that would answer for them, with their weights
    other = model.gate(images(7, seed=9))
    expected = torch.stack(
        [
            sum(w * model.experts[int(e)](image[None])[0] for e, w in zip(experts, weights, strict=True))
            for image, experts, weights in zip(x, other.experts, other.weights, strict=True)
        ]
    )
    torch.testing.assert_close(model.routed(x, other).logits, expected)


def test_gate_runs_no_expert() -> None:
    model = small_mixture(3)
    model.experts = nn.ModuleList([nn.Identity()] * 3)
    assert model.gate(images(4)).experts.shape == (4, 1)


def test_the_router_learns_through_top_one() -> None:
    model = small_mixture(3)
    model(images(6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.router.parameters())


def test_players() -> None:
    model = small_mixture(3)
    players = model.players()
    assert players.keys() == {"experts", "router"}
    together = [p for parameters in players.values() for p in parameters]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()} and len(together) == 2 + 3 * 4


def test_a_frozen_router_is_no_player() -> None:
    model = small_mixture(3, train_router=False)
    assert model.players().keys() == {"experts"}
    assert not {id(p) for p in model.players()["experts"]} & {id(p) for p in model.router.parameters()}


def test_the_spec_names_every_part() -> None:
    def build(top_k: int | str) -> MixtureOfExperts:
        experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(2)]
        return MixtureOfExperts(build_router("mlp", SHAPE, 2, hidden=[4]), experts, top_k, temperature=0.5)

    spec = spec_of(build("all"))
    assert spec is not None and spec.name == "mixture"
    arguments = json.loads(json.dumps(spec.to_json()))["arguments"]
    assert arguments["router"]["name"] == "router.mlp" and arguments["router"]["arguments"]["hidden"] == [4]
    assert [part["name"] for part in arguments["experts"]] == ["expert.mlp"] * 2
    assert (arguments["top_k"], arguments["temperature"], arguments["train_router"]) == (2, 0.5, True)
    single = spec_of(MixtureOfExperts(None, [record(nn.Flatten(), "expert.own")]))
    assert single is not None and single.arguments["router"] is None and len(single.arguments["experts"]) == 1


def test_a_part_built_by_hand_leaves_no_spec() -> None:
    assert spec_of(small_mixture(2)) is None


@pytest.mark.parametrize(
    ("router", "experts", "options", "message"),
    [
        (None, 0, {}, "experts must hold at least one network, got none"),
        (None, 3, {}, "router must be given for 3 experts, got None"),
        (2, 2, {"temperature": 0}, "temperature must be positive, got 0"),
        (4, 4, {"top_k": 6}, "top_k must be in 1..num_experts=4 or 'all', got 6; lower top_k or add experts"),
        (4, 4, {"top_k": 0}, "got 0; lower top_k"),
        (4, 4, {"top_k": "some"}, "or 'all', got some; lower top_k"),
    ],
)
def test_parts_that_do_not_fit(router: int | None, experts: int, options: dict[str, Any], message: str) -> None:
    built = None if router is None else LinearRouter(SHAPE, router)
    with pytest.raises(ValueError, match=re.escape(message)):
        MixtureOfExperts(built, [small_network() for _ in range(experts)], **options)


@pytest.mark.parametrize("scores", [3, 5])
def test_a_router_of_another_size(scores: int) -> None:
    # with too few scores the last expert would silently never be asked
    model = MixtureOfExperts(LinearRouter(SHAPE, scores), [small_network() for _ in range(4)])
    message = f"router must answer with scores (2, 4), one for each expert, got shape (2, {scores}); build it with"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(images(2).float())


def test_a_tuple_of_routes_belongs_to_another_model() -> None:
    model, x = small_mixture(2), images(2)
    with pytest.raises(TypeError, match="a model-level mixture takes one Route, got tuple"):
        model.routed(x, (model.gate(x),))
