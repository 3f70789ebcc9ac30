"""Backbones: images in [0, 1] to logits, normalisation inside."""

from phalanx.experts.build import EXPERTS, build_backbone, build_expert
from phalanx.experts.pretrained import TIMM, weights_sha256
from phalanx.experts.two_headed import TwoHeaded

__all__ = ["EXPERTS", "TIMM", "TwoHeaded", "build_backbone", "build_expert", "weights_sha256"]
