"""The backbones whose layers may be routed: what they hold and cost, plain and routed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_samples import LEAST, SMALL
from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.experts import EXPERTS, build_backbone, build_expert
from phalanx.experts.densenet import DenseLayer
from phalanx.experts.wrn import PreActivationBlock
from phalanx.nn import ConvBN, Normalize, PlainLayers
from phalanx.nn.flops import macs
from phalanx.nn.routed import Width
from phalanx.routing import LayerMixture, LinearRouter, MoEConv2d, ResNetRouter, RoutedLayers, counts

BACKBONES = [name for name in EXPERTS if name not in ("mlp", "lipschitz_mlp", "lipschitz_cnn")]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def routed(name: str, experts: int = 2, size: int = 32, classes: int = 10, scale: float = 0.5, **options: Any) -> Any:
    layers = RoutedLayers(experts, scale, **options.pop("layers", {}))
    return build_backbone(name, layers, num_classes=classes, image_size=size, **options)


# -- the literature's counts ---------------------------------------------------------------------------------------

ONE = 32 * 32 * 9
WRN_FIRST = ONE * 16 * 160 + ONE * 160 * 160 + 32 * 32 * 16 * 160
WRN = (
    # the stem; the first group; each later group's first block halves the image and doubles the width; the classifier
    ONE * 3 * 16
    + WRN_FIRST
    + 6 * ONE * 160 * 160
    + 2 * (ONE * 160 * 160 // 2 + 7 * ONE * 160 * 160 + 32 * 32 * 160 * 160 // 2)
    + 640 * 10
)
VGG = (
    ONE * (3 * 64 + 64 * 64)
    + ONE * (64 * 128 + 128 * 128) // 4
    + ONE * (128 * 256 + 2 * 256 * 256) // 16
    + ONE * (256 * 512 + 2 * 512 * 512) // 64
    + 3 * ONE * 512 * 512 // 256
    + 2048 * 256
    + 256 * 256
    + 256 * 10
)


def dense_macs(stem: int, growth: int) -> int:
    total, width, pixels = ONE * 3 * stem, stem, 32 * 32
    for block in range(3):
        for _ in range(6):
            total += pixels * (width * 4 * growth + 9 * 4 * growth * growth)
            width += growth
        if block < 2:
            total += pixels * width * (width // 2)
            width, pixels = width // 2, pixels // 4
    return total + width * 10


@pytest.mark.parametrize(
    ("name", "size", "classes", "options", "held", "cost", "narrow"),
    [
        ("resnet18", 32, 10, {}, 11_173_962, 555_422_720, 139_299_328),
        ("resnet18", 64, 200, {}, 11_271_432, 2_221_772_800, 557_238_272),
        ("resnet18", 224, 1000, {"stem": "imagenet"}, 11_689_512, 1_814_073_344, 483_149_824),
        ("wrn", 32, 10, {}, 36_479_194, WRN, 1_310_944_384),
        ("vgg16", 32, 10, {}, 15_311_818, VGG, 79_071_744),
        ("densenet", 32, 10, {}, 176_122, dense_macs(24, 12), dense_macs(12, 6)),
    ],
)
def test_parameters_and_multiply_adds(
    name: str, size: int, classes: int, options: dict[str, Any], held: int, cost: int, narrow: int
) -> None:
    with torch.device("meta"):
        x = torch.empty(1, 3, size, size)
        for scale, expected in ((1.0, cost), (0.5, narrow)):
            model = build_expert(name, num_classes=classes, image_size=size, scale=scale, **options).eval()
            assert macs(lambda model=model: model(x))[1] == expected  # type: ignore[misc]
            if scale == 1:
                assert parameters(model) == held


def test_these_are_the_giga_multiply_adds_of_the_tables() -> None:
    assert [round(count / 1e9, 4) for count in (WRN, VGG, dense_macs(24, 12))] == [5.2433, 0.3138, 0.0724]


@pytest.mark.parametrize(
    ("name", "size", "classes", "options", "held", "convolutions"),
    [
        ("resnet18", 32, 10, {}, 5_565_450, 16),
        ("resnet18", 224, 1000, {"stem": "imagenet"}, 5_845_256, 19),
        ("wrn", 32, 10, {}, 18_239_602, 27),
        ("vgg16", 32, 10, {}, 7_690_218, 12),
        ("densenet", 32, 10, {}, 85_114, 36),
    ],
)
def test_parameters_and_layers_of_two_experts_at_half_the_width(
    name: str, size: int, classes: int, options: dict[str, Any], held: int, convolutions: int
) -> None:
    with torch.device("meta"):
        network = routed(name, size=size, classes=classes, **options)
    assert parameters(network) == held
    assert sum(isinstance(layer, MoEConv2d) for layer in network.modules()) == convolutions


def test_the_answer_costs_the_path_and_the_router() -> None:
    model = LayerMixture(routed("resnet18"), ResNetRouter((3, 32, 32), 2), 2)
    found = counts(model, torch.rand(1, 3, 32, 32))
    assert (found.parameters, found.path_macs, found.router_macs) == (5_565_450 + 269_202, 151_718_400, 40_550_528)
    assert found.executed_macs == found.total_macs == 192_268_928


@pytest.mark.parametrize(("scale", "expected"), [(0.2, 0.0293), (0.5, 0.1517), (0.8, 0.3632)])
def test_the_path_at_other_scales(scale: float, expected: float) -> None:
    found = counts(LayerMixture(routed("resnet18", 1, scale=scale), None, 1), torch.rand(1, 3, 32, 32))
    assert round(found.path_macs / 1e9, 4) == expected


# -- what each is made of ------------------------------------------------------------------------------------------


def test_the_older_backbones_are_what_they_were() -> None:
    """Names and initial weights, so that old runs load and old seeds mean the same networks."""

    def old_resnet() -> nn.Module:
        layers: list[nn.Module] = [Normalize((0.5,), (0.25,)), ConvBN(1, 4), nn.ReLU()]
        inputs = 4
        for outputs, stride in [(4, 1), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1)]:
            block = nn.Module()
            block.body = nn.Sequential(ConvBN(inputs, outputs, stride=stride), nn.ReLU(), ConvBN(outputs, outputs))
            block.shortcut = nn.Identity() if inputs == outputs else ConvBN(inputs, outputs, 1, stride=stride)
            layers.append(block)
            inputs = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))

    def old_cnn() -> nn.Module:
        layers = [Normalize((0.5,), (0.25,)), ConvBN(1, 4), nn.ReLU(), ConvBN(4, 8, stride=2), nn.ReLU()]
        layers += [ConvBN(8, 8, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)]
        return nn.Sequential(*layers)

    for name, old in (("resnet18", old_resnet), ("small_cnn", old_cnn)):
        torch.manual_seed(0)
        expected = old().state_dict()
        torch.manual_seed(0)
        found = build_expert(name, num_classes=3, image_size=8, channels=1, width=4).state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", BACKBONES)
def test_one_expert_is_the_narrow_network(name: str) -> None:
    """Of one expert the routed network has the plain one's names and shapes, and it computes the same."""
    options = {"scaled_stem": True, **SMALL[name]} if name != "small_cnn" else SMALL[name]
    plain = build_expert(name, num_classes=3, image_size=16, scale=0.5, **options).eval()
    model = LayerMixture(routed(name, 1, 16, 3, **options), None, 1).eval()
    model.network.load_state_dict(plain.state_dict())
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x))


def test_pre_activation_feeds_both_branches() -> None:
    block = PreActivationBlock(PlainLayers(), Width.whole(2), Width.whole(3), 2, routed_shortcut=True).double().eval()
    norm = block.activation[0]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    activated = norm(x).relu()
    inner = block.body[1](F.conv2d(activated, block.body[0].weight, stride=2, padding=1)).relu()
    expected = F.conv2d(inner, block.body[3].weight, padding=1) + F.conv2d(activated, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)
    same = PreActivationBlock(PlainLayers(), Width.whole(2), Width.whole(2), 1, routed_shortcut=True).double().eval()
    # where the shape is kept the input goes past as it is
    torch.testing.assert_close(same(x) - same.body(same.activation(x)), x)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_is_used(name: str) -> None:
    layers = RoutedLayers(2, 0.5)
    network = build_backbone(name, layers, num_classes=3, image_size=16, **SMALL[name])
    model = LayerMixture(network, LinearRouter((3, 16, 16), 2), 2, top_k="all")
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    unused = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    # a convolution's experts, all of them; VGG's inner ReLUs may be silent
    assert not unused


def test_a_dense_layer_keeps_what_it_read() -> None:
    layer = DenseLayer(PlainLayers(), Width.whole(5), Width.whole(3)).eval()
    x = torch.rand(2, 5, 4, 4)
    out = layer(x)
    assert out.shape == (2, 8, 4, 4)
    assert torch.equal(out[:, :5], x) and torch.equal(out[:, 5:], layer.body(x))


@pytest.mark.parametrize(
    ("name", "routers", "sites"),
    [
        # channels of one expert that each decision reads; of a shared stem all that it has
        ("small_cnn", "block", [8, 16]),
        ("resnet18", "block", [64, 32, 32, 64, 64, 128, 128, 256]),
        ("wrn", "block", [8, *[80] * 4, *[160] * 4, *[320] * 3]),
        ("vgg16", "block", [32, 32, 64, 128, 256]),
        ("densenet", "block", [12, 24, 30]),
        ("vgg16", "layer", [32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 256, 256]),
    ],
)
def test_where_decisions_are_taken(name: str, routers: str, sites: list[int]) -> None:
    layers = RoutedLayers(2, 0.5, routers)  # type: ignore[arg-type]
    with torch.device("meta"):
        build_backbone(name, layers, num_classes=10, image_size=32)
    assert layers.sites == sites


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "stem", "convolutions"),
    [
        ("resnet18", {}, 64, 16),
        ("resnet18", {"scaled_stem": True}, 32, 16),
        ("resnet18", {"routed_shortcuts": True}, 64, 20),
        ("resnet18", {"stem": "imagenet"}, 32, 19),
        ("resnet18", {"stem": "imagenet", "scaled_stem": False, "routed_shortcuts": False}, 64, 16),
        ("wrn", {}, 8, 27),
        ("wrn", {"scaled_stem": False, "routed_shortcuts": False}, 16, 24),
        ("wrn", {"stem": "imagenet"}, 8, 27),
        ("vgg16", {"scaled_stem": False}, 64, 12),
        ("densenet", {"scaled_stem": False}, 24, 36),
        ("densenet", {"stem": "imagenet"}, 12, 36),
    ],
)
def test_stems_and_shortcuts(name: str, options: dict[str, Any], stem: int, convolutions: int) -> None:
    with torch.device("meta"):
        network = routed(name, **options)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    assert first.out_channels == stem and first.kernel_size == ((7, 7) if "stem" in options else (3, 3))
    assert sum(isinstance(layer, MoEConv2d) for layer in network.modules()) == convolutions


def test_the_plain_network_scales_its_stem_by_default() -> None:
    first = build_expert("resnet18", num_classes=3, image_size=8, width=8, scale=0.5)[1][0]
    assert first.out_channels == 4
    whole = build_expert("resnet18", num_classes=3, image_size=8, width=8, scale=0.5, scaled_stem=False)[1][0]
    assert whole.out_channels == 8


@pytest.mark.parametrize("name", BACKBONES)
def test_the_smallest_images(name: str) -> None:
    least = LEAST[name]
    expert = build_expert(name, num_classes=3, image_size=least, **SMALL[name]).eval()
    assert expert(torch.rand(2, 3, least, least)).shape == (2, 3)
    if least > 1:
        message = f"{name}: image_size must be at least {least}, got {least - 1}; its pooling would leave no pixel"
        with pytest.raises(InputError, match=re.escape(message)):
            build_expert(name, num_classes=3, image_size=least - 1, **SMALL[name])


def test_the_smallest_images_behind_the_imagenet_stem() -> None:
    options = {**SMALL["densenet"], "stem": "imagenet"}
    expert = build_expert("densenet", num_classes=3, image_size=13, **options).eval()
    assert expert(torch.rand(1, 3, 13, 13)).shape == (1, 3)
    with pytest.raises(InputError, match="image_size must be at least 13, got 12"):
        build_expert("densenet", num_classes=3, image_size=12, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrn", {"depth": 27}, "wrn: depth must be 6n + 4 (10, 16, 22, 28, ...), got 27"),
        ("wrn", {"depth": 4}, "wrn: depth must be 6n + 4"),
        ("wrn", {"widen": 0}, "expert 'wrn': widen must be a whole number of at least 1, got 0"),
        ("densenet", {"depth": 41}, "densenet: depth must be 6n + 4"),
        ("resnet18", {"stem": "large"}, "resnet18: stem must be small or imagenet, got 'large'"),
        ("wrn", {"scale": 1.5}, "wrn: scale must be in (0, 1], got 1.5"),
        ("vgg16", {"scale": 0.01}, "vgg16: scale 0.01 leaves no channel of a layer of 64; raise it, or widen"),
        ("resnet18", {"routed_shortcuts": True}, "expert 'resnet18' has no option 'routed_shortcuts'; it has scale"),
    ],
)
def test_errors_of_plain_networks(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_expert(name, num_classes=3, image_size=32, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {}, "must be one of densenet, resnet18, small_cnn, vgg16, wrn, got 'mlp'"),
        (
            "densenet",
            {"layers": {"overlap": True}},
            "densenet: overlap means nothing where layers read channels joined",
        ),
        ("wrn", {"scale_": 0.5}, "expert 'wrn' has no option 'scale_'"),
    ],
)
def test_errors_of_routed_networks(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        routed(name, **options)


def test_scale_is_not_the_backbones() -> None:
    with pytest.raises(InputError, match="wrn: scale belongs to the mixture"):
        build_backbone("wrn", RoutedLayers(2, 0.5), num_classes=3, image_size=8, scale=0.5)


def test_images_take_the_same_way_in_any_precision() -> None:
    model = LayerMixture(routed("wrn", 2, 8, 3, **SMALL["wrn"]), LinearRouter((3, 8, 8), 2), 2).double().eval()
    x: Tensor = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    assert model(x).dtype == torch.float64
