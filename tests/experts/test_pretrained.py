"""Networks of timm: never downloaded, weights from a file, images of any size they can take."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from phalanx.errors import InputError
from phalanx.experts import build_expert, weights_sha256
from phalanx.nn import Normalize, spec_of

SHAPE: dict[str, Any] = {"num_classes": 4, "image_size": 16, "channels": 1}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm, without a network to download from."""
    found = pytest.importorskip("timm")

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return found


@pytest.fixture
def weights(timm: Any, tmp_path: Path) -> Path:
    """A small network's weights, as others publish them: without normalisation."""
    path = tmp_path / "net.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict(), path)
    return path


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"need timm \(.*\); install it with: pip install phalanx\[vision\]"):
        build_expert("timm:resnet18", **SHAPE)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv2_035"])
def test_pixels_in_logits_out(timm: Any, name: str) -> None:
    expert = build_expert(f"timm:{name}", **SHAPE, mean=[0.2], std=[0.5]).eval()
    x = torch.rand(3, 1, 16, 16)
    assert isinstance(expert[0], Normalize)
    torch.testing.assert_close(expert(x), expert[1]((x - 0.2) / 0.5))
    assert expert(x).shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "stem", "pool"), [("resnet18", "conv1", "maxpool"), ("test_resnet", "conv1.0", "maxpool")]
)
def test_the_small_stem_keeps_the_resolution(timm: Any, name: str, stem: str, pool: str) -> None:
    network = build_expert(f"timm:{name}", **SHAPE, stem="small")[1]
    first = network.get_submodule(stem)
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(network.get_submodule(pool), nn.Identity)
    assert all(module.training for module in network.modules())


def test_resnet18_with_the_small_stem_is_the_one_of_the_literature(timm: Any) -> None:
    expert = build_expert("timm:resnet18", num_classes=10, image_size=32, stem="small")
    ours = build_expert("resnet18", num_classes=10, image_size=32)
    assert sum(p.numel() for p in expert.parameters()) == sum(p.numel() for p in ours.parameters()) == 11_173_962


def test_the_weights_are_those_of_the_file(timm: Any, weights: Path) -> None:
    expert = build_expert("timm:test_resnet", **SHAPE, weights=str(weights))
    again = build_expert("timm:test_resnet", **SHAPE, weights=str(weights))
    for (name, mine), theirs in zip(expert.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert len(weights_sha256(str(weights))) == 64


def test_to_rebuild_it_takes_no_file(timm: Any, weights: Path) -> None:
    expert = build_expert("timm:test_resnet", **SHAPE, stem="imagenet", weights=str(weights))
    weights.unlink()
    spec = spec_of(expert)
    assert spec is not None and spec.name == "expert.timm:test_resnet"
    assert spec.arguments == {**SHAPE, "mean": None, "std": None, "stem": "imagenet"}
    build_expert("timm:test_resnet", **spec.arguments).load_state_dict(expert.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "timm has no model 'resnet19'; did you mean resnet1"),
        ("hf-hub:timm/resnet18", {}, "timm has no model 'hf-hub:timm/resnet18'"),
        ("test_resnet", {"width": 3}, "expert 'timm:test_resnet' has no option 'width'; it has stem, weights"),
        ("test_resnet", {"stem": "tiny"}, "stem must be one of small, imagenet, got 'tiny'"),
        ("test_vit", {"stem": "small"}, "timm:test_vit has no first convolution of stride 2"),
        ("test_vit", {"image_size": 8}, "timm:test_vit cannot classify 1 x 8 x 8 images into 4 classes"),
        ("test_resnet", {"weights": "nowhere.safetensors"}, "weights nowhere.safetensors cannot be read (No such file"),
        ("test_resnet", {"weights": "net.pth"}, "weights must be a .safetensors file, got net.pth"),
    ],
)
def test_errors_say_what_and_what_to_do(timm: Any, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_expert(f"timm:{name}", **{**SHAPE, **options})


def test_weights_that_cannot_be_used(timm: Any, weights: Path) -> None:
    tensors = timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict()
    with pytest.raises(InputError, match=r"does not fit timm:test_resnet with 7 classes and the imagenet stem: .*fc"):
        build_expert("timm:test_resnet", **{**SHAPE, "num_classes": 7}, weights=str(weights))
    save_file({**tensors, "fc.bias": torch.full((4,), torch.nan)}, weights)
    with pytest.raises(InputError, match=r"is not finite in fc.bias; fetch it again"):
        build_expert("timm:test_resnet", **SHAPE, weights=str(weights))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is no readable safetensors file"):
        build_expert("timm:test_resnet", **SHAPE, weights=str(weights))
