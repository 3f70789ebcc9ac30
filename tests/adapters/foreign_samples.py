"""What the adapters' tests share: models of ours, and images with the models' own answers as labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from phalanx.routing import DualModel, Ensemble
from tiny import digits, mixture

EPS = 0.1


def network() -> nn.Module:
    """One of our experts by itself."""
    expert: nn.Module = mixture(1, expert="small_cnn").experts[0]
    return expert


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "top-1": lambda: mixture(3, 1),
    "top-2": lambda: mixture(3, 2),
    "soft": lambda: mixture(3, "all"),
    "dual": lambda: DualModel(mixture(1), mixture(2, 1, seed=1), 0.5),
    "ensemble": lambda: Ensemble([mixture(1), mixture(1, seed=1)]),
}


@lru_cache
def model(name: str) -> nn.Module:
    """Untrained, in evaluation mode."""
    return MODELS[name]().eval()


def images(name: str, n: int = 8) -> tuple[Tensor, Tensor]:
    """Images, and the model's own answers to them."""
    x = next(iter(digits().test.batches(n))).x
    with torch.no_grad():
        return x, model(name)(x).argmax(-1)


def untouched(before: dict[str, Tensor], after: nn.Module) -> bool:
    """Whether weights, buffers and modes are what they were."""
    return not any(part.training for part in after.modules()) and all(
        torch.equal(before[name], tensor) for name, tensor in after.state_dict().items()
    )


def snapshot(of: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}
