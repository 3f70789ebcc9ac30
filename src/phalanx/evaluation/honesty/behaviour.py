"""Is the model a function of one image, and does it answer with logits? M1 to M4, M10 and M12."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from phalanx.evaluation.checks import fallbacks
from phalanx.evaluation.honesty.finding import Finding, failed, info, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe
from phalanx.runs.verdict import CLEAN
from phalanx.threat import BALL_TOLERANCE

_PASSES = 5
_SAME = 1e-4
"""Two passes differ where unit vectors of logits are further apart (as in AutoAttack's own check)."""
_ALONE = 16
"""Images judged one by one."""
_ROUNDING = 1e-5
"""Relative to the largest logit of an image."""
_DIFFERENT = 1e-3
_SUM = 1e-5
_SURE = 1e-7
_SHARE = 0.1


def evaluation_mode(probe: Probe) -> Finding:
    """M1: no part is in training mode while verdicts are made. (`phalanx.evaluation.checks.remarks` tells of a model
    that came so.)"""
    model = probe.model
    with probe.borrowed():
        stuck = sum(module.training for module in model.modules()) if isinstance(model, nn.Module) else 0
    if stuck:
        return failed(f"{stuck} parts of the model cannot leave training mode", stuck=stuck)
    return passed("every part is in evaluation mode", stuck=0)


def determinism(probe: Probe) -> Finding:
    """M2: five passes over the same images agree."""
    passes = []
    for seed in range(_PASSES):
        with probe.borrowed() as model, torch.no_grad():
            # else every pass would draw the same
            torch.manual_seed(seed)
            passes.append(probe.by_piece(probe.batch.x, model).double())
    first, right = normalize(passes[0], dim=-1), [int((one.argmax(-1) == probe.batch.y).sum()) for one in passes]
    apart = max(_largest((normalize(one, dim=-1) - first).norm(dim=-1)) for one in passes)
    evidence = {"largest_difference": apart, "fewest_right": min(right), "most_right": max(right)}
    if apart <= _SAME and len(set(right)) == 1:
        return passed(f"{_PASSES} passes give the same answers", **evidence)
    if all(getattr(member.attack, "eot", 1) > 1 for member in probe.members):
        return info("the answers are random, and every attack averages its gradients over passes", **evidence)
    return warned(
        "the answers are random: a gradient of one pass misleads; use --protocol rand, which averages gradients",
        **evidence,
    )


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if len(finite) else 0.0


def batch_independence(probe: Probe) -> Finding:
    """M3: an image's answer does not depend on those beside it: alone, in batches, in another order."""
    if probe.random:
        return skipped("the answers are random, so two batches differ anyway")
    x = probe.batch.x
    together = probe.answers(x).double()
    turned = probe.answers(x.flip(0)).double().flip(0)
    alone = torch.cat([probe.answers(image) for image in torch.split(x[:_ALONE], 1)]).double()
    pairs = [(together, turned), (together[:_ALONE], alone)]
    gap = max(_largest(_apart(*pair)) for pair in pairs)
    changed = sum(int(_changed(*pair).sum()) for pair in pairs)
    evidence = {"largest_difference": gap, "other_answers": changed, "alone": len(alone)}
    if changed or gap > _DIFFERENT:
        return failed(
            "an image's answer depends on the images beside it (batch statistics, or a capacity that drops some): no "
            "verdict about one image means anything",
            **evidence,
        )
    if gap > _ROUNDING:
        return warned("answers in another batch differ by more than rounding explains", **evidence)
    return passed("alone, together and in another order every image gets the same answer", **evidence)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """(B,) the largest difference of two (B, C) answers, relative to the logits."""
    return (one - other).abs().amax(-1) / one.abs().amax(-1).clamp_min(1.0)


def _changed(one: Tensor, other: Tensor) -> Tensor:
    """(B,) another class, and not by a near tie; or an answer that is finite in one batch alone."""
    top = one.topk(min(2, one.shape[1]), -1).values
    sure = (top[:, 0] - top[:, -1]) > _ROUNDING * one.abs().amax(-1).clamp_min(1.0)
    finite = one.isfinite().all(-1), other.isfinite().all(-1)
    return ((one.argmax(-1) != other.argmax(-1)) & sure) | (finite[0] != finite[1])


def logits(probe: Probe) -> Finding:
    """M4: logits, not probabilities, and not so large that the cross-entropy has no gradient."""
    answers = probe.logits.double()
    if answers.shape[1] < 2:
        return skipped("one class has no scale")
    sums = (answers.sum(-1) - 1).abs()
    if bool(((answers >= 0) & (answers <= 1)).all()) and bool((sums <= _SUM).all()):
        return warned(
            "the model answers with probabilities, whose gradients vanish where it is sure; leave out the softmax",
            largest=float(answers.max()),
        )
    log_probabilities = bool((answers.logsumexp(-1).abs() <= _SUM).all())
    others = answers.log_softmax(-1).scatter(-1, probe.batch.y[:, None], float("-inf")).logsumexp(-1).exp()
    sure = float((others < _SURE).double().mean())
    evidence = {"sure": sure, "largest": float(answers.abs().max()), "log_probabilities": float(log_probabilities)}
    if sure <= _SHARE:
        return passed("the answers are logits of a scale that gradients survive", **evidence)
    if any(_is_scale_free(member.attack.objective) for member in probe.members):
        return info("logits are large on many images, and attacks that scale does not hide from were run", **evidence)
    return warned(
        f"the model is so sure of {sure:.0%} of the images that the cross-entropy has next to no gradient; add an "
        "attack on the margin or DLR, such as apgd-dlr-100",
        **evidence,
    )


def _is_scale_free(objective: str) -> bool:
    return objective.startswith(("dlr", "margin", "steer", "joint"))


def class_count(probe: Probe) -> Finding:
    """M10: what few classes change in the attacks."""
    told = [line for member in probe.protocol.members for line in fallbacks(member.name, member.attack, probe.classes)]
    if told:
        return info("; ".join(told), classes=probe.classes)
    return passed("every attack is what its name says on so many classes", classes=probe.classes)


def pixel_space(probe: Probe) -> Finding:
    """M12: images in [0, 1], and a radius that is measured there."""
    low, high = (float(bound) for bound in probe.batch.x.aminmax())
    counted = {member.name for member in probe.members}
    rows = [row for row in probe.evaluation.rows if row.attack in counted and row.attack != CLEAN]
    largest, eps = max((row.distance for row in rows), default=0.0), probe.threat.epsilon
    evidence = {"lowest": low, "highest": high, "eps": eps, "largest_perturbation": largest}
    if low < 0 or high > 1:
        return failed("images lie outside [0, 1], so that eps is no pixel unit", **evidence)
    if largest > eps + BALL_TOLERANCE * max(eps, 1):
        return failed("a perturbation is larger than eps", **evidence)
    if high <= 0.05:
        return warned("no pixel is brighter than 5 %: were the images divided by 255 twice?", **evidence)
    return passed("images lie in [0, 1] and perturbations are measured there, before the model normalises", **evidence)
