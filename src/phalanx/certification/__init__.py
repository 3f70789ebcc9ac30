"""Certificates: radii within which no attack can change a mixture's answer. docs/certification.md has the proofs."""

from phalanx.certification.certificate import (
    REASONS,
    Certificate,
    certify,
    check_certifiable,
    lipschitz_constants,
    lower_margins,
    parse_reachable,
    parse_wanted,
)
from phalanx.certification.constants import Constants, read_constants, write_constants
from phalanx.certification.dual import mixed_low
from phalanx.certification.gates import entry_radii, soft_low, top1_low, topn_low
from phalanx.certification.gaussian import smoothed_radius
from phalanx.certification.networks import METHODS, Method
from phalanx.certification.paper import printed_theorem_5_4, printed_theorem_5_5
from phalanx.certification.record import certificate_json, certificate_text
from phalanx.certification.smoothed_record import smoothed_json, smoothed_text
from phalanx.certification.smoothing import SmoothedCertificate, certify_smoothed
from phalanx.certification.votes import SMOOTHED, Smoothing

__all__ = [
    "METHODS",
    "REASONS",
    "SMOOTHED",
    "Certificate",
    "Constants",
    "Method",
    "SmoothedCertificate",
    "Smoothing",
    "certificate_json",
    "certificate_text",
    "certify",
    "certify_smoothed",
    "check_certifiable",
    "entry_radii",
    "lipschitz_constants",
    "lower_margins",
    "mixed_low",
    "parse_reachable",
    "parse_wanted",
    "printed_theorem_5_4",
    "printed_theorem_5_5",
    "read_constants",
    "smoothed_json",
    "smoothed_radius",
    "smoothed_text",
    "soft_low",
    "top1_low",
    "topn_low",
    "write_constants",
]
