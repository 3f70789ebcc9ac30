"""Protocols, verdicts and what they add up to."""

from phalanx.evaluation.alone import ExpertCounts
from phalanx.evaluation.alpha import AlphaChoice, pick_alpha
from phalanx.evaluation.analysis import Analysis, GateAnalysis, MarginsByClass, analyse
from phalanx.evaluation.attribution import Attribution, attribute
from phalanx.evaluation.budget import Limits, parse_duration
from phalanx.evaluation.evaluate import EVALUATION_VERSION, evaluate
from phalanx.evaluation.nuts import NutsChoice, NutsGrid, pick_nuts
from phalanx.evaluation.oracle import OracleResult, oracle_accuracy
from phalanx.evaluation.protocols import Member, Protocol, protocol
from phalanx.evaluation.result import Evaluation, partial_answer
from phalanx.evaluation.shards import Shard
from phalanx.evaluation.validation import validation

__all__ = [
    "EVALUATION_VERSION",
    "AlphaChoice",
    "Analysis",
    "Attribution",
    "Evaluation",
    "ExpertCounts",
    "GateAnalysis",
    "Limits",
    "MarginsByClass",
    "Member",
    "NutsChoice",
    "NutsGrid",
    "OracleResult",
    "Protocol",
    "Shard",
    "analyse",
    "attribute",
    "evaluate",
    "oracle_accuracy",
    "parse_duration",
    "partial_answer",
    "pick_alpha",
    "pick_nuts",
    "protocol",
    "validation",
]
