from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import nn

from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import frozen, record, spec_of
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


@pytest.mark.parametrize("top_k", [1, "all"])
def test_frozen_experts_are_no_player_and_keep_their_statistics(top_k: int | str) -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3)) for _ in range(3)]
    model = MixtureOfExperts(build_router("mlp", SHAPE, 3), networks, top_k, train_experts=False).double()
    assert model.players().keys() == {"router"}
    assert {id(p) for p in model.players()["router"]} == {id(p) for p in model.router.parameters()}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # as built, after train(), inside a larger module, and after an attack has borrowed it
    for prepare in (lambda: None, model.train, nn.Sequential(model).train, lambda: _attacked(model)):
        prepare()
        assert model.training and model.router.training
        assert not any(module.training for module in model.experts.modules())
        model(images(30)).square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.experts.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.router.parameters())
    assert not model.eval().training and not any(module.training for module in model.modules())


def _attacked(model: MixtureOfExperts) -> None:
    with frozen(model):
        model(images(2))


def _from_spec_parts(top_k: int | str, **options: Any) -> MixtureOfExperts:
    experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(2)]
    return MixtureOfExperts(build_router("mlp", SHAPE, 2, hidden=[4]), experts, top_k, temperature=0.5, **options)


def test_the_spec_names_every_part() -> None:
    spec = spec_of(_from_spec_parts("all"))
    assert spec is not None and spec.name == "mixture"
    arguments = json.loads(json.dumps(spec.to_json()))["arguments"]
    assert arguments["router"]["name"] == "router.mlp" and arguments["router"]["arguments"]["hidden"] == [4]
    assert [part["name"] for part in arguments["experts"]] == ["expert.mlp"] * 2
    assert (arguments["top_k"], arguments["temperature"], arguments["train_router"]) == (2, 0.5, True)
    single = spec_of(MixtureOfExperts(None, [record(nn.Flatten(), "expert.own")]))
    assert single is not None and single.arguments["router"] is None and len(single.arguments["experts"]) == 1


def test_the_spec_tells_only_of_what_is_not_the_default() -> None:
    plain = spec_of(_from_spec_parts(1))
    assert plain is not None
    known = {"router", "experts", "top_k", "temperature", "train_router"}
    assert plain.arguments.keys() == known
    for options in ({"train_experts": False}, {"checkpoint": True}, {"train_experts": False, "checkpoint": True}):
        spec = spec_of(_from_spec_parts(1, **options))
        assert spec is not None
        assert {key: value for key, value in spec.arguments.items() if key not in known} == options
        again = build(spec.to_json())
        assert spec_of(again) == spec
        assert (again.train_experts, again.checkpoint) == (
            options.get("train_experts", True),
            options.get("checkpoint", False),
        )


def test_a_part_built_by_hand_leaves_no_spec() -> None:
    assert spec_of(small_mixture(2)) is None


@pytest.mark.parametrize(
    ("router", "experts", "options", "message"),
    [
        (None, 0, {}, "experts must hold at least one network, got none"),
        (None, 3, {}, "router must be given for 3 experts, got None"),
        (2, 2, {"temperature": 0}, "temperature must be positive and finite, got 0"),
        (2, 2, {"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        (2, 2, {"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        (4, 4, {"top_k": 6}, "top_k must be in 1..num_experts=4 or 'all', got 6; lower top_k or add experts"),
        (4, 4, {"top_k": 0}, "got 0; lower top_k"),
        (4, 4, {"top_k": "some"}, "or 'all', got some; lower top_k"),
        (2, 2, {"train_experts": False, "train_router": False}, "a router that trains, got train_router=False; leave"),
        (None, 1, {"train_experts": False}, "train_experts=False needs a router that trains, got none; leave"),
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


def test_what_is_frozen_of_an_expert_does_not_move() -> None:
    model = small_mixture(2)
    model.experts[0].requires_grad_(False)
    assert [id(own) for own in model.players()["experts"]] == [id(own) for own in model.experts[1].parameters()]
