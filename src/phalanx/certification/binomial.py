"""Exact statements about a probability from how often something happened."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_HALVINGS = 60
_CAUTION = 1 - 1e-8
"""Rounding of the tail, some 1e-10 of its size, cannot make a bound too high."""


@lru_cache(maxsize=4096)
def lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided bound: the probability of success is at least this with confidence 1 - alpha.

    The largest p under which so many successes or more have a probability of at most alpha, rounded down; this is the
    alpha quantile of Beta(successes, trials - successes + 1).
    """
    if not successes:
        return 0.0
    log_ways = _log_ways(successes, trials)
    low, high = 0.0, successes / trials
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _tail(log_ways, successes, trials, middle) <= alpha * _CAUTION:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=4096)
def fair_p_value(first: int, second: int) -> float:
    """Of the two-sided test that two counts come from throws of a fair coin."""
    most, trials = max(first, second), first + second
    if 2 * most == trials:
        return 1.0
    return min(1.0, 2 * _tail(_log_ways(most, trials), most, trials, 0.5))


def _log_ways(successes: int, trials: int) -> Tensor:
    """Logarithms of the binomial coefficients of successes..trials out of trials, float64."""
    found = torch.arange(successes, trials + 1, dtype=torch.float64)
    return math.lgamma(trials + 1) - torch.lgamma(found + 1) - torch.lgamma(trials - found + 1)


def _tail(log_ways: Tensor, successes: int, trials: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(trials, p), 0 < p < 1."""
    found = torch.arange(successes, trials + 1, dtype=torch.float64)
    return float((log_ways + found * math.log(p) + (trials - found) * math.log1p(-p)).logsumexp(0).exp())
