from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import Tensor, nn

from phalanx.experts import TwoHeaded, build_expert
from phalanx.experts.build import build_backbone
from phalanx.routing import (
    Counts,
    DualModel,
    Ensemble,
    FeatureRouter,
    HierarchicalRouter,
    LayerMixture,
    LinearRouter,
    MixedNUTS,
    MixtureOfExperts,
    MoEConv2d,
    ResNetRouter,
    Route,
    Routed,
    RoutedLayers,
    RouteTree,
    SynergyOfExperts,
    UniformRouter,
    counts,
    gate,
    with_gate,
)

# small_network: 16 -> 6 -> 3 with biases; LinearRouter: 16 -> E with bias
NETWORK, NETWORK_PARAMETERS = 16 * 6 + 6 * 3, 16 * 6 + 6 + 6 * 3 + 3
X = images(5)


def _router(experts: int) -> tuple[int, int]:
    """Multiply-adds and parameters."""
    return 16 * experts, 17 * experts


def _counts(parameters: int, active: int, path: int, router: int, executed: int) -> Counts:
    return Counts(parameters, active, path, router, executed)


@pytest.mark.parametrize(("width", "macs", "parameters"), [(64, 555_422_720, 11_173_962), (32, 139_299_328, 2_797_610)])
def test_resnet18_is_the_hand_count(width: int, macs: int, parameters: int) -> None:
    # AdvMoE's dense network and its S-Dense at half the width, whose 0.14 G that paper prints too
    expert = build_expert("resnet18", num_classes=10, image_size=32, width=width)
    assert counts(expert, torch.rand(1, 3, 32, 32)) == Counts(parameters, parameters, macs, 0, macs)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_mixture_costs_its_router_and_the_selected_experts(top_k: int) -> None:
    macs, parameters = _router(4)
    found = counts(small_mixture(4, top_k), X)
    assert found == _counts(
        4 * NETWORK_PARAMETERS + parameters,
        top_k * NETWORK_PARAMETERS + parameters,
        top_k * NETWORK,
        macs,
        top_k * NETWORK + macs,
    )
    assert found.total_macs == found.path_macs + found.router_macs


def test_a_soft_gate_runs_all_experts() -> None:
    macs, parameters = _router(4)
    everything = 4 * NETWORK_PARAMETERS + parameters
    assert counts(small_mixture(4, "all"), X) == _counts(everything, everything, 4 * NETWORK, macs, 4 * NETWORK + macs)


def test_a_single_network_has_no_router() -> None:
    expected = _counts(NETWORK_PARAMETERS, NETWORK_PARAMETERS, NETWORK, 0, NETWORK)
    assert counts(small_network().double(), X) == counts(MixtureOfExperts(None, [small_network().double()]), X)
    assert counts(small_network().double(), X) == expected


def test_a_dual_model_is_both_halves_and_nuts_is_the_same() -> None:
    dual = DualModel(small_mixture(4), small_mixture(2, seed=1), 0.7)
    routers = [_router(4), _router(2)]
    macs, parameters = sum(m for m, _ in routers), sum(p for _, p in routers)
    expected = _counts(
        6 * NETWORK_PARAMETERS + parameters,
        2 * NETWORK_PARAMETERS + parameters,
        2 * NETWORK,
        macs,
        2 * NETWORK + macs,
    )
    assert counts(dual, X) == expected
    nuts = MixedNUTS(small_mixture(4), small_mixture(2, seed=1), 0.7, scale=2.0, power=2.0, bias=0.1)
    assert counts(nuts, X) == expected


def test_of_a_half_that_has_no_weight_the_route_alone_is_decided() -> None:
    # as `DualModel` promises: the other half's experts do not run
    dual = DualModel(small_mixture(4), small_mixture(2, seed=1), 1.0)
    found = counts(dual, X)
    assert (found.path_macs, found.router_macs, found.executed_macs) == (NETWORK, 16 * 6, NETWORK + 16 * 6)
    assert found.active_parameters == NETWORK_PARAMETERS + 17 * 6


def test_an_ensemble_is_all_its_members() -> None:
    parts = [counts(small_mixture(4, seed=seed), X) for seed in range(3)]
    found = counts(Ensemble([small_mixture(4, seed=seed) for seed in range(3)]), X)
    for name in ("parameters", "active_parameters", "path_macs", "router_macs", "executed_macs"):
        assert getattr(found, name) == sum(getattr(part, name) for part in parts)


def test_synergy_of_experts_asks_every_submodel_once() -> None:
    # 16 -> 6 -> (3, 1): the path is one sub-model without its confidence, the decision the rest
    model = SynergyOfExperts([TwoHeaded(nn.Sequential(*_two_layers())) for _ in range(3)]).double()
    everything = 3 * (NETWORK_PARAMETERS + 7)
    executed = 3 * (NETWORK + 6)
    assert counts(model, X) == _counts(everything, everything, NETWORK, executed - NETWORK, executed)


def _two_layers() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)]


def test_a_gate_that_knows_nothing_costs_nothing_and_leaves_its_router() -> None:
    found = counts(with_gate(small_mixture(4), "uniform"), X)
    everything = 4 * NETWORK_PARAMETERS
    assert found == _counts(everything, everything, 4 * NETWORK, 0, 4 * NETWORK)


def test_a_router_of_routers_runs_whole() -> None:
    router = HierarchicalRouter(LinearRouter(SHAPE, 2), [LinearRouter(SHAPE, 2), UniformRouter(1)])
    model = MixtureOfExperts(router, [small_network() for _ in range(3)]).double()
    found = counts(model, X)
    assert (found.router_macs, found.active_parameters) == (2 * 32, NETWORK_PARAMETERS + 2 * 34)


# -- experts of different sizes, routes within the network ---------------------------------------------------------


class _BrightRouter(nn.Module):
    """Expert 1 for images brighter than 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        mean_B = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(mean_B, 0.5), mean_B], 1)


def test_experts_of_different_sizes_are_averaged_over_the_images() -> None:
    small, large = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), small_network()
    model = MixtureOfExperts(_BrightRouter(), [small, large]).double()
    x = torch.cat([torch.full((3, *SHAPE), 0.1), torch.full((1, *SHAPE), 0.9)]).double()
    found = counts(model, x)
    path = round((3 * 48 + NETWORK) / 4)
    assert found == _counts(51 + NETWORK_PARAMETERS, round((3 * 51 + NETWORK_PARAMETERS) / 4), path, 0, path)


class _LayerLevel(nn.Module):
    """Two routed layers, each with a router on its own input and 3 experts stacked in one weight; either computes the
    selected expert's slice alone, or all of them and throws the rest away."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.routers = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])
        self.weights = nn.ParameterList([torch.rand(3, 16, 16), torch.rand(3, 16, 16)])

    def gate(self, x: Tensor) -> RouteTree:
        route = self.routed(x).route
        assert route is not None
        return route

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        h = x.flatten(1)
        decided = []
        for site, (router, weight) in enumerate(zip(self.routers, self.weights, strict=True)):
            own = gate(router(h), 1) if route is None else route[site]  # type: ignore[index]
            assert isinstance(own, Route)
            decided.append(own)
            h = self._layer(h, own.experts[:, 0].tolist(), weight)
        return Routed(h, tuple(decided))

    def _layer(self, h: Tensor, experts: list[int], weight: Tensor) -> Tensor:
        if self.masked and len(h) > 1:
            all_outputs = [h @ part.T for part in weight.unbind(0)]
            return torch.stack([all_outputs[e][b] for b, e in enumerate(experts)])
        return torch.cat([h[b : b + 1] @ weight[e].T for b, e in enumerate(experts)])

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x).logits

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"experts": list(self.weights), "router": list(self.routers.parameters())}


def test_routes_within_the_network_need_no_rule_of_their_own() -> None:
    torch.manual_seed(0)
    # deciding runs the whole network: what it shares with the path counts once
    routers, layers = (2 * 48, 2 * 51), 2 * 256
    expected = _counts(6 * 256 + routers[1], layers + routers[1], layers, routers[0], layers + routers[0])
    assert counts(_LayerLevel(masked=False).double(), X) == expected


def test_unselected_experts_that_are_computed_are_executed() -> None:
    torch.manual_seed(0)
    found = counts(_LayerLevel(masked=True).double(), X)
    assert (found.path_macs, found.executed_macs) == (2 * 256, 6 * 256 + 2 * 48)


@pytest.mark.parametrize("overlap", [False, True])
def test_advmoe_resnet18_is_the_hand_count(overlap: bool) -> None:
    # its paper prints 0.15 G, the path without the router
    network = build_backbone(
        "resnet18", RoutedLayers(2, 0.5, overlap=overlap), num_classes=10, image_size=32, scaled_stem=False
    )
    found = counts(LayerMixture(network, ResNetRouter((3, 32, 32), 2), 2), torch.rand(3, 3, 32, 32))
    assert (found.path_macs, found.router_macs) == (151_718_400, 40_550_528)
    assert found.total_macs == found.executed_macs == 192_268_928
    # one slice of every stacked weight, and all that is shared
    routed = [layer for layer in network.modules() if isinstance(layer, MoEConv2d)]
    unused = sum(layer.weight.numel() - layer.slices()[0].numel() for layer in routed)
    assert found.active_parameters == found.parameters - unused


def test_decisions_within_a_network_are_their_linear_layers() -> None:
    layers = RoutedLayers(2, 0.5, routers="block")
    network = build_backbone("resnet18", layers, num_classes=10, image_size=32, scaled_stem=False)
    routers = [FeatureRouter(channels, 2) for channels in layers.sites]
    found = counts(LayerMixture(network, routers, 2), torch.rand(3, 3, 32, 32))
    assert (found.path_macs, found.router_macs) == (151_718_400, 2 * sum(layers.sites))
    assert found.executed_macs == found.total_macs


# -- how it is counted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [lambda: small_mixture(4), lambda: small_mixture(4, "all"), lambda: small_mixture(4, 2, checkpoint=True)],
    ids=["top-1", "soft", "checkpoint"],
)
def test_the_number_of_images_does_not_matter(build: Callable[[], Any]) -> None:
    found = [counts(build(), images(size)) for size in (1, 2, 7, 33)]
    assert all(each == found[0] for each in found)


class _Noise(nn.Module):
    """Draws, in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x)


def test_the_model_is_left_as_it_was() -> None:
    expert = build_expert("small_cnn", num_classes=3, image_size=4, channels=1, width=4)
    model = MixtureOfExperts(
        LinearRouter(SHAPE, 2), [nn.Sequential(_Noise(), expert), nn.Sequential(_Noise(), *_two_layers())]
    ).double()
    model.train()
    model.experts[1].eval()
    model.router[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    # enough that an expert in training mode would move its statistics
    x = images(40).requires_grad_()
    counts(model, x)
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)


def test_without_an_image_there_is_nothing_to_count() -> None:
    with pytest.raises(ValueError, match="at least one image, got none"):
        counts(small_mixture(2), X[:0])


def test_as_json() -> None:
    found = counts(small_mixture(4), X).to_json()
    assert json.loads(json.dumps(found)) == found
    assert (found["total_macs"], found["path_macs"], found["router_macs"]) == (NETWORK + 64, NETWORK, 64)
