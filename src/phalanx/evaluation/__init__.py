"""Protocols, verdicts and what they add up to."""

from phalanx.evaluation.evaluate import EVALUATION_VERSION, Evaluation, evaluate
from phalanx.evaluation.protocols import Member, Protocol, protocol
from phalanx.evaluation.validation import validation

__all__ = ["EVALUATION_VERSION", "Evaluation", "Member", "Protocol", "evaluate", "protocol", "validation"]
