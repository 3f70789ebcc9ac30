"""Contexts that borrow a model, or global state, and give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# the older allow_tf32 flags raise once the caller has set any of these, and know nothing of the CPU's bf16
_BACKENDS: Any = torch.backends
_FP32_BACKENDS = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)


@contextmanager
def frozen(model: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; on leaving, every submodule's mode and every parameter's
    `requires_grad` are what they were (a partly frozen model stays partly frozen).

    A callable that is no module is left alone.
    """
    with frozen_except(model, ()):
        yield


@contextmanager
def frozen_except(model: Callable[..., Any], moving: Iterable[nn.Parameter]) -> Iterator[None]:
    """As `frozen`, but for one player of a model: the parameters `moving`, and the largest submodules that hold no
    others, stay as they are. What belongs to nobody, such as dropout between two players' parts, is frozen."""
    if not isinstance(model, nn.Module):
        yield
        return
    theirs = {id(parameter) for parameter in moving}
    own = set(_held_alone(model, theirs)) if theirs else set()
    modes = [(module, module.training) for module in model.modules() if module not in own]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters() if id(parameter) not in theirs]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _held_alone(module: nn.Module, parameters: set[int]) -> Iterator[nn.Module]:
    """Every part of the largest submodules that have parameters, all of them among `parameters`."""
    held = [id(parameter) in parameters for parameter in module.parameters()]
    if held and all(held):
        yield from module.modules()
    elif any(held):
        for child in module.children():
            yield from _held_alone(child, parameters)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Torch's global random state (CPU and every visible CUDA device) is the same after as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Autocast, TF32 and bf16 matrix products off: what verdicts and the search for them are computed in."""
    before = [(backend, backend.fp32_precision) for backend in _FP32_BACKENDS]
    try:
        for backend in _FP32_BACKENDS:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision
