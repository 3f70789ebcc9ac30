"""The honesty checks: does an evaluation deserve to be believed? Thirty-three questions, each with its evidence.

After Carlini et al. 2019 ("On Evaluating Adversarial Robustness"), Tramer et al. 2020, Croce & Hein 2020 (AutoAttack's
checks), Pintor et al. 2022 ("Indicators of Attack Failure") and Zimmermann et al. 2022; what concerns routers is ours.
"""

from phalanx.evaluation.honesty.finding import Check, CheckResult, Finding, Status
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.honesty.suite import CHECKS, LEFT_OUT, Honesty, look, run_checks, samples_for

__all__ = [
    "CHECKS",
    "LEFT_OUT",
    "Check",
    "CheckResult",
    "Finding",
    "Honesty",
    "Probe",
    "Status",
    "look",
    "run_checks",
    "samples_for",
]
