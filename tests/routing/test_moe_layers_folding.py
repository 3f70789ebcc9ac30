"""BatchNorm folded into routed convolutions: the same function on every surface, for every gate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_samples import CLASSES, layered, pixels
from torch import Tensor, nn

from phalanx.attacks import SURFACES
from phalanx.nn import Chain, fold_batchnorm
from phalanx.routing import ExpertNorm2d, LayerMixture, MoEConv2d, Route, RoutedModel, map_route, routed

ROUTED = {"whole", "pinned", "experts", "router", "dense", "expert-0", "expert-2"}
KINDS: dict[str, dict[str, Any]] = {
    "top-1": {},
    "score": {"straight_through": "score"},
    "block": {"routers": "block"},
    "layer": {"routers": "layer"},
    "top-2": {"top_k": 2},
    "soft": {"top_k": "all"},
    "overlap": {"overlap": True, "scale": 0.8},
    "overlap-top-2": {"overlap": True, "top_k": 2},
    "resnet18": {"backbone": "resnet18", "options": {"width": 4}},
    "wrn": {"backbone": "wrn", "options": {"depth": 10, "widen": 1}},
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def folded(model: LayerMixture) -> LayerMixture:
    copied = fold_batchnorm(model)
    assert isinstance(copied, LayerMixture) and norms(copied) < norms(model)
    return copied


def value_and_gradient(model: nn.Module, surface: str, x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x_adv.clone().requires_grad_()
    with torch.no_grad():
        clean = routed(model, x)
    logits = SURFACES[surface](model, leaf, x, clean).logits
    (gradient,) = torch.autograd.grad((logits * torch.arange(1.0, CLASSES + 1)).sum(), leaf)
    return logits.detach(), gradient


@pytest.mark.parametrize("kind", KINDS)
def test_every_surface_is_the_same(kind: str) -> None:
    model = layered(3, **KINDS[kind])
    state = copy.deepcopy(model.state_dict())
    small = folded(model)
    x, x_adv = pixels(10), pixels(10, seed=1)
    for surface in sorted(ROUTED):
        for ours, theirs in zip(
            value_and_gradient(small, surface, x_adv, x), value_and_gradient(model, surface, x_adv, x), strict=True
        ):
            assert theirs.any()
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda text, s=surface: f"{s}: {text}")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_that_are_not_one(overlap: bool) -> None:
    """The shift is no expert's: a weight multiplies what the convolution says and not what BatchNorm adds."""
    model = layered(3, overlap=overlap)
    small = folded(model)
    x = pixels(9)

    def odd(leaf: Route) -> Route:
        return Route(leaf.scores, leaf.experts, torch.linspace(-0.5, 2, len(x), dtype=torch.float64)[:, None])

    route = map_route(odd, model.gate(x))
    torch.testing.assert_close(small.routed(x, route).logits, model.routed(x, route).logits, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_of_a_shared_batchnorm() -> None:
    small = folded(layered(3))
    assert norms(small) == 0
    assert all(layer.shift is not None for layer in small.modules() if isinstance(layer, MoEConv2d))


def test_the_arithmetic_of_one_layer() -> None:
    conv = MoEConv2d(1, 1, 1, num_experts=2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1))
    conv.fold(torch.tensor([10.0]), torch.tensor([7.0]))
    conv.fold(torch.tensor([2.0]), torch.tensor([1.0]))
    # 2 (10 w x + 7) + 1
    assert conv.weight.flatten().tolist() == [60.0, 100.0] and conv.shift is not None
    assert conv.shift.tolist() == [15.0]


def test_a_batchnorm_for_each_expert_stays() -> None:
    model = layered(3, norm_kind="per_expert")
    small = fold_batchnorm(model)
    assert small is not None  # the stem's
    assert sum(isinstance(layer, ExpertNorm2d) for layer in small.modules()) == 2
    x = pixels(9)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_subclass_that_may_compute_more_is_left() -> None:
    class Louder(MoEConv2d):
        def forward(self, x: Tensor, plan: Any) -> Tensor:
            return super().forward(x, plan).square()

    model = layered(2)
    for layer in model.modules():
        if isinstance(layer, MoEConv2d):
            layer.__class__ = Louder
    small = fold_batchnorm(model)
    assert small is not None and norms(small) == 2
    x = pixels(4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_copy_is_still_a_routed_model() -> None:
    model = layered(2)
    small = folded(model)
    assert isinstance(small, RoutedModel) and isinstance(small.network, Chain)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert set(model.state_dict()) == set(layered(2).state_dict())
