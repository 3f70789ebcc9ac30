"""Layers that are 1-Lipschitz by construction: the constraint holds for whatever the free parameters are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phalanx.experts import build_expert
from phalanx.nn import LipschitzConv2d, LipschitzLinear, MaxMin
from phalanx.nn.lipschitz import almost_orthogonal, cayley, prepared_weights, row_normalised
from phalanx.routing import MixtureOfExperts, counts


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 5), (9, 4), (4, 9), (1, 3)])
def test_cayley_is_orthogonal_for_any_numbers(outputs: int, inputs: int, scale: float) -> None:
    raw = scale * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).double()
    singular = torch.linalg.svdvals(cayley(raw))
    assert torch.allclose(singular, torch.ones_like(singular), atol=1e-9)


def _dense(kernel: torch.Tensor, size: int, stride: int = 1, padding: int = 1) -> torch.Tensor:
    """The matrix of a zero-padded convolution on images of `size`."""
    pixels = kernel.shape[1] * size**2
    eye = torch.eye(pixels, dtype=kernel.dtype).reshape(pixels, kernel.shape[1], size, size)
    return nn.functional.conv2d(eye, kernel, None, stride, padding).flatten(1).T


@pytest.mark.parametrize("size", [3, 6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_an_almost_orthogonal_convolution_enlarges_nothing(scale: float, size: int) -> None:
    raw = scale * torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    norm = float(torch.linalg.matrix_norm(_dense(almost_orthogonal(raw), size), 2))
    # no more than 1, and not by being next to nothing
    assert 0.4 < norm <= 1 + 1e-9
    assert float(torch.linalg.matrix_norm(_dense(raw / raw.flatten(1).norm(dim=1)[:, None, None, None], size), 2)) > 1.1


def test_a_layer_of_patches_is_orthogonal() -> None:
    torch.manual_seed(0)
    layer = LipschitzConv2d(2, 8, 2, patches=True).double()
    singular = torch.linalg.svdvals(_dense(layer.weight.detach(), 4, stride=2, padding=0))
    assert torch.allclose(singular, torch.ones_like(singular), atol=1e-9)
    assert layer(torch.rand(3, 2, 4, 4).double()).shape == (3, 8, 2, 2)
    assert layer(torch.rand(3, 2, 5, 5).double()).shape == (3, 8, 2, 2)


def test_rows_sum_to_one() -> None:
    for raw in (torch.randn(4, 7), torch.randn(3, 2, 3, 3)):
        assert torch.allclose(row_normalised(raw).abs().flatten(1).sum(1), torch.ones(len(raw)))
    assert row_normalised(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_no_layer_moves_features_further_than_they_came(norm: str) -> None:
    torch.manual_seed(0)
    order = {"L2": 2.0, "Linf": float("inf")}[norm]
    layers = {
        "linear": (LipschitzLinear(12, 6, norm=norm), (12,)),
        "scaled": (LipschitzLinear(12, 6, norm=norm, scale=1.0), (12,)),
        "convolution": (LipschitzConv2d(3, 4, 3, patches=False, norm=norm), (3, 6, 6)),
        "patches": (LipschitzConv2d(3, 4, 2, patches=True, norm=norm), (3, 6, 6)),
        "max-min": (MaxMin(), (8,)),
    }
    for name, (layer, shape) in layers.items():
        x, other = torch.randn(2, 200, *shape).double()
        moved = (layer.double()(x) - layer(other)).flatten(1).norm(order, dim=1)
        assert bool((moved <= (x - other).flatten(1).norm(order, dim=1) * (1 + 1e-9)).all()), name


def test_a_scale_multiplies_the_weight_alone() -> None:
    torch.manual_seed(0)
    layer = LipschitzLinear(6, 3, scale=4.0)
    assert torch.linalg.svdvals(layer.weight.detach()).tolist() == pytest.approx([4.0] * 3, rel=1e-5)
    assert layer(torch.zeros(1, 6)).tolist() == [[0.0] * 3]


def test_every_free_parameter_gets_a_gradient() -> None:
    for norm in ("L2", "Linf"):
        for layer, shape in (
            (LipschitzLinear(6, 4, norm=norm), (6,)),
            (LipschitzConv2d(2, 4, 3, patches=False, norm=norm), (2, 4, 4)),
            (LipschitzConv2d(2, 4, 2, patches=True, norm=norm), (2, 4, 4)),
        ):
            layer(torch.rand(3, *shape)).square().sum().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_weights_are_not_autocast() -> None:
    torch.manual_seed(0)
    layer = LipschitzLinear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, cayley(layer.raw))


def test_pairs_are_sorted_and_nothing_else() -> None:
    x = torch.tensor([[1.0, 2.0, 5.0, -3.0]])
    assert MaxMin()(x).tolist() == [[2.0, 1.0, 5.0, -3.0]]
    image = torch.randn(2, 4, 3, 3)
    out = MaxMin()(image)
    assert torch.equal(out[:, 0], torch.maximum(image[:, 0], image[:, 1]))
    assert torch.equal(out[:, 3], torch.minimum(image[:, 2], image[:, 3]))


def test_an_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm must be one of L2, Linf, got 'L1'"):
        LipschitzLinear(2, 2, norm="L1")
    with pytest.raises(ValueError, match="norm must be one of L2, Linf, got 'L1'"):
        LipschitzConv2d(2, 2, 2, patches=True, norm="L1")


def test_prepared_weights_answer_alike_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    layers = [LipschitzConv2d(2, 4, 3, patches=False), LipschitzConv2d(4, 4, 2, patches=True), nn.Flatten()]
    model = nn.Sequential(*layers, LipschitzLinear(16, 6, scale=3.0), MaxMin(), LipschitzLinear(6, 2, norm="Linf"))
    before, x = {key: value.clone() for key, value in model.state_dict().items()}, torch.rand(3, 2, 4, 4)
    with torch.no_grad():
        answers = model(x)
        with pytest.raises(KeyError), prepared_weights(model):
            assert torch.equal(model[3].weight, model[3].raw)
            assert torch.allclose(model(x), answers, atol=1e-6)
            raise KeyError
        assert torch.equal(model(x), answers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_prepared_weights_nest_and_leave_a_graph_that_holds_the_free_parameters_valid() -> None:
    torch.manual_seed(0)
    layer, x = LipschitzLinear(4, 4), torch.rand(3, 4)
    layer(x).square().sum().backward()
    expected, layer.raw.grad = layer.raw.grad, None
    loss = layer(x).square().sum()
    with prepared_weights(layer):
        with prepared_weights(layer):
            inner = layer.weight
        assert torch.equal(layer.weight, inner) and layer.weight is layer.raw
    loss.backward()
    torch.testing.assert_close(layer.raw.grad, expected, rtol=0, atol=0)


def test_a_layer_costs_what_a_plain_one_costs() -> None:
    # a square layer's transform alone is more than its product with one image
    network = build_expert("lipschitz_mlp", num_classes=10, image_size=8, channels=1, hidden=[64, 32])
    found = counts(MixtureOfExperts(None, [network]), torch.rand(2, 1, 8, 8))
    weights = 64 * 64 + 64 * 32 + 32 * 10
    assert (found.total_macs, found.executed_macs) == (weights, weights)
    assert found.parameters == found.active_parameters == weights + 64 + 32 + 10
