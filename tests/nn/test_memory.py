# E experts

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phalanx.experts import build_expert
from phalanx.nn import memory
from phalanx.nn.memory import StepMemory, available_bytes, bytes_kept_by_attack, bytes_kept_by_update, tensor_bytes

CPU = torch.device("cpu")
IMAGE = torch.full((1, 1, 8, 8), 0.5)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def _cnn() -> nn.Module:
    return build_expert("small_cnn", num_classes=10, image_size=8, channels=1).train()


def test_activations_by_hand() -> None:
    # float32: the 4 inputs, and the 3 outputs of the ReLU, kept by it and by the next layer but once
    assert bytes_kept_by_update(_network(), torch.ones(1, 4)) == 4 * 4 + 3 * 4
    assert bytes_kept_by_update(_network().double(), torch.ones(1, 4).double()) == 8 * 4 + 3 * 8
    # the image's gradient needs the ReLU's alone
    assert bytes_kept_by_attack(_network(), torch.ones(1, 4)) == 3 * 4


def test_what_wants_no_gradient_keeps_nothing() -> None:
    frozen = _network().requires_grad_(False)
    assert bytes_kept_by_update(frozen, torch.ones(1, 4)) == 0
    assert bytes_kept_by_attack(frozen, torch.ones(1, 4)) == 3 * 4
    with torch.no_grad():
        assert bytes_kept_by_update(_network(), torch.ones(1, 4)) == 28


def test_images_add_up_and_weights_do_not_count() -> None:
    network = _cnn()
    for count in (bytes_kept_by_update, bytes_kept_by_attack):
        one = count(network, IMAGE)
        assert one > 0
        # BatchNorm's few numbers for the whole batch are all that does not grow with it
        assert count(network, IMAGE.expand(16, 1, 8, 8).contiguous()) == pytest.approx(16 * one, rel=0.02)
    assert bytes_kept_by_attack(network, IMAGE) < bytes_kept_by_update(network, IMAGE)


def test_counting_changes_nothing() -> None:
    network = nn.Sequential(_cnn(), nn.Dropout(0.5)).train()
    network[0].eval()
    next(network.parameters()).requires_grad_(False)
    image = IMAGE.clone()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags = [module.training for module in network.modules()] + [p.requires_grad for p in network.parameters()]
    random = torch.get_rng_state()
    bytes_kept_by_update(network, image)
    bytes_kept_by_attack(network, image)
    assert flags == [m.training for m in network.modules()] + [p.requires_grad for p in network.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.get_rng_state()) and not image.requires_grad


NEED: dict[str, Any] = {"shared": 1, "state": 10, "update": 100, "attack": 30, "folded": 4, "gradients": 5}


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 1 + 3 * 10 + 3 * 100),
        # one expert answers: one batch of activations in all
        ({"answering": 1}, 1 + 3 * 10 + 100),
        # checkpointed: one expert's activations at a time, so that the attack, which keeps all, is the peak
        ({"checkpoint": True}, 1 + 3 * 10 + 3 * 30 + 3 * 4),
        ({"checkpoint": True, "attack": 0, "folded": 0}, 1 + 3 * 10 + 100),
        # narrow activations: gradients are what is most
        ({"update": 0, "attack": 0, "folded": 0}, 1 + 3 * 10 + 3 * 5),
    ],
)
def test_a_step_by_hand(changes: dict[str, Any], total: int) -> None:
    need = StepMemory(**{"experts": 3, "answering": 3, "checkpoint": False, **NEED, **changes})
    assert need.total == total


def test_how_many_fit() -> None:
    need = StepMemory(experts=9, answering=9, checkpoint=False, **NEED)
    assert [need.fitting(have) for have in (10**6, 1 + 9 * 110, 9 * 110, 1 + 4 * 110, 110)] == [9, 9, 8, 4, 0]
    # of a hard gate only the weights depend on the number
    assert replace(need, answering=1).fitting(1 + 5 * 10 + 100) == 5


def test_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:       65000000 kB\nMemFree:         1000000 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", said)
    assert available_bytes(CPU) == 2_000_000 * 1024
    said.write_text("MemTotal:       65000000 kB\n")
    assert available_bytes(CPU) is None
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "nothing")
    assert available_bytes(CPU) is None
    assert available_bytes(torch.device("meta")) is None


def test_tensors_are_measured_in_bytes() -> None:
    assert tensor_bytes([torch.zeros(3, 2), torch.zeros(4, dtype=torch.float64), torch.zeros(5, dtype=torch.bool)]) == (
        24 + 32 + 5
    )
