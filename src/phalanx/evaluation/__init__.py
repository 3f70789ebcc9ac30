"""Protocols, verdicts and what they add up to."""

from phalanx.evaluation.alpha import AlphaChoice, pick_alpha
from phalanx.evaluation.analysis import Analysis, ExpertCounts, GateAnalysis, MarginsByClass, analyse
from phalanx.evaluation.evaluate import EVALUATION_VERSION, Evaluation, evaluate
from phalanx.evaluation.nuts import NutsChoice, NutsGrid, pick_nuts
from phalanx.evaluation.oracle import OracleResult, oracle_accuracy
from phalanx.evaluation.protocols import Member, Protocol, protocol
from phalanx.evaluation.validation import validation

__all__ = [
    "EVALUATION_VERSION",
    "AlphaChoice",
    "Analysis",
    "Evaluation",
    "ExpertCounts",
    "GateAnalysis",
    "MarginsByClass",
    "Member",
    "NutsChoice",
    "NutsGrid",
    "OracleResult",
    "Protocol",
    "analyse",
    "evaluate",
    "oracle_accuracy",
    "pick_alpha",
    "pick_nuts",
    "protocol",
    "validation",
]
