"""Does accuracy follow the radius? E4 to E6: none, a little, all that there is."""

from __future__ import annotations

import itertools
from fractions import Fraction

from phalanx.attacks import PGD, Attack
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, failed, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.honesty.search import NONE_RIGHT
from phalanx.evaluation.ladder import MULTIPLES
from phalanx.runs.verdict import CLEAN
from phalanx.threat import ThreatModel

_LADDER = tuple(float(Fraction(multiple)) for multiple in MULTIPLES[1:])
_LADDER_STEPS = 10
_LARGE_STEPS = 20


def monotone(probe: Probe) -> Finding:
    """E4: the larger the radius, the lower the accuracy, under a short PGD at eps/4, eps/2, eps and 2 eps."""
    if not len(probe.right.y):
        return skipped(NONE_RIGHT)
    total, held = len(probe.batch.y), [len(probe.right.y)]
    for factor in _LADDER:
        threat = _wider(probe.threat, factor)
        held.append(_held(probe, PGD(steps=_LADDER_STEPS).within(threat), "E4"))
    rises = max(later - earlier for earlier, later in itertools.pairwise(held))
    names = ("at_0", "at_quarter", "at_half", "at_eps", "at_twice")
    evidence = {**{name: count / total for name, count in zip(names, held, strict=True)}, "largest_rise": rises}
    if rises > max(1, 0.02 * total):
        return warned(
            f"{rises} more images hold at a larger radius than at a smaller one: the attack stops short", **evidence
        )
    return passed("accuracy falls as the radius grows", **evidence)


def _wider(threat: ThreatModel, factor: float) -> ThreatModel:
    eps = threat.epsilon * factor
    return ThreatModel(threat.norm, min(eps, 1.0) if threat.norm == "Linf" else eps)


def _held(probe: Probe, attack: Attack, name: str) -> int:
    result = probe.run(attack, probe.right, name)
    return int((~(result.broken | result.invalid)).sum())


def large_radius(probe: Probe) -> Finding:
    """E5: within a radius that reaches every image, accuracy is at or below chance."""
    images = len(probe.batch.y)
    if not len(probe.right.y):
        return skipped(NONE_RIGHT)
    pixels = probe.batch.x[0].numel()
    everywhere = ThreatModel(
        probe.threat.norm, {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[probe.threat.norm]
    )
    alive = probe.right
    for objective in ("cross_entropy", "margin"):
        attack = PGD(steps=_LARGE_STEPS, objective=objective).within(everywhere)
        result = probe.run(attack, alive, f"E5 {objective}")
        alive = Batch(*(column[~(result.broken | result.invalid)] for column in alive))
        if not len(alive.y):
            break
    left, chance = len(alive.y) / images, 1 / probe.classes
    evidence = {"accuracy": left, "chance": chance, "eps": everywhere.epsilon, "images": images}
    # one image more than chance would have is no news
    if len(alive.y) > chance * images + 1:
        return failed(
            f"with every image within reach the model is still right about {left:.0%}, chance is {chance:.0%}: "
            "gradients are masked",
            **evidence,
        )
    return passed("with every image within reach nothing above chance is left", **evidence)


def zero_radius(probe: Probe) -> Finding:
    """E6: at radius 0 nothing breaks, and clean images are judged as the ledger says."""
    if probe.random:
        return skipped("the answers are random, so two passes over clean images differ")
    told = {row.sample: row for row in probe.evaluation.rows if row.attack == CLEAN}
    answers = probe.logits
    top = answers.topk(min(2, answers.shape[1]), -1).values
    close = (top[:, 0] - top[:, -1] < 1e-5).tolist()
    other = sum(
        sample in told and told[sample].predicted != answer and not near
        for sample, answer, near in zip(probe.batch.ids.tolist(), answers.argmax(-1).tolist(), close, strict=True)
    )
    lost = len(probe.right.y) - _held(probe, PGD(steps=1, eps=0.0, norm=probe.threat.norm), "E6")
    evidence = {"broken_at_0": lost, "judged_otherwise": other, "images": len(probe.batch.y)}
    if lost or other:
        return failed("clean images are judged otherwise than the ledger says, or break at radius 0", **evidence)
    return passed("at radius 0 every image is judged as when clean", **evidence)
