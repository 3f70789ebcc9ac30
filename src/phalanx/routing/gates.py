"""From router scores to a route."""

# B batch, E experts, K selected

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from phalanx.routing.route import Route

StraightThrough = Literal["probability", "score"]


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def gate(
    scores_BE: Tensor, top_k: int, temperature: float = 1.0, *, straight_through: StraightThrough = "probability"
) -> Route:
    """Select the `top_k` best experts of each row of `scores_BE` (B, E); ties go to the lower index.

    Weights are softmax(scores / temperature) over the selected experts, so `top_k` = E is the soft gate. For
    `top_k` = 1 that weight is constantly 1 and would carry no gradient: the forward value stays 1 and the gradient is
    that of the softmax over all experts, 1 + p - stopgrad(p). With `straight_through` "score" it is that of the
    selected score alone, 1 + s - stopgrad(s), which says nothing of the alternatives (AdvMoE's released code).
    """
    num_experts = scores_BE.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..num_experts={num_experts}, got {top_k}; lower top_k or add experts")
    # topk breaks ties arbitrarily; a stable sort makes the lowest index win on every device
    order_BE = scores_BE.detach().sort(dim=-1, descending=True, stable=True).indices
    experts_BK = order_BE[:, :top_k]
    if top_k == 1:
        values_BE = scores_BE / temperature
        if straight_through == "probability":
            values_BE = values_BE.softmax(-1)
        p_B1 = values_BE.gather(-1, experts_BK)
        return Route(scores_BE, experts_BK, 1 + (p_B1 - p_B1.detach()))
    weights_BK = (scores_BE.gather(-1, experts_BK) / temperature).softmax(-1)
    return Route(scores_BE, experts_BK, weights_BK)
