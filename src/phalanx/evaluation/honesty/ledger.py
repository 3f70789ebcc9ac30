"""Do the verdicts stand? E1, E2, E17, E19 and E20: the ledger, and a few of its errors made again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.attacks.surfaces import Model
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, failed, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.protocols import Member
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import routed
from phalanx.runs import Verdict
from phalanx.runs.summary import external_attacks, fallen_samples
from phalanx.runs.verdict import CLEAN
from phalanx.threat import BALL_TOLERANCE

_AGAIN = 16
"""Errors that are made again, of each attack its cheapest first."""
_OTHER_SIZE = 5
"""A batch size that nobody attacks in."""
_CLOSE = 1e-5
"""Where the two largest logits are closer, rounding may decide."""
_WEAKER = 0.01


def _made_again(probe: Probe) -> Iterator[tuple[Member, Batch, Tensor, Tensor]]:
    """For each member, some images that it broke, its perturbed images of them, made again from the seed, and whether
    they are broken again."""
    place = {sample: row for row, sample in enumerate(probe.batch.ids.tolist())}
    by_member = _cheapest(probe, place)
    for member in probe.members:
        rows = [place[row.sample] for row in by_member.get(member.name, ())]
        if not rows:
            continue
        index = torch.tensor(rows, device=probe.batch.y.device)
        part = Batch(*(column[index] for column in probe.batch))
        result = member.attack.run(probe.model, part.x, part.y, rng=member.streams(probe.seed, part.ids))
        yield member, part, result.x_adv, result.broken


def _cheapest(probe: Probe, place: dict[int, int]) -> dict[str, list[Verdict]]:
    """By attack, the errors to make again: in turn the cheapest of each attack that is left."""
    left: dict[str, list[Verdict]] = {}
    counted = {member.name for member in probe.members}
    for row in sorted(probe.evaluation.rows, key=lambda row: row.queries):
        if row.verdict == "broken" and row.attack in counted and row.sample in place:
            left.setdefault(row.attack, []).append(row)
    found: dict[str, list[Verdict]] = {}
    while left and sum(map(len, found.values())) < _AGAIN:
        for name in list(left):
            found.setdefault(name, []).append(left[name].pop(0))
            if not left[name]:
                del left[name]
            if sum(map(len, found.values())) == _AGAIN:
                break
    return found


def bounds(probe: Probe) -> Finding:
    """E1: perturbations recorded and made again are finite, inside the ball in float64, and inside [0, 1]."""
    eps = {member.name: member.attack.threat.epsilon for member in probe.members}
    rows = [row for row in probe.evaluation.rows if row.attack in eps and row.attack != CLEAN]
    over = max((row.distance - eps[row.attack] for row in rows), default=0.0)
    outside, again, low, high = 0, 0, 1.0, 0.0
    for member, part, x_adv, _ in _made_again(probe):
        outside += int((~member.attack.threat.contains(x_adv, part.x)).sum())
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
    for _, part, x_adv, broken in _made_again(probe):
        again += len(broken)
        unbroken += int((~broken).sum())
        lost += sum(int((broken & _is_right(model, part, x_adv)).sum()) for model in _judges(probe))
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


@torch.no_grad()
def _is_right(model: Model, part: Batch, x_adv: Tensor) -> Tensor:
    """(B,) right, and not by a near tie."""
    device = (
        next((p.device for p in model.parameters()), x_adv.device) if isinstance(model, nn.Module) else x_adv.device
    )
    with frozen(model), exact_fp32(), preserved_rng():
        answers = torch.cat([routed(model, x.to(device)).logits for x in torch.split(x_adv, _OTHER_SIZE)]).to(
            part.y.device
        )
    top = answers.topk(min(2, answers.shape[1]), -1).values
    return (answers.argmax(-1) == part.y) & (top[:, 0] - top[:, -1] >= _CLOSE)


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
    """E19: no image with a certificate was broken."""
    if probe.certified is None:
        return skipped("there are no certificates")
    broken = frozenset().union(*probe.broken_by.values()) if probe.broken_by else frozenset()
    wrong = broken & set(probe.certified)
    evidence = {"certified": len(probe.certified), "broken": len(wrong)}
    if wrong:
        return failed(f"{len(wrong)} images with a certificate were broken: the certificate is unsound", **evidence)
    return passed("no image with a certificate was broken", **evidence)


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
