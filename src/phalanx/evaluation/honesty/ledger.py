"""Do the verdicts stand? E1, E2, E17, E19 and E20: the ledger, and a few of its errors made again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.attacks.surfaces import Model
from phalanx.data import Batch
from phalanx.evaluation.again import judged_in
from phalanx.evaluation.honesty.finding import Finding, failed, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.protocols import Member
from phalanx.runs import Verdict
from phalanx.runs.proofs import contradictions
from phalanx.runs.summary import external_attacks, fallen_samples
from phalanx.runs.verdict import CLEAN
from phalanx.threat import BALL_TOLERANCE

_OTHER_SIZE = 5
"""A batch size that nobody attacks in."""
_WEAKER = 0.01


def bounds(probe: Probe) -> Finding:
    """E1: perturbations recorded and made again are finite, inside the ball in float64, and inside [0, 1]."""
    eps = {member.name: member.attack.threat.epsilon for member in probe.members}
    rows = [row for row in probe.evaluation.rows if row.attack in eps and row.attack != CLEAN]
    over = max((row.distance - eps[row.attack] for row in rows), default=0.0)
    outside, again, low, high = 0, 0, 1.0, 0.0
    for member, batch, (x_adv, *_) in probe.made_again:
        outside += int((~member.attack.threat.contains(x_adv, batch.x)).sum())
        again += len(x_adv)
        low, high = min(low, float(x_adv.min())), max(high, float(x_adv.max()))
    evidence = {"recorded": len(rows), "made_again": again, "outside": outside, "excess": over}
    if again:
        evidence |= {"lowest": low, "highest": high}
    if outside or over > BALL_TOLERANCE * max(probe.threat.epsilon, 1):
        return failed("a perturbation leaves the ball, or [0, 1]", **evidence)
    return passed("every perturbation lies in the ball and in [0, 1]", **evidence)


def verified(probe: Probe) -> Finding:
    """E2: errors made again from their seeds are errors again, in batches of another size, and on the CPU."""
    if probe.random:
        return skipped("the answers are random, so an error need not come twice")
    again, unbroken, lost = 0, 0, 0
    for _, batch, (x_adv, broken, *_) in probe.made_again:
        again += len(broken)
        unbroken += int((~broken).sum())
        lost += sum(int((broken & _is_right(model, batch, x_adv)).sum()) for model in _judges(probe))
    if not again:
        return skipped("no image of the checks was broken")
    evidence = {"made_again": again, "not_found_again": unbroken, "judged_otherwise": lost}
    if lost:
        return failed(
            f"{lost} of {again} errors are no errors when they are judged in another batch: verdicts depend on what "
            "else is in the batch",
            **evidence,
        )
    if unbroken:
        return failed(
            f"{unbroken} of {again} errors are not found again from the recorded seed: another model, other data or "
            "another attack made the ledger",
            **evidence,
        )
    return passed(f"{again} errors were found again and judged again", **evidence)


def _judges(probe: Probe) -> Iterator[Model]:
    yield probe.model
    if probe.batch.x.is_cuda and isinstance(probe.model, nn.Module):
        yield copy.deepcopy(probe.model).cpu()


def _is_right(model: Model, part: Batch, x_adv: Tensor) -> Tensor:
    """(B,) right, and not by a near tie."""
    device = (
        next((p.device for p in model.parameters()), x_adv.device) if isinstance(model, nn.Module) else x_adv.device
    )
    again = judged_in(_OTHER_SIZE, model, x_adv, device)
    return ((again.predicted == part.y.cpu()) & ~again.invalid & ~again.close).to(part.y.device)


def components(probe: Probe) -> Finding:
    """E17: the worst case is never above a component's, image by image; attacks on several parts at once should not be
    much weaker than plain ones."""
    by_all = set(probe.rows).difference(*(_not_held(probe, name) for name in (CLEAN, *_names(probe))))
    above = max(0, probe.evaluation.summary.robust - len(by_all))
    plain, aimed = (_breaks(probe, kind) for kind in (_is_plain, _is_aimed))
    if not aimed:
        return passed("no image counts as robust that a component lost", above=above) if not above else _above(above)
    missed = len(set().union(*plain.values()) - set().union(*aimed.values())) if plain else 0
    share = missed / max(len(probe.rows), 1)
    evidence = {"above": above, "missed_by_aimed": share}
    if above:
        return _above(above)
    if share > _WEAKER:
        return warned(
            f"the attacks that aim at several parts at once miss {share:.1%} of the images that plain ones break (a "
            "weighting problem): the headline takes both, keep the plain ones",
            **evidence,
        )
    return passed("no image counts as robust that a component lost", **evidence)


def _names(probe: Probe) -> list[str]:
    return [member.name for member in probe.members]


def _not_held(probe: Probe, attack: str) -> set[int]:
    """The images that an attack, or the clean pass, did not leave standing."""
    return {row.sample for row in probe.evaluation.rows if row.attack == attack and row.verdict != "held"}


def _above(count: int) -> Finding:
    return failed(f"{count} images count as robust that some attack broke: a bug", above=count)


def _is_plain(member: Member) -> bool:
    return isinstance(member.attack, PGD) and member.attack.surface == "whole" and not member.after


def _is_aimed(member: Member) -> bool:
    return type(member.attack).__name__ in ("JointMargin", "RouteSteering") and not member.after


def _breaks(probe: Probe, chosen: object) -> dict[str, frozenset[int]]:
    assert callable(chosen)
    return {member.name: probe.broken_by[member.name] for member in probe.members if chosen(member)}


def certificates(probe: Probe) -> Finding:
    """E19: nothing within a certified radius is answered wrongly, or with what is no number."""
    if not probe.proofs:
        return skipped("the run has no certificates of this model yet; a report compares those that are made later")
    wrong = contradictions(probe.evaluation.rows, probe.evaluation.attacks, probe.proofs)
    certified = {sample for proof in probe.proofs for sample in proof.radii}
    evidence = {"certified": len(certified), "contradicted": len({each.sample for each in wrong})}
    if wrong:
        return failed(f"{wrong[0].text}: the certificate is unsound, or the verdict wrong", **evidence)
    return passed("no wrong answer was found within a certified radius", **evidence)


def worst_case(probe: Probe) -> Finding:
    """E20: robust accuracy is the mean over images of the worst attack, and at most the lowest attack's."""
    counted = {member.name for member in probe.members}
    clean = {sample for sample, rows in probe.rows.items() if any(row.attack == CLEAN and _held(row) for row in rows)}
    # images that somebody submitted lower the worst case, and are no attack of the protocol
    lost = fallen_samples(probe.evaluation.rows, {*counted, *external_attacks(probe.evaluation.attacks)})
    mean = len(clean - lost) / max(len(probe.rows), 1)
    told, everyone = probe.evaluation.robust_acc, probe.evaluation.summary
    single = min(
        (done.accuracy for done in everyone.attacks if done.attack in counted), default=everyone.clean_accuracy
    )
    evidence = {"robust": told, "counted_anew": mean, "lowest_attack": single}
    if (probe.evaluation.finished and abs(told - mean) > 1e-9) or told > single + 1e-9:
        return failed("robust accuracy is not the worst case image by image: a bug", **evidence)
    return passed("robust accuracy is the worst case image by image", **evidence)


def _held(row: Verdict) -> bool:
    return row.verdict == "held"
