"""What a route says about the mixture's health, and the loss that keeps it healthy."""

# B batch, E experts

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.routing.route import Route, RouteTree, leaves


def assignment_counts(experts_BK: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: how many of the selections (B, K) went to each expert; no device-to-host wait, unlike bincount."""
    experts_E1 = torch.arange(num_experts, device=experts_BK.device)[:, None]
    return (experts_BK.flatten() == experts_E1).sum(1)


def _share(leaf: Route) -> Tensor:
    return assignment_counts(leaf.experts, leaf.num_experts).to(leaf.scores.dtype) / leaf.experts.numel()


def load_per_expert(tree: RouteTree) -> list[Tensor]:
    """For each leaf (E,): the share of assignments each expert got, or of a gate that selects them all the mean weight;
    sums to 1."""
    return [_mean_weight(leaf) if leaf.experts.shape[1] == leaf.num_experts else _share(leaf) for leaf in leaves(tree)]


def weights_by_expert(route: Route) -> Tensor:
    """(B, E) the weight of each expert, zero where it is not selected; carries the weights' gradient."""
    return torch.zeros_like(route.scores, dtype=route.weights.dtype).scatter(-1, route.experts, route.weights)


def _mean_weight(leaf: Route) -> Tensor:
    weights_BE = weights_by_expert(leaf)
    return (weights_BE / weights_BE.sum(-1, keepdim=True)).mean(0)


def gate_entropy(tree: RouteTree) -> Tensor:
    """(B,) entropy in nats of softmax(scores), averaged over the leaves."""
    entropies = [-(p * p.clamp_min(1e-30).log()).sum(-1) for p in (leaf.scores.softmax(-1) for leaf in leaves(tree))]
    return torch.stack(entropies).mean(0)


def load_balance(tree: RouteTree) -> Tensor:
    """E * sum_e share_e * mean_b p_be, averaged over the leaves; () and at least about 1, which is perfect balance.

    Fedus et al. 2022 (Switch Transformer), eqs. 4 to 6. The share carries no gradient; the mean probability does.
    Unlike the coefficient of variation, its gradient is finite at perfect balance and at a zero-initialised router.
    """
    losses = [leaf.num_experts * (_share(leaf) * leaf.scores.softmax(-1).mean(0)).sum() for leaf in leaves(tree)]
    return torch.stack(losses).mean()
