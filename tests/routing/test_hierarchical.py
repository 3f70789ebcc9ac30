"""A router of routers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from routing_samples import SHAPE, images, small_network
from torch import Tensor, nn

from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import (
    HierarchicalRouter,
    LinearRouter,
    MixtureOfExperts,
    UniformRouter,
    build_hierarchical,
    build_router,
    gate,
)


class Scores(nn.Module):
    """The same scores for every image."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log() + 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


def test_probabilities_multiply_by_hand() -> None:
    router = HierarchicalRouter(Scores(0.6, 0.4), [Scores(0.5, 0.3, 0.2), Scores(0.9, 0.1)])
    scores = router(images(2))
    expected = torch.tensor([0.3, 0.18, 0.12, 0.36, 0.04], dtype=torch.float64)
    torch.testing.assert_close(scores.exp(), expected.expand(2, -1))
    # the best expert of all is not one of the best group
    assert gate(scores, 1).experts.tolist() == [[3]] * 2 and gate(scores, 2).experts.tolist() == [[3, 0]] * 2
    soft = gate(scores, 5)
    torch.testing.assert_close(soft.weights.gather(-1, soft.experts.argsort(-1)), expected.expand(2, -1))


def small_router() -> HierarchicalRouter:
    torch.manual_seed(0)
    groups = [LinearRouter(SHAPE, 2), build_router("mlp", SHAPE, 2, hidden=[4]), UniformRouter(1)]
    return HierarchicalRouter(LinearRouter(SHAPE, 3), groups)


@pytest.mark.parametrize("top_k", [1, 2, "all"])
def test_a_mixture_routes_and_learns_by_it(top_k: int | str) -> None:
    model = MixtureOfExperts(small_router(), [small_network() for _ in range(5)], top_k)
    x = images(64).float()
    route = model.gate(x)
    torch.testing.assert_close(route.scores.logsumexp(-1), torch.zeros(64))
    model(x).square().sum().backward()
    for name, parameter in model.router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_built_from_its_record_bit_for_bit() -> None:
    experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(5)]
    model, x = MixtureOfExperts(small_router(), experts, 2).eval(), images(6).float()
    spec = spec_of(model)
    assert spec is not None
    again = build(json.loads(json.dumps(spec.to_json()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and spec_of(again) == spec
    assert spec_of(HierarchicalRouter(Scores(0.5, 0.5), [Scores(1.0), UniformRouter(1)])) is None


def test_uniform_scores() -> None:
    router = UniformRouter(3)
    assert torch.equal(router(images(2)), torch.zeros(2, 3, dtype=torch.float64))
    assert not list(router.parameters()) and repr(router) == "UniformRouter(num_experts=3)"


def test_routers_that_do_not_fit() -> None:
    part = Scores(0.5, 0.5)
    with pytest.raises(ValueError, match="groups must hold at least 2 routers, got 1; use a single router as it is"):
        HierarchicalRouter(UniformRouter(1), [part])
    with pytest.raises(ValueError, match="must be different routers, got one of them twice; build each anew"):
        HierarchicalRouter(UniformRouter(2), [part, part])
    message = r"top must answer with scores \(4, 2\), .* got shape \(4, 3\); build it with num_experts=2"
    with pytest.raises(ValueError, match=message):
        HierarchicalRouter(UniformRouter(3), [part, Scores(1.0)])(images(4))
    # scores are relative: a group's own scale does not matter
    shifted = Scores(0.5, 0.5)
    with torch.no_grad():
        shifted.scores += math.pi
    torch.testing.assert_close(
        HierarchicalRouter(UniformRouter(2), [part, UniformRouter(1)])(images(1)),
        HierarchicalRouter(UniformRouter(2), [shifted, UniformRouter(1)])(images(1)),
    )


def test_groups_of_equal_size() -> None:
    torch.manual_seed(0)
    router = build_hierarchical("mlp", SHAPE, 6, groups=3, hidden=[4])
    x = images(5).float()
    assert router.top(x).shape == (5, 3) and [group(x).shape[1] for group in router.groups] == [2, 2, 2]
    assert router(x).shape == (5, 6)
    spec = spec_of(router)
    assert spec is not None and spec.arguments["top"]["name"] == "router.mlp"
    for groups, experts in ((1, 6), (4, 6), (6, 6)):
        with pytest.raises(ValueError, match=f"divide the {experts} experts into groups of at least 2, got {groups}"):
            build_hierarchical("linear", SHAPE, experts, groups=groups)
