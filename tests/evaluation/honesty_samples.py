"""Models that pass every honesty check, and models that one check or another has to object to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.data import ImageSet
from phalanx.evaluation import Evaluation, evaluate, protocol
from phalanx.evaluation.honesty import CHECKS, CheckResult, Probe, look
from phalanx.evaluation.honesty.planted import CLASSES, IMAGES, LEVELS, Oracle, Planted, SideRouter, fragile, images
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.routing import MixtureOfExperts
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", "8/255")
EPS = THREAT.epsilon
SOUND = fragile().model
WEAK = "pgd-20:1/2550"
"""An attack of a tenth of a grey level leaves everything standing."""


def evaluated(model: nn.Module, name: str | Attack, data: ImageSet | None = None) -> tuple[Evaluation, Protocol]:
    tried = protocol(name, THREAT) if isinstance(name, str) else Protocol("own", (Member("own", name.within(THREAT)),))
    found = evaluate(model.eval(), data or images(), tried, THREAT, allow=["probabilities"])
    return found, tried


def probed(
    model: nn.Module | Planted = SOUND,
    name: str | Attack = "pgd-20",
    data: ImageSet | None = None,
    judged: nn.Module | None = None,
    **changes: Any,
) -> Probe:
    """The probe of an evaluation of `model`; `judged` is the model that the checks are given instead."""
    model = model.model if isinstance(model, Planted) else model
    data = data or images()
    found, tried = evaluated(model, name, data)
    (batch,) = data.batches(len(data))
    return replace(Probe(judged or model, batch, found, tried), **changes)


def result(id: str, probe: Probe) -> CheckResult:
    (found,) = look(probe, [check for check in CHECKS if check.id == id])
    assert "could not be run" not in found.sentence, found.sentence
    return found


def status(id: str, probe: Probe) -> str:
    return result(id, probe).status


def edited(probe: Probe, attack: str, **changes: Any) -> Probe:
    """The probe with the first row of an attack changed."""
    rows = list(probe.evaluation.rows)
    place = next(place for place, row in enumerate(rows) if row.attack == attack)
    rows[place] = replace(rows[place], **changes)
    return replace(probe, evaluation=replace(probe.evaluation, rows=tuple(rows)))


class Wrapped(nn.Module):
    """A model whose answers a function of the images and of the sound model changes."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.change(x)
        return answers


def margin_of(x: Tensor) -> Tensor:
    """(B,) how far an image is moved along the direction that breaks the sound model, -1 to 1 in the ball."""
    return (1 - SOUND.margin(x)) / 2  # type: ignore[operator]


def distance(x: Tensor) -> Tensor:
    """(B,) the largest change of a pixel."""
    return (x.flatten(1) - SOUND.typical)[:, CLASSES:].abs().amax(1)  # type: ignore[operator]


def answer(x: Tensor, margin: Tensor) -> Tensor:
    found: Tensor = SOUND.answer(x, margin)  # type: ignore[operator]
    return found


def mixture(*right: bool, share: float = 0.5) -> MixtureOfExperts:
    """Experts that answer rightly or not; of the two kinds of `bright_and_dark` images one goes to each."""
    weights = torch.zeros(3 * 64)
    weights[CLASSES:] = 1 / (3 * 64 - CLASSES)
    return MixtureOfExperts(SideRouter(weights, share), [Oracle(each) for each in right])


def bright_and_dark() -> ImageSet:
    """The planted images, every other one brighter."""
    plain = images()
    pixels = plain.pixels.copy()
    flat = pixels.reshape(IMAGES, -1)
    flat[::2, CLASSES:] = 178
    flat[1::2, CLASSES:] = 78
    return ImageSet(pixels, plain.labels, plain.ids, LEVELS)


def blocks() -> ImageSet:
    """Images whose label is written into 19 pixels, so that even noise without bounds leaves it readable."""
    flat = np.full((IMAGES, 192), 25, dtype=np.uint8)
    labels = (np.arange(IMAGES) % CLASSES).astype(np.int64)
    for row, label in enumerate(labels):
        flat[row, 19 * label : 19 * (label + 1)] = 230
    return ImageSet(flat.reshape(IMAGES, 3, 8, 8), labels, np.arange(IMAGES), LEVELS)


def by_block(x: Tensor) -> Tensor:
    """Reads `blocks`; rounded, so that there is no gradient."""
    means = x.flatten(1)[:, :190].reshape(len(x), CLASSES, 19).mean(-1)
    return nn.functional.one_hot(means.argmax(-1), CLASSES).to(x.dtype) * (1 + 0 * means.round())
