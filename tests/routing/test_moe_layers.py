"""The layer-level mixture as a routed model: routes in and out, what waits, what attacks see, what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from layer_samples import CLASSES, SHAPE, layered, pixels
from routing_samples import Kernels, Waits, gradients
from torch import Tensor, nn

from phalanx.attacks import PGD, SURFACES, RouteSteering
from phalanx.data import ImageSet
from phalanx.evaluation import analyse
from phalanx.experts import build_backbone, build_expert
from phalanx.nn import PlainLayers
from phalanx.routing import (
    ExpertNorm2d,
    LayerMixture,
    LinearRouter,
    MoEConv2d,
    ResNetRouter,
    Route,
    RoutedLayers,
    RoutedModel,
    leaves,
    only,
    pin,
    routed,
    select,
)

KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "block": {"routers": "block"},
    "layer": {"routers": "layer"},
    "overlap": {"overlap": True},
    "norms": {"norm_kind": "per_expert"},
    "top-2": {"top_k": 2},
    "soft": {"top_k": "all"},
}
SITES = {"shared": 1, "block": 2, "layer": 2}


# -- experts -------------------------------------------------------------------------------------------------------


def cut(model: LayerMixture, expert: int, **options: Any) -> nn.Module:
    """The narrow network that is one expert with all that it shares."""
    narrow = build_expert(num_classes=CLASSES, image_size=SHAPE[1], scale=0.5, **options).double().eval()
    weights = {}
    for name, layer in model.network.named_modules():
        if isinstance(layer, MoEConv2d):
            weights[f"{name}.weight"] = layer.slices()[expert]
        elif isinstance(layer, ExpertNorm2d):
            weights |= {f"{name}.{key}": value for key, value in layer.norms[expert].state_dict().items()}
    shared = {key: value for key, value in model.network.state_dict().items() if key in narrow.state_dict()}
    narrow.load_state_dict({**shared, **weights})
    return narrow


BACKBONES: dict[str, dict[str, Any]] = {
    "small_cnn": {"width": 8},
    "resnet18": {"width": 4, "scaled_stem": False},
    "wrn": {"depth": 10, "widen": 1},
    "densenet": {"depth": 10, "growth": 4},
}


@pytest.mark.parametrize("norm_kind", ["shared", "per_expert"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_expert_is_a_narrow_network(backbone: str, norm_kind: str) -> None:
    options = BACKBONES[backbone]
    model, x = layered(3, backbone, norm_kind=norm_kind, options=options), pixels(12)
    answers = torch.stack([cut(model, expert, name=backbone, **options)(x) for expert in range(3)], 1)
    for expert in range(3):
        forced = model.routed(x, only(model.gate(x), expert)).logits
        torch.testing.assert_close(forced, answers[:, expert], rtol=1e-10, atol=1e-12)
    route = model.gate(x)
    assert isinstance(route, Route) and len(route.experts.unique()) == 3
    expected = answers[torch.arange(len(x)), route.experts[:, 0]]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_an_overlapping_expert_is_its_band_of_the_backbone() -> None:
    model, x = layered(3, overlap=True), pixels(4)
    narrow = cut(model, 1, name="small_cnn", width=8)
    torch.testing.assert_close(model.routed(x, only(model.gate(x), 1)).logits, narrow(x), rtol=1e-10, atol=1e-12)


# -- gradients of the gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("routers", ["shared", "block", "layer"])
def test_with_score_only_the_selected_experts_score_has_a_gradient(routers: str, training: bool) -> None:
    model, x = layered(3, routers=routers, straight_through="score", training=training), pixels(12)
    out = model.routed(x)
    logits = out.logits
    parts = list(leaves(out.route))  # type: ignore[arg-type]
    found = torch.autograd.grad(logits.square().sum(), [leaf.scores for leaf in parts])
    for leaf, gradient in zip(parts, found, strict=True):
        selected = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, leaf.experts, True)
        assert not gradient[~selected].any() and (gradient[selected] != 0).float().mean() > 0.9


def test_the_probability_moves_the_alternatives_too() -> None:
    model, x = layered(3), pixels(12)
    out = model.routed(x)
    assert isinstance(out.route, Route)
    (gradient,) = torch.autograd.grad(out.logits.square().sum(), out.route.scores)
    assert (gradient != 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(12, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_pinned_route_gives_the_router_nothing() -> None:
    model, x = layered(3), pixels(6)
    parameters = list(model.router.parameters())  # type: ignore[union-attr]
    logits = model.routed(x, pin(model.gate(x))).logits
    assert torch.autograd.grad(logits.sum(), parameters, allow_unused=True) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_images_does_not_matter(kind: str) -> None:
    model, x = layered(3, **KINDS[kind]), pixels(11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    logits, (gradient, *_) = gradients(model, model, x)
    torch.testing.assert_close(model(x[order]), logits[order], rtol=1e-12, atol=1e-12)
    given = model.routed(x[order], select(model.gate(x), order)).logits
    torch.testing.assert_close(given, logits[order], rtol=1e-12, atol=1e-12)
    assert gradient.shape == x.shape and gradient.flatten(1).any(1).all()


# -- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "waits"), [("shared", 1), ("block", 2), ("layer", 2), ("top-2", 1), ("soft", 0), ("norms", 1)]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_host_waits_once_for_each_decision(kind: str, waits: int, training: bool) -> None:
    model, x = layered(3, training=training, **KINDS[kind]), pixels(12)
    with Waits() as seen:
        model(x)
    assert seen.calls == ["tolist"] * waits


def test_one_expert_never_waits() -> None:
    model, x = layered(1), pixels(3)
    with Waits() as seen:
        model(x)
    assert seen.calls == []


@pytest.mark.parametrize("training", [True, False])
def test_kernels_do_not_grow_with_the_batch(training: bool) -> None:
    model = layered(2, "resnet18", options={"width": 4}, training=training)
    totals = set()
    for size in (4, 32):
        x = pixels(size).requires_grad_()
        with torch.no_grad():
            scores = torch.zeros(size, 2, dtype=torch.float64)
        route = Route(scores, torch.arange(size)[:, None] % 2, torch.ones(size, 1, dtype=torch.float64))
        with Kernels() as kernels:
            torch.autograd.grad(model.routed(x, route).logits.sum(), x)
        totals.add(kernels.counts.total())
    assert len(totals) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: str, training: bool) -> None:
    model = layered(3, **KINDS[kind])
    if training and kind != "norms":
        return  # a training BatchNorm has nothing to normalise
    assert model(pixels(0)).shape == (0, CLASSES)


# -- attacks and analysis ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("surface", ["whole", "pinned", "experts", "router", "dense", "expert-0", "expert-2"])
def test_every_surface_is_attacked(kind: str, surface: str) -> None:
    model, x = layered(3, training=True, **KINDS[kind]), pixels(6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    y = torch.arange(6) % CLASSES
    x_adv = PGD(eps=0.1, steps=2, surface=surface)(model, x, y)
    assert not torch.equal(x_adv, x) and float((x_adv - x).abs().max()) <= 0.1 + 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layer.training for layer in model.modules())


def test_held_keeps_what_it_is_given() -> None:
    model, x = layered(3), pixels(5)
    out = SURFACES["held"](model, x, x, routed(model, x))
    torch.testing.assert_close(out.logits, model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_routes_are_steered(kind: str) -> None:
    model, x = layered(3, **KINDS[kind]), pixels(8)
    y = model(x).argmax(-1)
    result = RouteSteering(eps=0.3, steps=4).run(model, x, y)
    assert result.broken.any() and result.flipped is not None
    assert bool(result.flipped.any()) is (kind != "soft")
    assert torch.equal(result.broken, model(result.x_adv).argmax(-1) != y)


@pytest.mark.parametrize("kind", ["shared", "block", "layer", "top-2"])
def test_gates_are_analysed(kind: str) -> None:
    model = layered(3, **KINDS[kind]).float()
    images = (pixels(12) * 255).round().to(torch.uint8)
    data = ImageSet(images.numpy(), (torch.arange(12) % CLASSES).numpy(), torch.arange(12).numpy(), 255)
    found = analyse(model, data, PGD(eps=0.1, steps=2), name="pgd-2", num_classes=CLASSES)
    sites = SITES.get(kind, 1)
    assert [gate.name for gate in found.gates] == ([""] if sites == 1 else [f"gate-{site}" for site in range(sites)])
    assert all(gate.experts == 3 and sum(gate.load_clean) == pytest.approx(1) for gate in found.gates)
    assert all(counted.n == 12 for gate in found.gates for counted in gate.all)


@pytest.mark.parametrize("straight_through", ["probability", "score"])
def test_scores_that_are_not_finite_never_answer(straight_through: str) -> None:
    model, x = layered(3, straight_through=straight_through), pixels(4)
    with torch.no_grad():
        model.router[-1].bias[1] = float("nan")  # type: ignore[index, union-attr]
    assert not model(x).isfinite().any()


# -- players, contract, errors -------------------------------------------------------------------------------------


def test_players() -> None:
    model = layered(2)
    assert isinstance(model, RoutedModel)
    players = model.players()
    assert {name: len(moved) for name, moved in players.items()} == {
        "experts": len(list(model.network.parameters())),
        "router": 2,
    }
    assert set(layered(2, train_router=False).players()) == {"experts"}
    sited = layered(2, routers="block")
    assert len(sited.players()["router"]) == 2 * 2


def test_a_given_route_is_the_one_that_is_used() -> None:
    for routers in ("shared", "layer"):
        model, x = layered(3, routers=routers), pixels(5)
        route = only(model.gate(x), 2)
        used = model.routed(x, route).route
        assert used is not None
        assert [leaf.experts.flatten().tolist() for leaf in leaves(used)] == [[2] * 5] * len(list(leaves(route)))
        assert list(map(id, leaves(used))) == list(map(id, leaves(route)))


def test_routes_that_do_not_fit() -> None:
    x = pixels(2)
    shared, sited = layered(2), layered(2, routers="layer")
    with pytest.raises(TypeError, match="one shared router takes one Route, got tuple"):
        shared.routed(x, sited.gate(x))
    with pytest.raises(TypeError, match="takes a tuple of 2 Routes, got one Route"):
        sited.routed(x, shared.gate(x))
    with pytest.raises(TypeError, match="takes a tuple of 2 Routes, got 1 of them"):
        sited.routed(x, (shared.gate(x),))


def test_a_plan_is_an_argument_and_nothing_stays() -> None:
    model, x = layered(3), pixels(4)
    before = [dict(vars(layer)) for layer in model.modules()]
    model(x)
    for layer, kept in zip(model.modules(), before, strict=True):
        assert set(vars(layer)) == set(kept)
        assert all(vars(layer)[key] is value for key, value in kept.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routers": None, "num_experts": 2}, "routers must be given for several experts and only then, got 2"),
        ({"num_experts": 1}, "routers must be given for several experts and only then, got 1 experts"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"top_k": 3}, "top_k must be in 1..num_experts=2 or 'all', got 3; lower top_k or add experts"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"routers": LinearRouter(SHAPE, 2), "num_experts": 2, **arguments}
    network = build_backbone("small_cnn", PlainLayers(), num_classes=2, image_size=8)
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerMixture(network, **given)


def test_a_router_of_another_size() -> None:
    network = build_backbone("small_cnn", RoutedLayers(2), num_classes=2, image_size=8)
    model = LayerMixture(network, LinearRouter(SHAPE, 3), 2)
    with pytest.raises(ValueError, match=re.escape("must answer with scores (2, 2), one for each expert, got shape")):
        model(torch.rand(2, *SHAPE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be in (0, 1], got 0.0"),
        ({"routers": "layer", "norm_kind": "per_expert"}, "batch_norm must be shared where every layer decides"),
        ({"routers": "block", "overlap": True}, "overlap needs one shared router, got routers 'block'"),
    ],
)
def test_errors_of_the_layers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RoutedLayers(**{"num_experts": 2, **arguments})


# -- the router ----------------------------------------------------------------------------------------------------


def test_the_routers_counts() -> None:
    assert sum(parameter.numel() for parameter in ResNetRouter((3, 32, 32), 2).parameters()) == 269_202


def test_large_images_are_reduced_before_the_router() -> None:
    small, large = ResNetRouter((3, 64, 64), 2), ResNetRouter((3, 68, 68), 2)
    assert not any(isinstance(layer, nn.AvgPool2d) for layer in small)
    assert isinstance(large[1], nn.AvgPool2d)
    x: Tensor = torch.rand(2, 3, 68, 68)
    assert large(x).shape == (2, 2)


def test_a_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = next(layer for layer in ResNetRouter(SHAPE, 2).eval() if getattr(layer, "missing", 0))
    nn.init.zeros_(block.body[2][1].weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and not out[:, :8].any() and not out[:, 24:].any()
