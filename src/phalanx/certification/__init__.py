"""Certificates: radii within which no attack can change a mixture's answer. docs/certification.md has the proofs."""

from phalanx.certification.certificate import REASONS, Certificate, certify, lower_margins, parse_wanted
from phalanx.certification.closed_forms import closed_radius, slope_a1, slope_a2, slope_a3
from phalanx.certification.dual import mixed_low
from phalanx.certification.gates import entry_radii, soft_low, top1_low, top1_radius, topn_low
from phalanx.certification.networks import METHODS, Method
from phalanx.certification.paper import printed_theorem_5_4, printed_theorem_5_5
from phalanx.certification.record import certificate_json, certificate_text

__all__ = [
    "METHODS",
    "REASONS",
    "Certificate",
    "Method",
    "certificate_json",
    "certificate_text",
    "certify",
    "closed_radius",
    "entry_radii",
    "lower_margins",
    "mixed_low",
    "parse_wanted",
    "printed_theorem_5_4",
    "printed_theorem_5_5",
    "slope_a1",
    "slope_a2",
    "slope_a3",
    "soft_low",
    "top1_low",
    "top1_radius",
    "topn_low",
]
