"""A mixture without one expert is the mixture that never had it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from phalanx.evaluation.knocked_out import Without, cannot_go_without
from phalanx.experts import TwoHeaded, build_expert
from phalanx.routing import (
    DualModel,
    MixtureOfExperts,
    RoutedModel,
    SynergyOfExperts,
    UniformRouter,
    load_per_expert,
)


def images() -> torch.Tensor:
    (batch,) = tiny.digits().test.batches(40)
    return batch.x


class Columns(nn.Module):
    """Some of a router's scores."""

    def __init__(self, router: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.router = router
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.router(x)[:, self.kept]
        return scores


def steep(top_k: int | str, temperature: float) -> MixtureOfExperts:
    """A router that uses every expert."""
    model: MixtureOfExperts = tiny.mixture(4, top_k, temperature=temperature)
    with torch.no_grad():
        model.router[-1].weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
        model.router[-1].bias -= model.router(images()).mean(0)
    return model


@pytest.mark.parametrize("top_k", [1, 2, 3, "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_it_is_the_mixture_of_the_others(top_k: int | str, temperature: float) -> None:
    model, x = steep(top_k, temperature), images()
    for expert in range(4):
        kept = [other for other in range(4) if other != expert]
        others = MixtureOfExperts(
            Columns(model.router, kept),
            [model.experts[other] for other in kept],
            min(model.top_k, 3),
            temperature=temperature,
        )
        rest = Without(model, expert)
        assert torch.allclose(rest(x), others(x), atol=1e-6)
        routed = rest.routed(x)
        assert torch.allclose(routed.logits, rest(x)) and routed.route is not None
        (load,) = load_per_expert(routed.route)
        assert load[expert] == 0 and float(load.sum()) == pytest.approx(1)
        assert load_per_expert(model.gate(x))[0][expert] > 0
        assert torch.allclose(routed.route.weights.sum(-1), torch.ones(len(x)))


def test_two_experts_leave_one() -> None:
    for model in (tiny.mixture(2), tiny.mixture(2, "all"), tiny.mixture(2, 2)):
        assert torch.allclose(Without(model, 0)(images()), model.experts[1](images()))
        assert torch.allclose(Without(model, 1)(images()), model.experts[0](images()))


def test_the_surest_of_the_other_sub_models_speaks() -> None:
    torch.manual_seed(0)
    networks = [build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[12]) for _ in range(3)]
    model = SynergyOfExperts([TwoHeaded(network) for network in networks])
    x = images()
    for expert in range(3):
        others = SynergyOfExperts([sub for number, sub in enumerate(model.experts) if number != expert])
        assert torch.allclose(Without(model, expert)(x), others(x), atol=1e-6)


def test_it_has_the_gradient_of_what_is_left() -> None:
    x = images()[:4].requires_grad_()
    for top_k in (1, 2, "all"):
        (gradient,) = torch.autograd.grad(Without(steep(top_k, 1.0), 2)(x).sum(), x)
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any())
    assert isinstance(Without(tiny.mixture(2), 0), RoutedModel)
    assert Without(tiny.mixture(2), 0).players().keys() == {"experts", "router"}


def test_where_it_is_not_defined_it_says_why() -> None:
    def why(model: RoutedModel) -> str:
        return cannot_go_without(model, model.gate(images()))

    for model in (tiny.mixture(3), tiny.mixture(3, 2), MixtureOfExperts(UniformRouter(2), [nn.Flatten(), nn.ReLU()])):
        assert why(model) == ""
    assert "several gates" in why(DualModel(tiny.mixture(2), tiny.mixture(2), 0.5))
    assert "one expert" in why(tiny.mixture(1))
    unknown = tiny.mixture(3, 2)
    del unknown.temperature
    route = tiny.mixture(3, 2).gate(images())
    assert "temperature" in cannot_go_without(unknown, route)
