"""Backbones: images in [0, 1] to logits, normalisation inside."""

from phalanx.experts.build import EXPERTS, build_expert

__all__ = ["EXPERTS", "build_expert"]
