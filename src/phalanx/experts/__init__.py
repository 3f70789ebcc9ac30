"""Backbones: images in [0, 1] to logits, normalisation inside."""

from phalanx.experts.build import EXPERTS, build_expert
from phalanx.experts.two_headed import TwoHeaded

__all__ = ["EXPERTS", "TwoHeaded", "build_expert"]
