"""Did the search try hard enough? E3, E7 to E9, E11 and E13, on the images of the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phalanx.attacks import APGD, FGSM, PGD, APGDTargeted, Attack
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, info, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Probe, shortened
from phalanx.rng import SampleRng, derive_seed
from phalanx.runs.verdict import CLEAN

NO_GRADIENT = "no attack of the evaluation climbs the deployed model's gradient"
NONE_STANDING = "no image of the checks is left standing"
NONE_RIGHT = "no image is classified rightly"

_GAIN = 0.5
"""Points of robust accuracy that more of the same attack may win."""
_CORNER = 0.5
_NOISE_DRAWS = 10_000
_NOISE_IMAGES = 8
_LOSS_STEPS = 20
_LOSS_IMAGES = 64
_START_IMAGES = 8


def single_step(probe: Probe) -> Finding:
    """E3: one step does not break what the whole evaluation leaves standing."""
    if not len(probe.standing.y):
        return skipped(NONE_STANDING)
    lost = probe.lost(FGSM().within(probe.threat), "E3")
    evidence = {"lost": lost, "images": len(probe.standing.y), "points": probe.points(lost)}
    if lost:
        return warned(
            f"one step of FGSM breaks {lost} images that every attack left standing: they are weaker than one step",
            **evidence,
        )
    return passed("one step of FGSM breaks nothing that the attacks left standing", **evidence)


def convergence(probe: Probe) -> Finding:
    """E7: twice the steps win at most 0.5 points."""
    attack = _standing_attack(probe)
    if isinstance(attack, str):
        return skipped(attack)
    steps = 10 if isinstance(attack, FGSM) else 2 * int(attack.steps)
    longer = probe.pgd(steps=steps) if isinstance(attack, FGSM) else replace(attack, steps=steps)
    name = probe.principal.name if probe.principal else ""
    lost = probe.lost(longer, "E7")
    evidence = {"steps": steps, "lost": lost, "images": len(probe.standing.y), "points": probe.points(lost)}
    if evidence["points"] > _GAIN:
        return warned(
            f"{name} with {steps} steps breaks {evidence['points']:.1f} points more: it has not converged", **evidence
        )
    return passed(f"{name} with {steps} steps wins no more than {_GAIN} points", **evidence)


def _standing_attack(probe: Probe) -> Any:
    """The principal attack, or why there is nothing to do with it."""
    if probe.principal is None:
        return NO_GRADIENT
    return probe.principal.attack if len(probe.standing.y) else NONE_STANDING


def best_iterate(probe: Probe) -> Finding:
    """E8: no attack lets go of an error that it has seen, and none keeps the last point where an earlier was wrong."""
    forgotten = sum(
        row.verdict == "held" and row.first_success >= 0 for row in probe.evaluation.rows if row.attack != CLEAN
    )
    worse, images = 0, Batch(*(column[:_LOSS_IMAGES] for column in probe.right))
    for own in (member.attack for member in probe.members):
        if not isinstance(own, PGD) or (own.keep != "last" and own.early_drop is not False):
            continue
        best = replace(own, keep="best", early_drop=True)
        kept, stopped = (probe.run(attack, images, "E8").broken for attack in (own, best))
        worse = max(worse, int((stopped & ~kept).sum()))
    evidence = {"forgotten": forgotten, "worse": worse}
    if forgotten or worse:
        return warned(
            f"{max(forgotten, worse)} images were wrong on the way and right at the point that was returned: keep the "
            "best iterate",
            **evidence,
        )
    return passed("every error that a search met is what it returned", **evidence)


def restarts(probe: Probe) -> Finding:
    """E9: another seed wins at most 0.5 points, and starts are random: no fixed corner, no start of every seed."""
    attack = _standing_attack(probe) if probe.principal is None else probe.principal.attack
    if isinstance(attack, str):
        return skipped(attack)
    corner, moved = _starts(probe, attack)
    lost = probe.lost(attack, "E9")
    evidence = {
        "lost": lost,
        "images": len(probe.standing.y),
        "points": probe.points(lost),
        "at_a_corner": corner,
        "seeds_differ": moved,
    }
    if corner > _CORNER:
        return warned(
            f"{corner:.0%} of the pixels of a start lie at the end of their range: it is a fixed corner of the ball, "
            "not a random start",
            **evidence,
        )
    if corner >= 0 and not moved and _says_random(attack):
        return warned("two seeds start at the same point: the start is not random", **evidence)
    if evidence["points"] > _GAIN:
        return warned(f"another seed breaks {evidence['points']:.1f} points more: add restarts", **evidence)
    return passed(f"another seed wins no more than {_GAIN} points", **evidence)


def _says_random(attack: Attack) -> bool:
    return bool(getattr(attack, "random_start", isinstance(attack, APGD | APGDTargeted)))


def _starts(probe: Probe, attack: Attack) -> tuple[float, float]:
    """The share of the pixels that start at the end of their range in the ball, in Linf; and whether two seeds start
    apart. The model is asked where the search begins: whatever the attack is, its first point goes through it."""
    images = Batch(*(column[:_START_IMAGES] for column in probe.right))
    if not len(images.y) or not _says_random(attack):
        return -1.0, 0.0
    starts = []
    for seed in (0, 1):
        start = partial(_start, probe, shortened(attack, 4), derive_seed(probe.seed, "honesty", "start", seed))
        starts.append(torch.cat(probe.in_pieces(images, start)))
    offset = (starts[0] - images.x).abs()
    inside = (images.x > probe.threat.epsilon) & (images.x < 1 - probe.threat.epsilon)
    ends = (offset > 0.99 * probe.threat.epsilon)[inside] if probe.threat.norm == "Linf" else offset.new_zeros(1)
    corner = float(ends.double().mean()) if ends.numel() else 0.0
    return corner, float(bool((starts[0] != starts[1]).any()))


def _start(probe: Probe, attack: Attack, seed: int, images: Batch) -> Tensor:
    recorder = _Recorder(probe, images.x)
    attack.search(recorder, images.x, images.y, rng=SampleRng(seed, images.ids))
    return images.x if recorder.first is None else recorder.first


class _Recorder:
    """The model as a function, which keeps the first images that are not the clean ones."""

    def __init__(self, probe: Probe, clean: Tensor) -> None:
        self._probe, self._clean = probe, clean
        self.first: Tensor | None = None

    def __call__(self, x: Tensor) -> Any:
        if self.first is None and (x.shape != self._clean.shape or not torch.equal(x.detach(), self._clean)):
            self.first = x.detach().contiguous().clone()
        with self._probe.borrowed() as model:
            return model(x)


def random_noise(probe: Probe) -> Finding:
    """E11: 10,000 uniform draws from the ball, spread over a few standing images, break none of them."""
    few = Batch(*(column[:_NOISE_IMAGES] for column in probe.standing))
    if not len(few.y):
        return skipped(NONE_STANDING)
    draws, lost = _NOISE_DRAWS // len(few.y), set[int]()
    chunk = max(1, 256 // len(few.y))
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        rng = SampleRng(derive_seed(probe.seed, "honesty", "E11", start), few.ids).repeated(count)
        x = few.x.repeat(count, *([1] * (few.x.dim() - 1)))
        answers = probe.answers(probe.threat.random_start(x, rng))
        wrong = (answers.argmax(-1) != few.y.repeat(count)) | ~answers.isfinite().all(-1)
        lost |= set(few.ids.repeat(count)[wrong].tolist())
    evidence = {"lost": len(lost), "images": len(few.y), "draws": draws * len(few.y)}
    if lost and not probe.random:
        return warned(f"random noise breaks {len(lost)} images that every attack left standing", **evidence)
    return passed("random noise breaks nothing that the attacks left standing", **evidence)


def losses(probe: Probe) -> Finding:
    """E13: cross-entropy, DLR, margin and a targeted attack, each alone, and all of them image by image."""
    images = Batch(*(column[:_LOSS_IMAGES] for column in probe.right))
    if not len(images.y):
        return skipped(NONE_RIGHT)
    attacks: dict[str, Callable[[], Attack]] = {
        "cross_entropy": lambda: APGD(steps=_LOSS_STEPS),
        "dlr": lambda: APGD(steps=_LOSS_STEPS, objective="dlr"),
        "margin": lambda: APGD(steps=_LOSS_STEPS, objective="margin"),
        "targeted": lambda: APGDTargeted(steps=_LOSS_STEPS, targets=1),
    }
    held = {}
    for name, make in attacks.items():
        result = probe.run(make().within(probe.threat), images, f"E13 {name}")
        held[name] = ~(result.broken | result.invalid)
    together = torch.stack(list(held.values())).all(0)
    evidence = {name: float(kept.double().mean()) for name, kept in held.items()}
    evidence |= {"all": float(together.double().mean()), "images": float(len(images.y))}
    best = min(held, key=lambda name: evidence[name])
    return info(
        f"of {len(images.y)} right images {evidence[best]:.1%} hold against {best} alone, {evidence['all']:.1%} "
        "against all four losses",
        **evidence,
    )
