"""Bounds of linear functions over a threat's ball: what reachable sets, and certificates, stand on."""

from phalanx.bounds.dual_norm import dual_norm, largest_increase, pairwise_lipschitz

__all__ = ["dual_norm", "largest_increase", "pairwise_lipschitz"]
