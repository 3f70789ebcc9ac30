"""What a masked network costs: hand counts, and the channels that really change with the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_masked import SHAPE, SMALL
from torch import Tensor, nn

from phalanx.experts import build_backbone, build_expert
from phalanx.nn.alive import spared
from phalanx.nn.flops import macs
from phalanx.nn.masked import MaskedConv2d, MaskedLayers, mask_the_rest, masked_convolutions
from phalanx.routing import MixtureOfExperts, counts

DENSE, S_DENSE = 555_422_720, 139_299_328
X = torch.rand(1, 3, 32, 32)


def _resnet18(*, everywhere: bool = True) -> nn.Module:
    """In phase weights; every mask keeps the first half."""
    network = build_backbone("resnet18", MaskedLayers(0.5, "weights"), num_classes=10, image_size=32)
    if everywhere:
        mask_the_rest(network, 0.5, "weights")
    return network.eval()


def _keep_the_last(network: nn.Module, *names: str) -> None:
    for name in names:
        conv = network.get_submodule(name)
        assert isinstance(conv, MaskedConv2d) and conv.kept is not None
        conv.kept.copy_(conv.kept.flip(0))


def _path(network: nn.Module, x: Tensor = X) -> int:
    return counts(MixtureOfExperts(None, [network]), x).path_macs


def test_one_mask_for_each_residual_stream_is_a_network_of_half_the_width() -> None:
    found = counts(MixtureOfExperts(None, [_resnet18()]), X)
    assert (found.path_macs, found.router_macs, found.executed_macs) == (S_DENSE, 0, DENSE)
    narrow = build_expert("resnet18", num_classes=10, image_size=32, width=32)
    assert found.active_parameters == sum(parameter.numel() for parameter in narrow.parameters())


# width 64: two 3x3 convolutions of stage 1 and of every other one but the strided, a strided, a shortcut
FULL, STRIDED, SHORTCUT, STEM, LINEAR = 37_748_736, 18_874_368, 2_097_152, 1_769_472, 5_120


def test_residual_streams_are_the_union_of_what_is_written_to_them() -> None:
    # each stream is written by complementary halves, so that the second block of every stage reads all channels, and
    # so does the first one of the next stage: the first convolutions cost a half, the second ones a quarter
    network = _resnet18()
    chain = [name for name, module in network.named_children() if hasattr(module, "shortcut")]
    _keep_the_last(network, *(f"{name}.body.2.0" for name in chain[::2]))
    firsts = 2 * FULL + 3 * (STRIDED + FULL)
    bound = (firsts + 3 * SHORTCUT + STEM) // 2 + 8 * FULL // 4 + LINEAR
    assert round(bound / 1e9, 3) == 0.202
    # only the stem feeds the very first block
    assert _path(network) == bound - FULL // 4 == 192_779_264


def test_a_whole_stem_and_whole_shortcuts_feed_everything() -> None:
    expected = (2 * FULL + 3 * (STRIDED + FULL)) // 2 + 8 * FULL // 4 + 3 * SHORTCUT + STEM + LINEAR
    assert _path(_resnet18(everywhere=False)) == expected == 206_246_912


def test_a_chain_is_a_network_of_half_the_width() -> None:
    masked = build_backbone("small_cnn", MaskedLayers(0.5, "weights"), **SHAPE, width=8)
    mask_the_rest(masked, 0.5, "weights")
    for _, conv in masked_convolutions(masked):
        assert conv.kept is not None
        conv.kept.copy_(conv.kept[torch.randperm(len(conv.kept))])
    x = torch.rand(1, 3, 16, 16)
    narrow = counts(build_expert("small_cnn", **SHAPE, width=8, scale=0.5), x)
    found = counts(MixtureOfExperts(None, [masked]), x)
    assert (found.path_macs, found.active_parameters) == (narrow.path_macs, narrow.active_parameters)


def test_scores_are_held_but_not_part_of_the_answer() -> None:
    networks = [
        build_backbone("small_cnn", MaskedLayers(1.0, phase), **SHAPE, width=8) for phase in ("mask", "weights")
    ]
    learned, fixed = (counts(MixtureOfExperts(None, [network]), torch.rand(1, 3, 16, 16)) for network in networks)
    assert learned.active_parameters == fixed.active_parameters == fixed.parameters < learned.parameters


def _varying(network: nn.Module, images: Tensor) -> int:
    """Multiply-adds of what changes between `images`, from the features themselves."""
    total = 0

    def see(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        dim = -1 if isinstance(layer, nn.Linear) else 1

        def alive(features: Tensor) -> int:
            channels = features.movedim(dim, 0).reshape(features.shape[dim], len(features), -1)
            return int((channels.std(1).amax(1) > 1e-10 * channels.abs().amax()).sum())

        positions = output[0].numel() // output.shape[dim]
        total += positions * alive(given[0]) * alive(output) * layer.weight[0, 0].numel()

    hooks = [
        module.register_forward_hook(see)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear | MaskedConv2d)
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("backbone", SMALL)
def test_alive_is_what_changes_with_the_image(backbone: str, everywhere: bool) -> None:
    torch.manual_seed(0)
    network = build_backbone(backbone, MaskedLayers(0.3), **SHAPE, **SMALL[backbone]).double().eval()
    if everywhere:
        mask_the_rest(network, 0.3)
        network.double()
    # a ReLU that happens to be off says nothing of the mask: from bright images positive weights lead to no such one
    for parameter in network.parameters():
        parameter.data.abs_()
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64) / 2 + 0.5
    dense = macs(lambda: network(images[:1]))[1]
    assert dense - spared(network, network, images[:1]).macs == _varying(network, images) < dense


def test_networks_without_masks_are_not_asked() -> None:
    def never(x: Tensor) -> None:
        raise AssertionError

    assert spared(build_expert("small_cnn", **SHAPE), never, X) == (0, 0)


def test_the_model_is_left_as_it_was() -> None:
    network = build_backbone("small_cnn", MaskedLayers(0.5), **SHAPE, width=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _path(network, torch.rand(1, 3, 16, 16))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training and not any(module._forward_hooks for module in network.modules())
