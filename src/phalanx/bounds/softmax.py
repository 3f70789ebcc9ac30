"""Exact minima of softmax averages and of probability differences over boxes."""

# ... any leading dimensions, E entries, C classes

from __future__ import annotations

import torch
from torch import Tensor


def softmax_min(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(..., E) to (...): min over low <= z <= high of sum_i softmax(z)_i values_i.

    The sum is linear-fractional in each exp(z_i), so it is least where the s smallest values have `high` and the others
    `low`, for some s: all E + 1 are tried.
    """
    shape = (values + low + high).shape
    values, order = values.expand(shape).sort(dim=-1)
    low, high = low.expand(shape).gather(-1, order), high.expand(shape).gather(-1, order)
    entries = values.shape[-1]
    index = torch.arange(entries, device=values.device)
    raised = index < torch.arange(entries + 1, device=values.device)[:, None]
    weights = torch.where(raised, high[..., None, :], low[..., None, :]).softmax(-1)
    least: Tensor = (weights * values[..., None, :]).sum(-1).amin(-1)
    # an average is no less than its least term, whatever rounding says
    return torch.maximum(least, values[..., 0])


def prob_margin_low(low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """(B, C): min of p_y - p_k, p = softmax(z), over low_j <= z_j - z_y <= high_j, (B, C) each; infinite at k = y.

    `low` may be minus infinity and `high` infinity. Exact: with t = z_k - z_y at its highest, the denominator is
    largest where the difference is positive (t <= 0) and smallest where it is negative. Exponents are never clamped: a
    clamp would turn a difference of -1 into -1/2.
    """
    own = torch.nn.functional.one_hot(y, low.shape[1]).bool()
    low, high = low.masked_fill(own, 0), high.masked_fill(own, 0)
    total_B1 = high.logsumexp(1, keepdim=True)
    ahead = -torch.expm1(high.clamp_max(0)) * (-total_B1).exp()
    # exp(-t) + exp(0) + sum over j != y, k of exp(low_j - t), with the class itself counted once, as exp(0)
    classes = low.shape[1]
    others_BKC = torch.where(
        torch.eye(classes, dtype=torch.bool, device=low.device),
        high[:, None, :],
        low[:, None, :].expand(-1, classes, -1),
    )
    share = (high - others_BKC.logsumexp(2)).masked_fill(high == float("inf"), 0).exp()
    behind = torch.expm1(-high.clamp_min(0)) * share
    return torch.where(high <= 0, ahead, behind).masked_fill(own, float("inf"))
