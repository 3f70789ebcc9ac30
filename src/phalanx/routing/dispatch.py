"""Run every expert once, on the images that chose it."""

# B batch, E experts, K selected, C classes, A = B*K assignments

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from phalanx.routing.assignment import inverse
from phalanx.routing.route import Route
from phalanx.routing.stats import assignment_counts, weights_by_expert

MIN_BATCHNORM_GROUP = 8
"""A training group smaller than this is normalised by the running statistics and leaves them alone: the mean and
variance of a handful of images are noise, and of a single one undefined."""


@contextmanager
def _running_statistics(expert: nn.Module) -> Iterator[None]:
    norms = [m for m in expert.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@contextmanager
def _spare_buffers(expert: nn.Module) -> Iterator[None]:
    """Inside, `expert` writes to copies of its buffers: the pass has moved BatchNorm's statistics once already."""
    held = [
        (module, name, buffer)
        for module in expert.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module, name, buffer in held:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer


def _once(expert: nn.Module, x: Tensor) -> Tensor:
    if expert.training and len(x) < MIN_BATCHNORM_GROUP:
        with _running_statistics(expert):
            return expert(x)  # type: ignore[no-any-return]
    return expert(x)  # type: ignore[no-any-return]


def _run(expert: nn.Module, x: Tensor, checkpoint: bool) -> Tensor:
    if not (checkpoint and expert.training):
        return _once(expert, x)
    return torch.utils.checkpoint.checkpoint(
        _once, expert, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _spare_buffers(expert))
    )


def _all_experts(experts: Sequence[nn.Module], x: Tensor, route: Route, checkpoint: bool) -> Tensor:
    outputs_BEC = torch.stack([_run(expert, x, checkpoint) for expert in experts], dim=1)
    return (weights_by_expert(route)[..., None] * outputs_BEC).sum(1)


def dispatch(experts: Sequence[nn.Module], x: Tensor, route: Route, *, checkpoint: bool = False) -> Tensor:
    """sum_k weights[:, k] * experts[k](x) for x (B, ...), as logits (B, C).

    Costs K experts per image whatever E is: the assignments are sorted by expert, each expert runs once on its group,
    and the answers are put back in order. Equal to the one-by-one loop in value and gradient in evaluation mode. One
    device-to-host wait (the group sizes), none where all experts or the only one run anyway.

    With `checkpoint`, an expert in training mode under gradients keeps its input alone and runs again in the backward
    pass (Chen et al. 2016): the activations of one expert live at a time, for one more forward. Values, gradients,
    dropout masks and BatchNorm's statistics are those of the plain pass.
    """
    selected = route.experts.shape[1]
    if len(experts) == 1:
        return route.weights * _run(experts[0], x, checkpoint)
    if selected == len(experts):
        return _all_experts(experts, x, route, checkpoint)
    assignment_A = route.experts.flatten()
    order_A = assignment_A.argsort(stable=True)
    sizes = assignment_counts(route.experts, len(experts)).tolist()
    sources_A = order_A if selected == 1 else order_A // selected
    groups = torch.split(x.index_select(0, sources_A), sizes)
    outputs = [_run(expert, group, checkpoint) for expert, group in zip(experts, groups, strict=True) if len(group)]
    if not outputs:
        outputs = [_run(experts[0], x, checkpoint)]
    outputs_AC = torch.cat(outputs).index_select(0, inverse(order_A))
    outputs_BKC = outputs_AC.reshape(len(x), selected, *outputs_AC.shape[1:])
    return (route.weights[..., None] * outputs_BKC).sum(1)
