"""Memory: what a training step keeps in it, said before the step is taken; and what to do where it does not suffice."""

# E experts

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phalanx.errors import InputError
from phalanx.nn.folding import fold_batchnorm
from phalanx.nn.frozen import frozen, preserved_rng

T = TypeVar("T")

MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on `device`; None where that is unknown.

    CUDA: what the driver has left and what torch holds without using it. CPU: the kernel's MemAvailable.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def attempted(work: Callable[[], T]) -> tuple[T] | None:
    """What `work` gives, None where the memory did not suffice."""
    try:
        return (work(),)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        # the CPU's allocator has no error of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return None


class RoomForWeights(TorchFunctionMode):
    """Inside, weights that would be more than `available` bytes are refused before they are allocated: a system that
    promises memory it does not have would end the process when they are written. None refuses nothing."""

    def __init__(self, available: int | None) -> None:
        super().__init__()
        self.left = math.inf if available is None else available

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # what torch's layers make their parameters with
        if func is torch.empty and args:
            shape = args if isinstance(args[0], int) else args[0]
            self.left -= 4 * math.prod(shape)
            if self.left < 0:
                raise InputError("its weights do not fit into the memory; take fewer or narrower experts")
        return func(*args, **(kwargs or {}))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Their size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_kept_by_update(network: nn.Module, image: Tensor) -> int:
    """Bytes that a forward pass of one image (1, C, H, W) keeps for the gradient of the network's parameters: 0 where
    none wants one. Mode, gradients and random state are left alone; BatchNorm sees nothing."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    with frozen(network), preserved_rng():
        # one image is no batch for BatchNorm's own statistics, and what is kept is the same with the running ones
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        return _kept(network, image)


def bytes_kept_by_attack(network: nn.Module, image: Tensor) -> int:
    """The same for the gradient with respect to the image, of the frozen network with its BatchNorm folded as in
    training."""
    with frozen(network), preserved_rng():
        return _kept(fold_batchnorm(network, certain=True) or network, image.detach().clone().requires_grad_())


def _kept(network: nn.Module, image: Tensor) -> int:
    """Counted once by storage, and without the network's own tensors, which a batch shares."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # held until the end, so that no address is given out twice
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a training step of a mixture of E experts needs: a lower bound.

    Weights, optimizer state and average, and the most of three that come one after the other: what the attack keeps,
    what the update keeps, the gradients. Temporary buffers and the data are not in it.
    """

    experts: int
    """E."""
    answering: int
    """How many of them answer for each image."""
    shared: int
    """Weights of everything but the experts, with optimizer state and average."""
    state: int
    """The same of one expert."""
    update: int
    """Activations of one expert that the update keeps for a batch."""
    attack: int
    """Activations of one expert that the attack keeps for a batch."""
    folded: int
    """Weights of one expert, which the attack copies."""
    gradients: int
    """Of one expert's weights."""
    checkpoint: bool
    """The update keeps the activations of one expert at a time."""

    def needed(self, experts: int) -> int:
        """Bytes for this many experts of the kind."""
        soft = self.answering == self.experts
        answering = experts if soft else min(self.answering, experts)
        update = self.update * answering // (experts if self.checkpoint else 1)
        attack = self.attack * answering + self.folded * experts
        return self.shared + experts * self.state + max(attack, update, experts * self.gradients)

    @property
    def total(self) -> int:
        """Bytes for the experts there are."""
        return self.needed(self.experts)

    def fitting(self, available: int) -> int:
        """How many experts fit, at most E."""
        return next((count for count in range(self.experts, 0, -1) if self.needed(count) <= available), 0)
