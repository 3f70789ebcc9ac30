"""Clusters to begin with."""

# N images, F features, K clusters

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.rng import SampleRng

_ROUNDS = 1
"""Of Lloyd's algorithm: more make all attempts end at the same few clusterings, and a router's fit goes on anyway."""
_SEEN = 10_000
"""Vectors that the centres are found on."""
_CHUNK = 8192


@torch.no_grad()
def cluster(x: Tensor, clusters: int, seed: int, *, binary: bool = False) -> Tensor:
    """(N,) int64: the nearest of `clusters` centres for vectors (N, F), found by k-means++ and one round of Lloyd's
    algorithm; if `binary`, of whether each entry exceeds the mean of its column."""
    if binary:
        x = (x > x.mean(0)).to(x.dtype)
    draws = SampleRng.for_batch(1, seed)
    seen = x if len(x) <= _SEEN else x[draws.integers("seen", len(x), (_SEEN,))[0]]
    centres = seen[draws.integers("first", len(seen), (1,))[0]]
    for number in range(1, clusters):
        squared = torch.cdist(seen, centres).amin(1).square().double()
        chosen = torch.searchsorted(squared.cumsum(0), draws.uniform("next", (1,), step=number)[0] * squared.sum())
        centres = torch.cat([centres, seen[chosen.clamp_max(len(seen) - 1)]])
    for _ in range(_ROUNDS):
        nearest = torch.cdist(seen, centres).argmin(1)
        # a centre that nobody is nearest to stays where it is
        means = [
            seen[nearest == number].mean(0) if (nearest == number).any() else centres[number]
            for number in range(clusters)
        ]
        centres = torch.stack(means)
    return torch.cat([torch.cdist(part, centres).argmin(1) for part in torch.split(x, _CHUNK)])
