"""What attacks without the model's gradient say: E10, E12 and E14; and what repetition says of a random one: E21."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from phalanx.attacks import PGD, Attack, HopSkipJump, Square
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, info, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.honesty.search import NONE_RIGHT, NONE_STANDING
from phalanx.routing import DualModel
from phalanx.runs.verdict import CLEAN

_POINTS = 0.2
"""What black-box attacks may take that gradients left (AutoAttack's own alarm, alpha = 0.002)."""
_QUERIES = 500
_STEPS = 20
_LABEL_IMAGES = 8
_LABEL_QUERIES = 500
_EOT = (5, 20, 80)
_EOT_STEPS = 10
_EOT_IMAGES = 16
_EOT_POINTS = 0.5
_JUDGED = 10


def black_box(probe: Probe) -> Finding:
    """E10: attacks without gradients take nothing that gradient attacks left; Square is run where none was."""
    if probe.black_box:
        left = _left_by_gradients(probe)
        lost = len(left & frozenset().union(*(probe.broken_by[name] for name in probe.black_box)))
        points, images = 100 * lost / max(probe.evaluation.n, 1), len(left)
        what = ", ".join(sorted(probe.black_box))
    else:
        if not len(probe.standing.y):
            return skipped(NONE_STANDING)
        if probe.batch.x.dim() != 4:
            return skipped("Square needs images of shape (C, H, W)")
        lost = probe.lost(Square(queries=_QUERIES).within(probe.threat), "E10")
        points, images, what = probe.points(lost), len(probe.standing.y), f"square-{_QUERIES}"
    evidence = {"lost": lost, "points": points, "images": images}
    if points > _POINTS:
        return warned(
            f"{what} breaks {lost} of {images} images that gradient attacks left standing: they are too few, or "
            "gradients are masked; use --protocol thorough",
            **evidence,
        )
    if lost:
        return info(f"{what} breaks {lost} images that gradient attacks left standing", **evidence)
    return passed(f"{what} breaks nothing that gradient attacks left standing", **evidence)


def _left_by_gradients(probe: Probe) -> frozenset[int]:
    """The images that are right when clean and that no attack with gradients took."""
    names = {CLEAN, *probe.broken_by} - probe.black_box
    taken = {row.sample for row in probe.evaluation.rows if row.attack in names and row.verdict != "held"}
    return frozenset(probe.rows) - taken


def transfer(probe: Probe) -> Finding:
    """E12: attacks on a smooth stand-in, on single experts and on halves break nothing that was left standing."""
    if not len(probe.standing.y):
        return skipped(NONE_STANDING)
    surfaces = list(_parts(probe))
    if not surfaces:
        given = [member.name for member in probe.members if member.name.startswith("transfer:")]
        if given:
            return passed(f"transfer from {len(given)} other models is part of the evaluation", surrogates=len(given))
        return skipped("the model has no parts to transfer from; give --surrogate for another model's images")
    lost = torch.zeros(len(probe.standing.y), dtype=torch.bool, device=probe.standing.y.device)
    by: dict[str, int] = {}
    for surface in surfaces:
        result = probe.run(PGD(steps=_STEPS, surface=surface).within(probe.threat), probe.standing, f"E12 {surface}")
        by[surface.replace("-", "_")] = int((result.broken | result.invalid).sum())
        lost |= result.broken | result.invalid
    count = int(lost.sum())
    evidence = {**by, "lost": count, "points": probe.points(count), "images": len(lost)}
    if count:
        worst = max(by, key=lambda name: by[name]).replace("_", "-")
        return warned(
            f"images made on parts of the model ({worst} most) break {count} that every attack left standing; add "
            f"pgd-50@{worst}",
            **evidence,
        )
    return passed("images made on its parts break nothing that was left standing", **evidence)


def _parts(probe: Probe) -> Iterator[str]:
    if probe.gates:
        yield "dense"
        yield from (f"expert-{number}" for number in range(max(gate.num_experts for gate in probe.gates)))
    if isinstance(probe.model, DualModel):
        yield from ("standard", "robust")


def hard_label(probe: Probe) -> Finding:
    """E14: HopSkipJump, which sees labels alone, on a handful of what was left standing."""
    few = Batch(*(column[:_LABEL_IMAGES] for column in probe.standing))
    if not len(few.y):
        return skipped(NONE_STANDING)
    if probe.threat.norm == "L1":
        return skipped("HopSkipJump has no form for L1")
    result = probe.run(HopSkipJump(queries=_LABEL_QUERIES).within(probe.threat), few, "E14")
    lost = int((result.broken | result.invalid).sum())
    evidence = {"lost": lost, "images": len(few.y), "queries": _LABEL_QUERIES}
    return info(
        f"HopSkipJump with {_LABEL_QUERIES} queries breaks {lost} of {len(few.y)} images that were left standing",
        **evidence,
    )


def averaging(probe: Probe) -> Finding:
    """E21: of a model with random answers, gradients averaged over more passes win no more; and each clean image is
    judged several times."""
    if not probe.random:
        return skipped("the answers are not random")
    images = Batch(*(column[:_EOT_IMAGES] for column in probe.right))
    if not len(images.y):
        return skipped(NONE_RIGHT)
    held = {}
    for passes in _EOT:
        attack: Attack = PGD(steps=_EOT_STEPS, eot=passes).within(probe.threat)
        result = probe.run(attack, images, "E21")
        held[passes] = float((~(result.broken | result.invalid)).double().mean())
    mean, worst = _judged(probe, images)
    gain = 100 * (held[_EOT[1]] - held[_EOT[2]])
    evidence = {f"passes_{passes}": share for passes, share in held.items()}
    evidence |= {"clean_mean": mean, "clean_worst": worst, "points": gain, "images": float(len(images.y))}
    if gain > _EOT_POINTS:
        return warned(f"{_EOT[2]} passes break {gain:.1f} points more than {_EOT[1]}: average over more", **evidence)
    return passed(f"averages over more than {_EOT[1]} passes win no more than {_EOT_POINTS} points", **evidence)


def _judged(probe: Probe, images: Batch) -> tuple[float, float]:
    """The mean accuracy over several judgements, and the share of images that are right in all of them."""
    right = []
    for seed in range(_JUDGED):
        with probe.borrowed() as model, torch.no_grad():
            torch.manual_seed(seed)
            right.append(probe.by_piece(images.x, model).argmax(-1) == images.y)
    stacked = torch.stack(right).double()
    return float(stacked.mean()), float(stacked.amin(0).mean())
