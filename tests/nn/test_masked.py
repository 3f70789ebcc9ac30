"""The mask keeps the right number of the right filters, and each phase moves only what it should."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.experts import build_backbone, build_expert
from phalanx.nn import PlainLayers
from phalanx.nn.masked import (
    MaskedConv2d,
    MaskedLayers,
    Phase,
    begin_mask,
    fix_mask,
    freeze_weights,
    kept_filters,
    mask_the_rest,
    masked_convolutions,
)

SMALL: dict[str, dict[str, Any]] = {
    "small_cnn": {"width": 4},
    "resnet18": {"width": 4},
    "wrn": {"depth": 10, "widen": 1},
    "vgg16": {"width": 4, "hidden": 8},
    "densenet": {"depth": 10, "growth": 4},
}
SHAPE: dict[str, Any] = {"num_classes": 3, "image_size": 16, "channels": 3}


def _conv(phase: Phase = "mask", *, scale: float = 0.5, seed: int = 0) -> MaskedConv2d:
    torch.manual_seed(seed)
    return MaskedConv2d(3, 8, stride=2, scale=scale, phase=phase).double()


def _x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network(backbone: str = "resnet18", phase: Phase = "mask", *, everywhere: bool = True) -> nn.Module:
    network = build_backbone(backbone, MaskedLayers(0.5, phase), **SHAPE, **SMALL[backbone])
    if everywhere:
        mask_the_rest(network, 0.5, phase)
    return network


# -- which filters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "kept"), [(0.2, [13, 26, 52, 103]), (0.5, [32, 64, 128, 256]), (0.8, [52, 103, 205, 410])]
)
def test_kept_widths_of_resnet18(scale: float, kept: list[int]) -> None:
    assert [kept_filters(filters, scale) for filters in (64, 128, 256, 512)] == kept
    for filters, number in zip((64, 128, 256, 512), kept, strict=True):
        assert int(MaskedConv2d(1, filters, 1, scale=scale).selected().sum()) == number


@given(st.integers(1, 2048), st.integers(1, 1000))
@example(25, 280)
def test_all_but_the_whole_part_of_the_rest_is_kept(filters: int, thousandths: int) -> None:
    scale = Fraction(thousandths, 1000)
    assert kept_filters(filters, float(scale)) == filters - int((1 - scale) * filters)


@pytest.mark.parametrize("scale", [0, -0.5, 1.1])
def test_a_share_of_filters_is_one(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale must be in \(0, 1\], got"):
        kept_filters(8, scale)


@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.sampled_from([4, 20]))
def test_the_filters_of_the_largest_l1_norm_are_kept(seed: int, scale: float, levels: int) -> None:
    conv = _conv(scale=scale, seed=seed)
    assert conv.scores is not None
    # whole numbers, all of size 1 or from 1 to 4: norms are often equal
    conv.scores.data = conv.scores.sign() * conv.scores.abs().mul(levels).ceil()
    norms = [sum(abs(number) for number in filter_.flatten().tolist()) for filter_ in conv.scores]
    ranked = sorted(range(8), key=lambda index: (norms[index], index))
    expected = set(ranked[8 - kept_filters(8, scale) :])
    assert set(conv.selected().nonzero().flatten().tolist()) == expected


def test_the_others_are_zero() -> None:
    conv, x = _conv(), _x(2, 3, 6, 6)
    out = conv(x)
    whole = F.conv2d(x, conv.weight, stride=2, padding=1)
    assert torch.equal(out[:, conv.selected()], whole[:, conv.selected()])
    assert not out[:, ~conv.selected()].any() and whole[:, ~conv.selected()].any()


def test_scores_begin_in_proportion_to_the_weights() -> None:
    conv = _conv()
    conv.rank_by_weight()
    weight = conv.weight.detach()
    assert conv.scores is not None
    torch.testing.assert_close(conv.scores.detach(), (6 / 27) ** 0.5 * weight / weight.abs().max())
    order = weight.abs().sum((1, 2, 3)).argsort()
    assert set(order[4:].tolist()) == set(conv.selected().nonzero().flatten().tolist())


# -- gradients -----------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_mask_passes_to_the_size_of_the_scores() -> None:
    conv, x, target = _conv(), _x(2, 3, 6, 6), _x(2, 8, 3, 3, seed=2)
    ((conv(x) - target) ** 2).sum().backward()
    assert conv.scores is not None and conv.scores.grad is not None and conv.weight.grad is None
    # slow and obvious: the derivative in the masked weight, element by element times the weight
    masked = (conv.weight * conv.selected().double().reshape(-1, 1, 1, 1)).detach().requires_grad_()
    loss = ((F.conv2d(x, masked, stride=2, padding=1) - target) ** 2).sum()
    (in_masked,) = torch.autograd.grad(loss, masked)
    expected = in_masked * conv.weight.detach() * conv.scores.detach().sign()
    torch.testing.assert_close(conv.scores.grad, expected, rtol=1e-12, atol=1e-12)
    # a filter that is zero may come back
    assert conv.scores.grad[~conv.selected()].all()


def test_the_value_is_the_same_with_and_without_that_gradient() -> None:
    conv, x = _conv(), _x(2, 3, 6, 6)
    with_gradient = conv(x)
    assert conv.scores is not None
    conv.scores.requires_grad_(False)
    assert torch.equal(conv(x), with_gradient)


def test_a_zeroed_filter_of_a_fixed_mask_gets_no_gradient() -> None:
    conv = _conv("weights")
    conv(_x(2, 3, 6, 6)).square().sum().backward()
    assert conv.weight.grad is not None and conv.kept is not None
    assert not conv.weight.grad[~conv.kept].any() and conv.weight.grad[conv.kept].all()
    assert conv.scores is None and not isinstance(conv.kept, nn.Parameter) and conv.kept.dtype == torch.bool


@pytest.mark.parametrize("train_norms", [True, False])
def test_what_moves_in_phase_mask(train_norms: bool) -> None:
    network = _network()
    freeze_weights(network, train_norms=train_norms)
    norms = {
        f"{name}.{own}"
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for own in ("weight", "bias")
    }
    scores = {f"{name}.scores" for name, _ in masked_convolutions(network)}
    assert {name for name, own in network.named_parameters() if own.requires_grad} == scores | (
        norms if train_norms else set()
    )


# -- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SMALL)
def test_every_backbone_can_be_masked(backbone: str) -> None:
    plain = build_backbone(backbone, PlainLayers(), **SHAPE, **SMALL[backbone])
    convolutions = [name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)]
    everywhere = [name for name, _ in masked_convolutions(_network(backbone))]
    routed = [name for name, _ in masked_convolutions(_network(backbone, everywhere=False))]
    assert everywhere == convolutions and set(routed) < set(convolutions)
    # the stem is never routed
    assert convolutions[0] not in routed
    # the same network: with nothing masked away it computes the same
    whole = build_backbone(backbone, MaskedLayers(1.0), **SHAPE, **SMALL[backbone])
    mask_the_rest(whole, 1.0)
    begin_mask(whole, plain.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(whole.eval()(x), plain.eval()(x))


def test_which_convolutions_of_resnet18() -> None:
    def count(everywhere: bool, **options: Any) -> int:
        network = build_backbone("resnet18", MaskedLayers(0.5), **SHAPE, width=4, **options)
        if everywhere:
            mask_the_rest(network, 0.5)
        return len([*masked_convolutions(network)])

    # sixteen in blocks, three shortcuts, the stem
    assert (count(False), count(False, routed_shortcuts=True), count(True)) == (16, 19, 20)
    assert (count(False, stem="imagenet"), count(True, stem="imagenet")) == (19, 20)
    for _, conv in masked_convolutions(_network()):
        assert conv.num_kept == conv.out_channels // 2


def test_a_mask_is_fixed_as_it_was_learned() -> None:
    learned, fixed = _network(), _network(phase="weights")
    dense = build_expert("resnet18", **SHAPE, **SMALL["resnet18"])
    begin_mask(learned, dense.state_dict())
    for _, conv in masked_convolutions(learned):
        assert conv.scores is not None
        conv.scores.data.copy_(torch.randn_like(conv.scores))
    fix_mask(fixed, learned)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(learned.eval()(x), fixed.eval()(x))
    assert not [name for name in fixed.state_dict() if name.endswith("scores")]
    dense_state = dense.state_dict()
    assert all(torch.equal(dense_state[name], own) for name, own in fixed.state_dict().items() if name in dense_state)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (3, 1), bias=False)],
    ids=["groups", "bias", "oblong"],
)
def test_other_convolutions_are_refused(layer: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="only square bias-free convolutions of one group can be masked, got Conv2d"):
        mask_the_rest(nn.Sequential(layer), 0.5)


def test_the_share_shows() -> None:
    assert repr(_conv()) == "MaskedConv2d(3, 8, 3, stride=2, padding=1, kept=4)"
