"""Sliced against masked: every value and every gradient, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_samples import layered, pixels
from routing_samples import gradients

from phalanx.routing import LayerMixture, leaves
from reference.masked_moe_conv import MaskedMixture

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}

KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "score": {"straight_through": "score"},
    "temperature": {"temperature": 0.3},
    "block": {"routers": "block"},
    "layer": {"routers": "layer"},
    "layer-score": {"routers": "layer", "straight_through": "score"},
    "norms": {"norm_kind": "per_expert"},
    "block-norms": {"routers": "block", "norm_kind": "per_expert"},
    "overlap": {"overlap": True, "scale": 0.8},
    "overlap-norms": {"overlap": True, "norm_kind": "per_expert"},
    "top-2": {"top_k": 2},
    "top-2-layer": {"top_k": 2, "routers": "layer"},
    "top-2-norms": {"top_k": 2, "norm_kind": "per_expert"},
    "top-2-overlap": {"top_k": 2, "overlap": True},
    "soft": {"top_k": "all"},
    "soft-block": {"top_k": "all", "routers": "block"},
    "soft-norms": {"top_k": "all", "norm_kind": "per_expert"},
    "soft-overlap": {"top_k": "all", "overlap": True},
}


def assert_equal_to_masked(model: LayerMixture, x: torch.Tensor) -> None:
    """Logits, gradients of images and parameters, and BatchNorm's statistics afterwards."""
    reference = MaskedMixture(model)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in reference.named_parameters()]
    logits, found = gradients(model, model, x)
    expected, wanted = gradients(reference, reference, x)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    for name, ours, theirs in zip(["images", *names], found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    for (name, ours), (other, theirs) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_masked_computation(kind: str, training: bool) -> None:
    model = layered(3, training=training, **KINDS[kind])
    x = pixels(26)
    with torch.no_grad():
        for leaf in leaves(copy.deepcopy(model).gate(x)):
            assert len(leaf.experts.unique()) > 1
    assert_equal_to_masked(model, x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backbone", ["resnet18", "wrn", "densenet"])
@pytest.mark.parametrize("kind", ["shared", "block", "layer", "norms"])
def test_every_backbone_does(backbone: str, kind: str, training: bool) -> None:
    options = {"resnet18": {"width": 4}, "wrn": {"depth": 10, "widen": 1}, "densenet": {"depth": 10, "growth": 4}}
    model = layered(2, backbone, options=options[backbone], training=training, **KINDS[kind])
    assert_equal_to_masked(model, pixels(20))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_without_images_and_one_image(kind: str, training: bool) -> None:
    model = layered(3, **KINDS[kind], training=training)
    for size in (1, 2):
        assert_equal_to_masked(model, pixels(size, seed=size))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("routers", ["shared", "block", "layer"])
def test_all_images_to_one_expert(routers: str, training: bool) -> None:
    model = layered(3, routers=routers, training=training)
    with torch.no_grad():
        for router in [model.router] if model.shared else model.router:  # type: ignore[union-attr]
            router[-1].bias[1] += 100.0
    assert_equal_to_masked(model, pixels(9))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_expert_needs_no_router(training: bool) -> None:
    model = layered(1, training=training)
    assert model.router is None and set(model.players()) == {"experts"}
    assert_equal_to_masked(model, pixels(5))


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 5),
    scale=st.sampled_from([0.2, 0.25, 0.5, 0.8, 1.0]),
    size=st.integers(1, 12),
    selected=st.integers(1, 5),
    overlap=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_of_a_mixture_does(
    experts: int, scale: float, size: int, selected: int, overlap: bool, training: bool, seed: int
) -> None:
    top_k = min(selected, experts)
    model = layered(experts, scale=scale, overlap=overlap, top_k=top_k, seed=seed, training=training)
    assert_equal_to_masked(model, pixels(size, seed=seed))
