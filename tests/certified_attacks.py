"""Attacks inside certified radii."""

from __future__ import annotations

import torch
from torch import nn

from phalanx.attacks import PGD
from phalanx.attacks.routing_attacks import RouteSteering
from phalanx.certification import Certificate
from phalanx.data import ImageSet
from phalanx.rng import SampleRng


def fallen_inside(model: nn.Module, images: ImageSet, found: Certificate, share: float, alike: int) -> int:
    """How many certified images fall within `share` of their radius, of the smallest among `alike` that are alike; the
    whole model is attacked, and each expert in turn after steering the image to it."""
    (batch,) = images.batches(len(images))
    order = found.radius.argsort()[int((found.radius == 0).sum()) :]
    fallen = 0
    for group in order.split(alike):
        x, y, eps = batch.x[group], batch.y[group], share * float(found.radius[group].min())
        broken = torch.zeros(len(group), dtype=torch.bool)
        for attack in (PGD(eps=eps, norm=found.norm, steps=8), RouteSteering(eps=eps, norm=found.norm, steps=8)):
            broken |= attack.run(model, x, y, rng=SampleRng.for_batch(len(group), 1)).broken
        fallen += int(broken.sum())
    return fallen
