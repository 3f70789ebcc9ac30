"""Run every expert once, on the images that chose it."""

# B batch, E experts, K selected, C classes, A = B*K assignments

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phalanx.routing.route import Route
from phalanx.routing.stats import assignment_counts

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


def _run(expert: nn.Module, x: Tensor) -> Tensor:
    if expert.training and len(x) < MIN_BATCHNORM_GROUP:
        with _running_statistics(expert):
            return expert(x)  # type: ignore[no-any-return]
    return expert(x)  # type: ignore[no-any-return]


def _all_experts(experts: Sequence[nn.Module], x: Tensor, route: Route) -> Tensor:
    outputs_BEC = torch.stack([_run(expert, x) for expert in experts], dim=1)
    weights_BE = torch.zeros_like(route.scores, dtype=route.weights.dtype)
    weights_BE = weights_BE.scatter(-1, route.experts, route.weights)
    return (weights_BE[..., None] * outputs_BEC).sum(1)


def dispatch(experts: Sequence[nn.Module], x: Tensor, route: Route) -> Tensor:
    """sum_k weights[:, k] * experts[k](x) for x (B, ...), as logits (B, C).

    Costs K experts per image whatever E is: the assignments are sorted by expert, each expert runs once on its group,
    and the answers are put back in order. Equal to the one-by-one loop in value and gradient in evaluation mode. One
    device-to-host wait (the group sizes), none where all experts or the only one run anyway.
    """
    selected = route.experts.shape[1]
    if len(experts) == 1:
        return route.weights * _run(experts[0], x)
    if selected == len(experts):
        return _all_experts(experts, x, route)
    assignment_A = route.experts.flatten()
    order_A = assignment_A.argsort(stable=True)
    sizes = assignment_counts(route.experts, len(experts)).tolist()
    sources_A = order_A if selected == 1 else order_A // selected
    groups = torch.split(x.index_select(0, sources_A), sizes)
    outputs = [_run(expert, group) for expert, group in zip(experts, groups, strict=True) if len(group)]
    if not outputs:
        outputs = [_run(experts[0], x)]
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    outputs_AC = torch.cat(outputs).index_select(0, back_A)
    outputs_BKC = outputs_AC.reshape(len(x), selected, *outputs_AC.shape[1:])
    return (route.weights[..., None] * outputs_BKC).sum(1)
