"""The health of the router, the planted flaw of hard routing, and what an adversary gains who picks the expert."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from phalanx.attacks import SURFACES
from phalanx.attacks.surfaces import Model
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, failed, info, passed, skipped, warned
from phalanx.evaluation.honesty.gradients import is_routing_aware
from phalanx.evaluation.honesty.planted import hard_routing
from phalanx.evaluation.honesty.probe import Probe, shortened
from phalanx.evaluation.protocols import Member
from phalanx.evaluation.transfer import Transfer
from phalanx.routing import Route

_COLLAPSED = 0.95
"""More of the images than this answered by one expert: it is a single network."""
_IDLE = 0.1
"""An expert is unused below this share of an even load."""
_TOY_STEPS = 20
_TOY_QUERIES = 200
_TOY_HELD = 0.05
_ORACLE_STEPS = 20
_ORACLE_IMAGES = 64


def health(probe: Probe) -> Finding:
    """M11: finite scores, every expert used, no expert used for nearly everything."""
    if not probe.gates:
        return skipped("the model has no router")
    loads = [_load(gate) for gate in probe.gates]
    lost = sum(int((~gate.scores.isfinite()).any()) for gate in probe.gates)
    idle = sum(int((load < _IDLE / len(load)).sum()) for load in loads)
    largest = max(float(load.max()) * gate.experts.shape[-1] for load, gate in zip(loads, probe.gates, strict=True))
    entropy = min(float(-(load * load.clamp_min(1e-12).log()).sum()) / math.log(len(load)) for load in loads)
    evidence = {
        "entropy": entropy,
        "largest_load": min(largest, 1.0),
        "idle_experts": idle,
        "margin": min(_margin(gate) for gate in probe.gates),
        "gates_not_finite": lost,
    }
    if lost:
        return warned("the router answers with numbers that are not finite: one expert gets everything", **evidence)
    if largest > _COLLAPSED and probe.is_hard and any(gate.experts.shape[-1] == 1 for gate in probe.gates):
        return warned("one expert answers nearly every image: the mixture is a single network", **evidence)
    if idle:
        return warned(f"{idle} experts answer next to no image", **evidence)
    return passed("every expert has its share of the images", **evidence)


def _load(gate: Route) -> Tensor:
    """(E,) share of the assignments."""
    counts = torch.bincount(gate.experts.flatten(), minlength=gate.num_experts).double()
    return counts.cpu() / counts.sum().cpu()


def _margin(gate: Route) -> float:
    """The median lead of the best score, in standard deviations of an image's scores."""
    best = gate.scores.topk(2, -1).values
    return float(((best[..., 0] - best[..., 1]) / gate.scores.std(-1, correction=0).clamp_min(1e-12)).median())


def planted_route(probe: Probe) -> Finding:
    """E16: the same attacks find a route that one step of the sign turns, on a model where nothing else errs.

    The attacks run with at most 20 steps, or 200 queries: the planted flaw needs one.
    """
    if not probe.is_hard:
        return skipped("the model has no router that leaves experts out")
    if not _on_the_model(probe):
        return skipped("every attack of the evaluation searches on another model")
    case = hard_routing(probe.threat.norm)
    standing, tried = case.batch, 0
    # those that look at the route first: where they find it, the others need not run
    for member in sorted(_on_the_model(probe), key=lambda member: not is_routing_aware(member.attack)):
        steps = _TOY_QUERIES if hasattr(member.attack, "queries") else _TOY_STEPS
        attack = case.own(shortened(member.attack, steps))
        result = probe.run(attack, standing, f"E16 {member.name}", case.model)
        tried += 1
        standing = Batch(*(column[~(result.broken | result.invalid)] for column in standing))
        if not len(standing.y):
            break
    held = len(standing.y) / len(case.batch.y)
    evidence = {"held": held, "images": len(case.batch.y), "attacks_tried": tried}
    if held > _TOY_HELD:
        return failed(
            f"these attacks call a planted mixture {held:.0%} robust whose route one step of the sign turns: on a "
            "model with a router they say little; add routing-50",
            **evidence,
        )
    return passed("the attacks find the planted flaw in a hard route", **evidence)


def _on_the_model(probe: Probe) -> list[Member]:
    """The attacks that can be run on a planted model instead: a surrogate answers for the evaluated images alone."""
    return [member for member in probe.members if not isinstance(member.attack, Transfer)]


def forced_route(probe: Probe) -> Finding:
    """E18: images that neither the evaluation nor PGD-20 on any single expert breaks: at most so many are left if the
    adversary picks the expert.

    PGD bounds what an expert holds from above, so what the adversary gains is bounded from below.
    """
    if not probe.gates:
        return skipped("the model has no router")
    if len(probe.gates) > 1:
        return skipped("the model has several gates, and only one expert number at all of them could be forced")
    if (told := _attributed(probe)) is not None:
        return told
    images = Batch(*(column[:_ORACLE_IMAGES] for column in probe.right))
    if not len(images.y):
        return skipped("no image is classified rightly")
    alive = images
    for number, forced in _forced(probe):
        result = probe.run(probe.pgd(steps=_ORACLE_STEPS), alive, f"E18 {number}", forced)
        alive = Batch(*(column[~(result.broken | result.invalid)] for column in alive))
        if not len(alive.y):
            break
    scale = len(probe.right.y) / len(probe.batch.y) / len(images.y)
    worst, measured = (sum(map(probe.held, part.ids.tolist())) for part in (alive, images))
    return _oracle(worst * scale, measured * scale, len(images.y))


def _attributed(probe: Probe) -> Finding | None:
    """What the evaluation's attribution says of the worst route, on more images; None if it does not speak of the whole
    model, as with a half of a dual one."""
    if probe.attribution is None or [part["name"] for part in probe.attribution["parts"]] != [""]:
        return None
    worst, whole = probe.attribution["parts"][0]["worst_route"], probe.attribution["whole"]
    return _oracle(worst["held"] / max(worst["n"], 1), whole["held"] / max(whole["n"], 1), int(worst["n"]))


def _oracle(worst: float, measured: float, images: int) -> Finding:
    return info(
        f"if an adversary could pick the expert, at most {worst:.1%} would hold, {measured:.1%} were measured on the "
        f"same images: the choice is worth {100 * (measured - worst):.1f} points, at least this much under "
        f"PGD-{_ORACLE_STEPS}",
        worst_route=worst,
        measured=measured,
        gap_points=100 * (measured - worst),
        images=images,
    )


def _forced(probe: Probe) -> Iterator[tuple[int, Model]]:
    """The model with every image sent to one expert, for each expert."""
    for number in range(max(gate.num_experts for gate in probe.gates)):
        yield number, _sent_to(probe, number)


def _sent_to(probe: Probe, number: int) -> Model:
    surface = SURFACES[f"expert-{number}"]

    def forced(x: Tensor) -> Tensor:
        with probe.borrowed() as model:
            return surface(model, x, x, None).logits

    return forced
