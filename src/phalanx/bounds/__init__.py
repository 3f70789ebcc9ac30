"""Bounds of functions over a threat's ball: what reachable sets, and certificates, stand on."""

from phalanx.bounds.crown import Planes, crown_ibp_lower, crown_planes, whole
from phalanx.bounds.dual_norm import dual_norm, largest_increase, pairwise_lipschitz
from phalanx.bounds.intervals import Ball, Interval, interval_features, interval_lower, slopes_of
from phalanx.bounds.lipschitz import class_lipschitz, feature_gains, output_lipschitz
from phalanx.bounds.reading import Blocks, read_network
from phalanx.bounds.softmax import prob_margin_low, softmax_min
from phalanx.bounds.spectral import conv_upper, gram_upper
from phalanx.bounds.stages import ChannelScale, Dense, Residual, Stage, forward

__all__ = [
    "Ball",
    "Blocks",
    "ChannelScale",
    "Dense",
    "Interval",
    "Planes",
    "Residual",
    "Stage",
    "class_lipschitz",
    "conv_upper",
    "crown_ibp_lower",
    "crown_planes",
    "dual_norm",
    "feature_gains",
    "forward",
    "gram_upper",
    "interval_features",
    "interval_lower",
    "largest_increase",
    "output_lipschitz",
    "pairwise_lipschitz",
    "prob_margin_low",
    "read_network",
    "slopes_of",
    "softmax_min",
    "whole",
]
