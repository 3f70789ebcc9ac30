from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_samples import LEAST, SMALL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from phalanx.errors import InputError
from phalanx.experts import EXPERTS, build_expert
from phalanx.nn import Normalize, spec_of

FACTORIES = """
from torch import nn

def tiny(num_classes, image_size, channels, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes, bias=bias))

def no_network(num_classes, image_size, channels):
    return "a string"

def short(num_classes):
    return tiny(num_classes, 8, 3)

number = 7
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks"


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 1), (8, 1), (5, 2)])
def test_pixels_in_logits_out(name: str, size: int, channels: int) -> None:
    size = max(size, LEAST[name])
    expert = build_expert(name, num_classes=7, image_size=size, channels=channels, **SMALL[name])
    x = torch.rand(3, channels, size, size, requires_grad=True)
    out = expert(x)
    assert out.shape == (3, 7)
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in expert.parameters())


@pytest.mark.parametrize("name", EXPERTS)
def test_normalisation_comes_first(name: str) -> None:
    expert = build_expert(name, num_classes=2, image_size=16, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), **SMALL[name])
    first = expert[0]
    assert isinstance(first, Normalize)
    torch.testing.assert_close(first.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert first.std.flatten().tolist() == [1.0, 2.0, 4.0]
    default = build_expert(name, num_classes=2, image_size=16, channels=1, **SMALL[name])[0]
    assert (float(default.mean), float(default.std)) == (0.5, 0.25)


def test_resnet18_is_the_one_of_the_literature() -> None:
    # multiply-adds: stem 32*32*64*27; stage 1 four times 32*32*64*576; in each later stage the first convolution costs
    # half of that, three as much, the 1x1 shortcut an 18th; linear 512*10
    one = 32 * 32 * 64 * 576
    expected = 32 * 32 * 64 * 27 + 4 * one + 3 * (one // 2 + 3 * one + one // 18) + 5120
    with torch.device("meta"):
        expert = build_expert("resnet18", num_classes=10, image_size=32).eval()
        with FlopCounterMode(display=False) as counter:
            expert(torch.empty(1, 3, 32, 32))
    assert sum(p.numel() for p in expert.parameters()) == 11_173_962
    assert counter.get_total_flops() == 2 * expected == 2 * 555_422_720


def test_the_spec_rebuilds_the_expert() -> None:
    arguments = {"num_classes": 4, "image_size": 8, "channels": 1, "width": 6}
    expert = build_expert("small_cnn", **arguments)
    spec = spec_of(expert)
    assert spec is not None and spec.name == "expert.small_cnn"
    assert spec.arguments == {**arguments, "mean": None, "std": None}
    again = build_expert(spec.name.removeprefix("expert."), **spec.arguments)
    again.load_state_dict(expert.state_dict())


def test_your_own_factory(own_module: str) -> None:
    expert = build_expert(
        f"{own_module}:tiny", num_classes=3, image_size=4, channels=1, mean=[0.0], std=[0.5], bias=False
    )
    x = torch.rand(2, 1, 4, 4)
    network = expert[1]
    assert isinstance(expert[0], Normalize) and network[1].bias is None
    torch.testing.assert_close(expert(x), network(x / 0.5))
    spec = spec_of(expert)
    assert spec is not None and spec.name == f"expert.{own_module}:tiny" and spec.arguments["bias"] is False


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "'timm:MODEL' or 'module:factory', got 'resnet19'"),
        ("mlp", {"width": 3}, "expert 'mlp' has no option 'width'; it has hidden"),
        ("resnet18", {"normalize": 1}, "expert 'resnet18' has no option 'normalize'; it has scale, width"),
        ("no_such_module:f", {}, "cannot import module 'no_such_module'"),
        (":f", {}, "expert ':f' must be 'module:function' with the module's full name"),
        (".near:f", {}, "expert '.near:f' must be 'module:function' with the module's full name"),
        ("own_networks:huge", {}, "module 'own_networks' has no 'huge'"),
        ("own_networks:", {}, "expert 'own_networks:' must be 'module:function'"),
        ("own_networks:number", {}, "must be a function that returns a network, got int"),
        ("own_networks:no_network", {}, "must return a torch.nn.Module, got str"),
        ("own_networks:short", {}, "is called with num_classes, image_size, channels, which it does not take"),
        ("own_networks:tiny", {"depth": 3}, "got an unexpected keyword argument 'depth'; it must be a function of"),
    ],
)
def test_errors_say_what_and_what_to_do(own_module: str, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_expert(name, num_classes=3, image_size=4, **options)


def test_an_error_inside_your_factory_is_named_and_kept(own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(own_module)

    def broken(**arguments: Any) -> nn.Module:
        raise TypeError("mine")

    monkeypatch.setattr(module, "tiny", broken)
    said = rf"failed with TypeError: mine \({re.escape(__file__)}:\d+\); try it by itself"
    with pytest.raises(InputError, match=said) as caught:
        build_expert(f"{own_module}:tiny", num_classes=3, image_size=4)
    assert isinstance(caught.value.__cause__, TypeError) and caught.value.key == "expert"
