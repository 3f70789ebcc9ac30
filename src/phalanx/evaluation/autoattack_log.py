"""The lines that AutoAttack logs, in its format: what other people's parsers read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from phalanx.threat import ThreatModel

REFERENCE_NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What AutoAttack calls the members of its standard version, in order."""


def using(version: str, attacks: Sequence[str]) -> str:
    """Which attacks are run."""
    return f"using {version} version including {', '.join(attacks)}."


def initial(accuracy: float) -> str:
    """The accuracy, a share, on clean images."""
    return f"initial accuracy: {accuracy:.2%}"


def after(attack: str, accuracy: float, seconds: float | None = None) -> str:
    """The accuracy once an attack and those before it are through; `seconds` since the first began, if known."""
    time = "" if seconds is None else f" (total time {seconds:.1f} s)"
    return f"robust accuracy after {attack.upper()}: {accuracy:.2%}{time}"


def final(threat: ThreatModel, x_adv: Tensor, x: Tensor, accuracy: float) -> tuple[str, str]:
    """The largest perturbation of (N, ...) images, and the robust accuracy."""
    largest = float(threat.distance(x_adv, x).max())
    return (
        f"max {threat.norm} perturbation: {largest:.5f}, nan in tensor: {int(x_adv.isnan().sum())}, "
        f"max: {float(x_adv.max()):.5f}, min: {float(x_adv.min()):.5f}",
        f"robust accuracy: {accuracy:.2%}",
    )
