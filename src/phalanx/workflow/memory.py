"""Will a training step fit into memory? Said before the first one."""

from __future__ import annotations

import torch
from torch import nn

from phalanx.config import AssembledConfig, RunConfig
from phalanx.data import Splits
from phalanx.errors import InputError
from phalanx.nn import spec_of
from phalanx.nn.memory import StepMemory, available_bytes, bytes_kept_by_attack, bytes_kept_by_update, tensor_bytes
from phalanx.routing import MixtureOfExperts, SynergyOfExperts

IMAGES_IN_UPDATE = {"dwf": 3, "trades": 2}
"""Images that an update keeps activations of, for each image of its batch; every other method keeps one at least."""

GIB = 2**30


def check_memory(
    model: nn.Module, config: RunConfig, data: Splits, device: torch.device, available: int | None = None
) -> None:
    """Raises InputError if a step needs clearly more than `device` has, saying how many experts fit.

    Args:
        model: still on the CPU.
        available: bytes there are; by default what the device says. Nothing is refused where it does not say.
    """
    have = available_bytes(device) if available is None else available
    if have is None:
        return
    need = step_memory(model, config, data, on_gpu=device.type != "cpu")
    if need.total > have:
        raise InputError(
            f"a training step needs {need.total / GIB:.1f} GiB at least, {device} has {have / GIB:.1f} GiB: "
            f"{need.fitting(have)} of {need.experts} experts fit; {_ways_out(config, need)}"
        )


def _ways_out(config: RunConfig, need: StepMemory) -> str:
    again = isinstance(config.model, AssembledConfig) and not need.checkpoint and need.update > need.attack
    smaller = f"lower training.batch_size ({config.training.batch_size}) or take narrower experts"
    return f"set model.checkpoint=true, {smaller}" if again else smaller


def step_memory(model: nn.Module, config: RunConfig, data: Splits, *, on_gpu: bool) -> StepMemory:
    """What a step of `config` needs besides what `model`, on the CPU, takes already; mean over experts."""
    banks = [part for part in model.modules() if isinstance(part, MixtureOfExperts | SynergyOfExperts)]
    experts = [expert for bank in banks for expert in bank.experts] or [model]
    answering = sum(bank.top_k if isinstance(bank, MixtureOfExperts) else len(bank.experts) for bank in banks)
    update, attack = _activations(experts, config, data)
    inside = {id(parameter) for expert in experts for parameter in expert.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    own = [parameter for expert in experts for parameter in expert.parameters()]
    return StepMemory(
        experts=len(experts),
        answering=answering or 1,
        shared=_state(others, config, on_gpu),
        state=_state(own, config, on_gpu) // len(experts),
        update=update,
        attack=attack,
        folded=tensor_bytes(own) // len(experts) if attack else 0,
        gradients=tensor_bytes(p for p in own if p.requires_grad) // len(experts),
        checkpoint=any(isinstance(bank, MixtureOfExperts) and bank.checkpoint for bank in banks),
    )


def _state(parameters: list[nn.Parameter], config: RunConfig, on_gpu: bool) -> int:
    """Bytes of weights, unless they are where they stay, of their average, and of the optimizer's state."""
    optimizer = config.training.optimizer
    moments = 2 if optimizer.name == "adam" else 1 if optimizer.momentum else 0
    moving = tensor_bytes(parameter for parameter in parameters if parameter.requires_grad)
    return tensor_bytes(parameters) * (on_gpu + (config.training.ema_decay is not None)) + moving * moments


def _activations(experts: list[nn.Module], config: RunConfig, data: Splits) -> tuple[int, int]:
    """Bytes that the update and the attack keep of one expert for a batch, the mean over experts."""
    image = torch.full((1, *data.shape), 0.5)
    # bf16 halves nearly all of it
    images = config.training.batch_size / (2 if config.training.precision == "bf16" else 1)
    seen: dict[object, tuple[int, int]] = {}
    found = []
    for expert in experts:
        spec = spec_of(expert)
        kind = id(expert) if spec is None else (str(spec.to_json()), any(p.requires_grad for p in expert.parameters()))
        if kind not in seen:
            # only standard training attacks nothing
            attack = 0 if config.method.name == "st" else bytes_kept_by_attack(expert, image)
            seen[kind] = bytes_kept_by_update(expert, image), attack
        found.append(seen[kind])
    updates, attacks = zip(*found, strict=True)
    times = IMAGES_IN_UPDATE.get(config.method.name, 1)
    return round(images * times * sum(updates) / len(experts)), round(images * sum(attacks) / len(experts))
