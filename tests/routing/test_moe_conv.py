"""One routed layer at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import PlainLayers
from phalanx.nn.routed import Width
from phalanx.routing import ExpertNorm2d, MoEConv2d, Route, RoutedLayers
from phalanx.routing.assignment import Assignment
from phalanx.routing.dispatch import MIN_BATCHNORM_GROUP


class Given:
    """A plan that says the same everywhere, and who asked."""

    def __init__(self, experts: list[int], num_experts: int) -> None:
        chosen = torch.tensor(experts)[:, None]
        ones = torch.ones(len(experts), 1)
        self.assignment = Assignment.of(Route(torch.zeros(len(experts), num_experts), chosen, ones))
        self.asked: list[int] = []

    def at(self, site: int, x: Tensor) -> Assignment:
        self.asked.append(site)
        return self.assignment


def test_each_image_has_the_slice_of_its_expert() -> None:
    conv = MoEConv2d(2, 3, stride=2, num_experts=4, site=5)
    assert conv.weight.shape == (12, 2, 3, 3)
    x, plan = torch.rand(3, 2, 6, 6), Given([3, 0, 3], 4)
    out = conv(x, plan)
    assert out.shape == (3, 3, 3, 3) and plan.asked == [5]
    for row, expert in enumerate([3, 0, 3]):
        alone = F.conv2d(x[row : row + 1], conv.weight[3 * expert : 3 * expert + 3], stride=2, padding=1)
        torch.testing.assert_close(out[row : row + 1], alone)


@pytest.mark.parametrize(
    ("experts", "kept", "full", "starts"),
    [
        # AdvMoE's figure: a partition
        (4, 2, 8, [0, 2, 4, 6]),
        # N r > 1: neighbours share; N r < 1: some channels are nobody's
        (2, 8, 10, [0, 2]),
        (2, 2, 10, [0, 8]),
        (3, 4, 9, [0, 2, 5]),
        (4, 2, 7, [0, 2, 3, 5]),
        (1, 4, 8, [0]),
    ],
)
def test_bands(experts: int, kept: int, full: int, starts: list[int]) -> None:
    conv = MoEConv2d(3, kept, num_experts=experts, full=(3, full))
    assert conv.weight.shape == (full, 3, 3, 3)
    for band, start in zip(conv.slices(), starts, strict=True):
        assert torch.equal(band, conv.weight[start : start + kept])
    inwards = MoEConv2d(kept, 3, num_experts=experts, full=(full, 3))
    for band, start in zip(inwards.slices(), starts, strict=True):
        assert torch.equal(band, inwards.weight[:, start : start + kept])


def test_slices_are_views() -> None:
    for conv in (MoEConv2d(2, 3, num_experts=2), MoEConv2d(2, 3, num_experts=2, full=(4, 6))):
        storage = conv.weight.untyped_storage().data_ptr()
        assert all(part.untyped_storage().data_ptr() == storage for part in conv.slices())


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("full", [None, (16, 32)])
def test_an_expert_starts_as_a_convolution_of_its_own_width(experts: int, full: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    conv, plain = MoEConv2d(8, 16, num_experts=experts, full=full), nn.Conv2d(8, 16, 3, bias=False)
    for part in conv.slices():
        assert float(part.detach().std()) == pytest.approx(float(plain.weight.detach().std()), rel=0.1)
        assert float(part.detach().abs().max()) <= (8 * 9) ** -0.5


def test_the_state_is_the_weight_alone() -> None:
    assert list(MoEConv2d(2, 3, num_experts=2).state_dict()) == ["weight"]


def test_the_text_tells_two_apart() -> None:
    texts = {
        repr(MoEConv2d(2, 4, num_experts=experts, site=site, full=full))
        for experts, site, full in ((2, 0, None), (2, 1, None), (2, 0, (4, 8)), (4, 0, None))
    }
    assert len(texts) == 4


# -- a BatchNorm for each expert -----------------------------------------------------------------------------------


def test_groups_have_their_own_statistics() -> None:
    norm = ExpertNorm2d(2, num_experts=3)
    size = MIN_BATCHNORM_GROUP
    experts = [1] * size + [0] * size
    x = torch.randn(2 * size, 2, 3, 3) * 3 + 1
    out = norm(x, Given(experts, 3))
    for group in (out[:size], out[size:]):
        torch.testing.assert_close(group.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    assert [int(each.num_batches_tracked) for each in norm.norms] == [1, 1, 0]
    torch.testing.assert_close(norm.norms[1].running_mean, 0.1 * x[:size].mean((0, 2, 3)))


def test_small_groups_use_running_statistics_and_leave_them() -> None:
    norm = ExpertNorm2d(2, num_experts=2)
    nn.init.constant_(norm.norms[1].running_mean, 3.0)
    x = torch.randn(MIN_BATCHNORM_GROUP - 1, 2, 3, 3)
    out = norm(x, Given([1] * len(x), 2))
    torch.testing.assert_close(out, (x - 3) / (1 + norm.norms[1].eps) ** 0.5)
    assert int(norm.norms[1].num_batches_tracked) == 0 and norm.norms[1].training
    assert norm.norms[1].running_mean.tolist() == [3, 3]


# -- the maker -----------------------------------------------------------------------------------------------------


def test_what_is_made() -> None:
    layers = RoutedLayers(3, 0.5)
    assert layers.routed and not PlainLayers().routed
    width = layers.width(10)
    assert width == Width(10, 5)
    conv, norm = layers.conv(Width.whole(7), width, stride=2), layers.norm(width)
    assert isinstance(conv, MoEConv2d) and conv.weight.shape == (15, 7, 3, 3) and conv.stride == 2
    assert type(norm) is nn.BatchNorm2d and norm.num_features == 5
    own = RoutedLayers(3, 0.5, norm_kind="per_expert").norm(width)
    assert isinstance(own, ExpertNorm2d) and len(own.norms) == 3


def test_bands_are_read_only_where_experts_made_them() -> None:
    layers = RoutedLayers(2, 0.5, overlap=True)
    wide = layers.width(8)
    first, second = layers.conv(Width.whole(5), wide), layers.conv(wide, wide)
    assert isinstance(first, MoEConv2d) and first.weight.shape == (8, 5, 3, 3)
    assert isinstance(second, MoEConv2d) and second.weight.shape == (8, 8, 3, 3)
    assert second.slices()[1].shape == (4, 4, 3, 3)


@pytest.mark.parametrize(
    ("routers", "sites", "asked"),
    [("shared", [], [0, 0, 0]), ("block", [3, 4], [0, 0, 1]), ("layer", [3, 2, 4], [0, 1, 2])],
)
def test_sites(routers: str, sites: list[int], asked: list[int]) -> None:
    layers = RoutedLayers(2, 0.5, routers)  # type: ignore[arg-type]
    layers.begin_block(Width.whole(3))
    first = layers.conv(Width.whole(3), layers.width(4))
    second = layers.conv(layers.width(4), layers.width(8))
    layers.begin_block(layers.width(8))
    third = layers.conv(layers.width(8), layers.width(8))
    assert layers.sites == sites
    assert [layer.site for layer in (first, second, third)] == asked  # type: ignore[union-attr]
