"""A mixture of experts one image and one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mixture_logits(
    router: nn.Module, experts: Sequence[nn.Module], x: Tensor, top_k: int, temperature: float = 1.0
) -> Tensor:
    """Logits (B, C): for each image the weighted answers of its `top_k` best experts, ties to the lower index.

    The weights are the softmax over the selected scores; the only weight of top-1 is 1 with the gradient of the
    softmax over all experts.
    """
    rows = []
    for image in x.split(1):
        scores = router(image)[0] / temperature
        order = scores.tolist()
        best = sorted(range(len(experts)), key=lambda e: (-order[e], e))[:top_k]
        if top_k == 1:
            p = scores.softmax(0)[best[0]]
            weights = [1 + p - p.detach()]
        else:
            total = torch.stack([scores[e].exp() for e in best]).sum()
            weights = [scores[e].exp() / total for e in best]
        rows.append(torch.stack([w * experts[e](image)[0] for w, e in zip(weights, best, strict=True)]).sum(0))
    return torch.stack(rows)


def entropy(probabilities: Sequence[float]) -> float:
    """In nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
