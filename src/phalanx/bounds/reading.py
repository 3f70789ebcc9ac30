"""Read a network into stages that bounds are known for; anything else is refused by name, never guessed at."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.bounds.stages import (
    Affine,
    AveragePool,
    ChannelScale,
    Convolution,
    Dense,
    MaxPool,
    Relu,
    Residual,
    Shape,
    SortedPairs,
    Stage,
)
from phalanx.errors import InputError
from phalanx.nn import Chain, ConvBN, LipschitzConv2d, LipschitzLinear, MaxMin, Normalize

Blocks = Mapping[type[nn.Module], Callable[[Any], tuple[nn.Module, nn.Module]]]
"""Residual blocks by type: what gives (body, shortcut) of relu(body(x) + shortcut(x))."""

_CHAINS: tuple[type[nn.Module], ...] = (nn.Sequential, Chain, ConvBN)
_NOTHING: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout2d)


def read_network(
    network: nn.Module,
    shape: Shape,
    *,
    where: str = "",
    chains: Collection[type[nn.Module]] = (),
    blocks: Blocks | None = None,
    trained: bool = False,
) -> tuple[Stage, ...]:
    """The stages of a network in evaluation mode, features (N, *shape) in, float64, with normalisations folded in.

    Args:
        where: the network's path in its model, for messages.
        chains: more types that are nothing but their layers one after the other.
        blocks: how to read residual blocks.
        trained: for a loss instead of a certificate: a network in training mode is read as it is in evaluation mode, in
            its own precision, and the stages carry gradient to its parameters. Residual blocks cannot be.

    Exact types only, since a subclass may compute more. Raises InputError naming the layer and its path for one that
    is not known, has hooks or is in training mode.
    """
    like = next(network.parameters(), torch.empty(0))
    with nullcontext() if trained else torch.no_grad():
        known = {} if trained else blocks or {}
        stages = _folded(list(_read(network, shape, where, (*_CHAINS, *chains), known, trained)))
        return tuple(_like(stage, like if trained else like.double()) for stage in stages)


def _like(stage: Any, like: Tensor) -> Stage:
    """With its tensors on the device and in the precision of `like`."""
    if isinstance(stage, Residual):
        body, shortcut = (tuple(_like(part, like) for part in branch) for branch in (stage.body, stage.shortcut))
        return replace(stage, body=body, shortcut=shortcut)
    held = {each.name: getattr(stage, each.name) for each in fields(stage)}
    moved: Stage = replace(stage, **{name: value.to(like) for name, value in held.items() if isinstance(value, Tensor)})
    return moved


def _read(
    module: nn.Module, shape: Shape, where: str, chains: tuple[type[nn.Module], ...], blocks: Blocks, trained: bool
) -> Iterator[Stage]:
    _check(module, where, trained)
    if type(module) in chains:
        for name, child in module._modules.items():
            assert child is not None
            for stage in _read(child, shape, f"{where}.{name}".lstrip("."), chains, blocks, trained):
                yield stage
                shape = stage.out_shape
    elif type(module) in blocks:
        body, shortcut = blocks[type(module)](module)
        parts = [
            tuple(_folded(list(_read(part, shape, f"{where}.{name}", chains, blocks, trained))))
            for name, part in (("body", body), ("shortcut", shortcut))
        ]
        out_shape = parts[0][-1].out_shape
        yield Residual(parts[0], parts[1], out_shape)
        yield Relu(out_shape)
    elif not _does_nothing(module):
        yield _stage(module, shape, where)


def _does_nothing(module: nn.Module) -> bool:
    """What leaves features as they are, or flattens them: a linear layer does that itself."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    return type(module) in _NOTHING


def _check(module: nn.Module, where: str, trained: bool) -> None:
    if module.training and not trained:
        raise InputError(
            f"{where or 'the network'} is in training mode, where an answer depends on the batch; eval() it"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError(f"{where or 'the network'} has a forward hook, which may change what it computes; remove it")


def _stage(module: Any, shape: Shape, where: str) -> Stage:
    kind = type(module)
    if kind is Normalize and module.std.numel() == shape[0]:
        scale = module.std.double().flatten().reciprocal()
        return ChannelScale(scale, -module.mean.double().flatten() * scale, shape)
    if kind in (nn.Linear, LipschitzLinear):
        weight = _exact(module.weight)
        _check_size(weight, math.prod(shape), where)
        return Dense(weight, _bias(module, len(weight)), shape)
    if kind in (nn.Conv2d, LipschitzConv2d):
        _check_size(module.weight, shape[0], where)
    if kind is nn.Conv2d:
        return _convolution(module, shape, where)
    if kind is LipschitzConv2d:
        kernel = _exact(module.weight)
        return Convolution(kernel, _bias(module, len(kernel)), module.stride, module.padding, shape)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None and module.num_features == shape[0]:
        scale = (module.running_var.double() + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * _exact(module.weight)
        shift = -module.running_mean.double() * scale
        return ChannelScale(scale, shift if module.bias is None else shift + _exact(module.bias), shape)
    if kind is nn.ReLU:
        return Relu(shape)
    if kind is MaxMin and shape[0] % 2 == 0:
        return SortedPairs(shape)
    if kind is nn.AdaptiveAvgPool2d or (kind is nn.AvgPool2d and _plain_average(module)):
        return _average(module, shape)
    if kind is nn.MaxPool2d and _plain_maximum(module):
        return MaxPool(module.kernel_size, shape)
    raise InputError(
        f"no bound is known for {where or 'the network'}, which is {module}; bounds are known for chains of linear, "
        "convolutional, BatchNorm, ReLU and pooling layers, such as the experts mlp and small_cnn"
    )


def _check_size(weight: Tensor, given: int, where: str) -> None:
    """Raises InputError unless a layer's weight (O, I, ...) takes what it is given."""
    if weight.shape[1] != given:
        raise InputError(
            f"{where or 'the network'} takes {weight.shape[1]} features or channels and would be given {given}; the "
            "images have another shape than those that the network was built for"
        )


def _exact(parameter: Tensor) -> Tensor:
    """In float64; a parameter that is in it already must not bring its gradient along where none is wanted."""
    return parameter.double() if torch.is_grad_enabled() else parameter.detach().double()


def _plain_average(module: nn.AvgPool2d) -> bool:
    return module.padding in (0, (0, 0)) and not module.ceil_mode and module.divisor_override is None


def _plain_maximum(module: nn.MaxPool2d) -> bool:
    apart = isinstance(module.kernel_size, int) and module.stride == module.kernel_size
    return apart and (module.padding, module.dilation) == (0, 1) and not (module.ceil_mode or module.return_indices)


def _bias(module: Any, outputs: int) -> Tensor:
    if module.bias is None:
        return torch.zeros(outputs, dtype=torch.float64, device=module.weight.device)
    bias: Tensor = _exact(module.bias)
    return bias


def _convolution(module: nn.Conv2d, shape: Shape, where: str) -> Convolution:
    strides, paddings = set(module.stride), set(module.padding)
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not plain or len(strides) > 1 or len(paddings) > 1 or isinstance(module.padding, str):
        raise InputError(
            f"no bound is known for {where}: a convolution must have one group, no dilation, zero padding and the same "
            f"stride and padding in both directions, got {module}"
        )
    padding = paddings.pop()
    assert isinstance(padding, int)
    kernel = _exact(module.weight)
    return Convolution(kernel, _bias(module, len(kernel)), strides.pop(), padding, shape)


def _average(module: Any, shape: Shape) -> AveragePool:
    """Both directions are read off the layer itself, one row and one column at a time."""
    height, width = shape[1:]
    eye = torch.eye(max(height, width), dtype=torch.float64)
    # the average over a window is the product of the averages over its sides
    rows = module(eye[:height, :height, None].expand(height, height, width)[:, None])[:, 0, :, 0].T
    columns = module(eye[:width, None, :width].expand(width, height, width)[:, None])[:, 0, 0, :].T
    return AveragePool(rows.contiguous(), columns.contiguous(), shape)


def _folded(stages: list[Stage]) -> list[Stage]:
    """With every per-channel scale merged into the linear layer before or after it, where that is exact."""
    done: list[Stage] = []
    for stage in stages:
        before = done[-1] if done else None
        if isinstance(stage, ChannelScale) and isinstance(before, Dense | Convolution):
            done[-1] = _scaled_after(before, stage)
        elif isinstance(before, ChannelScale) and isinstance(stage, Dense):
            done[-1] = _scaled_before(before, stage)
        elif isinstance(before, ChannelScale) and isinstance(stage, Convolution) and bool((before.scale != 0).all()):
            # the shift stays: zero padding comes after it
            done[-1] = replace(before, scale=torch.ones_like(before.scale), shift=before.shift / before.scale)
            done.append(replace(stage, kernel=stage.kernel * before.scale[:, None, None]))
        else:
            done.append(stage)
    return done


def _scaled_after(stage: Dense | Convolution, norm: ChannelScale) -> Affine:
    bias = stage.bias * norm.scale + norm.shift
    if isinstance(stage, Dense):
        return replace(stage, weight=stage.weight * norm.scale[:, None], bias=bias)
    return replace(stage, kernel=stage.kernel * norm.scale[:, None, None, None], bias=bias)


def _scaled_before(norm: ChannelScale, stage: Dense) -> Dense:
    per_channel = stage.weight.shape[1] // len(norm.scale)
    scale, shift = norm.scale.repeat_interleave(per_channel), norm.shift.repeat_interleave(per_channel)
    return Dense(stage.weight * scale, stage.bias + stage.weight @ shift, stage.in_shape)
