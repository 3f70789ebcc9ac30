"""E15, the active test: an adversarial example is planted, and the attack has to find it.

Zimmermann et al. 2022 ("Increasing Confidence in Adversarial Robustness Evaluations"): a linear read-out of the frozen
features says 0 around the clean image and 1 at one point on the border of the ball, so that an error is certainly
there. An attack that misses it would miss others.
"""

# N inner points, M border points, C features (the model's logits), A images given to the read-out

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phalanx.attacks import APGDTargeted, Attack
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, failed, passed, skipped
from phalanx.evaluation.honesty.probe import Probe
from phalanx.evaluation.honesty.search import NO_GRADIENT, NONE_RIGHT
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import Route, RoutedModel, RouteTree, map_route, pin, routed

IMAGES = 20
_INNER = 64
_BORDER = 64
_INSIDE = 0.95
"""Of the radius: how far out the inner points lie at most."""
_THRESHOLD = 0.9
"""Of the way from the outermost inner point to the planted one: what lies beyond is an error."""
_FOUND = 0.95
_RIDGE = 1.0
"""Of the mean variance of a feature: how far from plain to whitened a direction is."""
_STEPS = 100
"""Of the attack at most: what is planted is found in a few."""

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReadOut:
    """Two logits (A, 2): class 1 beyond the threshold along one direction of the features."""

    features: Features
    direction: Tensor
    threshold: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        score = (self.features(x) @ self.direction - self.threshold) / self.scale
        return torch.stack([-score, score], 1)


def active_test(probe: Probe) -> Finding:
    """E15: the principal attack finds at least 95 % of the planted adversarial examples."""
    if probe.principal is None:
        return skipped(NO_GRADIENT)
    if probe.random:
        return skipped("the answers are random, so that no read-out of them is certain")
    if not len(probe.right.y):
        return skipped(NONE_RIGHT)
    attack = _for_two_classes(probe.principal.attack)
    planted, found, constant = 0, 0, 0
    for row in range(min(IMAGES, len(probe.right.y))):
        image = Batch(*(column[row : row + 1] for column in probe.right))
        with probe.borrowed():
            read_out = plant(probe, image)
            if read_out is None:
                constant += 1
                continue
            planted += 1
            zero = torch.zeros_like(image.y)
            rng = SampleRng(derive_seed(probe.seed, "honesty", "E15"), image.ids)
            found += int(attack.run(read_out, image.x, zero, rng=rng).broken)
    evidence = {"planted": planted, "found": found, "could_not_plant": constant}
    name = probe.principal.name
    if planted and found < _FOUND * planted:
        return failed(
            f"{name} finds {found} of {planted} adversarial examples that were planted for it: it is too weak for "
            "this model, or gradients are masked",
            **evidence,
        )
    if not planted:
        return skipped("the answers hardly vary in the ball, so that nothing could be planted")
    return passed(f"{name} finds {found} of {planted} adversarial examples that were planted for it", **evidence)


def _for_two_classes(attack: Attack) -> Attack:
    changes: dict[str, object] = {"surface": "whole"}
    if hasattr(attack, "steps"):
        changes["steps"] = min(attack.steps, _STEPS)
    if isinstance(attack, APGDTargeted):
        changes |= {"targets": 1, "objective": "margin"}
    return replace(attack, **changes)  # type: ignore[arg-type]


@torch.no_grad()
def plant(probe: Probe, image: Batch) -> ReadOut | None:
    """A read-out that is right about one image (1, ...) and wrong at a point of the ball's border; None where no border
    point stands out of the inner ones.

    The features are the model's answers, of a mixture under the clean image's route: turned routes are E16's.
    """
    features = _features(probe, image.x)
    inner, border = _points(probe, image)
    inner_NC, border_MC = (probe.by_piece(points, features).double() for points in (inner, border))
    if not (inner_NC.isfinite().all() and border_MC.isfinite().all()):
        return None
    center = inner_NC.mean(0)
    spread = inner_NC.std(0).mean()
    # directions in which the inner points vary less count a little more
    covariance = torch.cov(inner_NC.T).reshape(len(center), -1)
    ridge = _RIDGE * covariance.diagonal().mean() + 1e-30
    inverse = torch.linalg.inv(
        covariance + ridge * torch.eye(len(center), dtype=covariance.dtype, device=center.device)
    )
    directions_MC = (border_MC - center) @ inverse
    outermost_M = (directions_MC @ inner_NC.T).amax(1)
    lead_M = (directions_MC * border_MC).sum(1) - outermost_M
    length_M = directions_MC.norm(dim=1).clamp_min(1e-30)
    best = int((lead_M / length_M).argmax())
    lead, length = lead_M[best] / length_M[best], length_M[best]
    # a lead that rounding could make is none
    if not bool(lead > 1e-5 * (1 + spread + center.abs().max())):
        return None
    direction = (directions_MC[best] / length).to(image.x.dtype)
    threshold = outermost_M[best] / length + _THRESHOLD * lead
    # the clean image gets logits near 1 and -1: larger ones would hide the cross-entropy's gradient
    scale = threshold - (directions_MC[best] / length) @ inner_NC[0]
    return ReadOut(features, direction, threshold.to(image.x.dtype), scale.to(image.x.dtype))


def _points(probe: Probe, image: Batch) -> tuple[Tensor, Tensor]:
    """(N, ...) points inside the ball and (M, ...) on its border."""
    rng = SampleRng(derive_seed(probe.seed, "honesty", "E15 points"), image.ids)
    shape = [1] * (image.x.dim() - 1)
    inner = image.x.repeat(_INNER, *shape)
    smaller = replace(probe.threat, eps=_INSIDE * probe.threat.epsilon)
    inner = smaller.random_start(inner, rng.repeated(_INNER), restart=0)
    border = image.x.repeat(_BORDER, *shape)
    drawn = probe.threat.random_start(border, rng.repeated(_BORDER), restart=1) - border
    if probe.threat.norm == "Linf":
        outward = probe.threat.epsilon * drawn.sign()
    else:
        size = probe.threat.distance(border + drawn, border).clamp_min(1e-12).to(drawn.dtype)
        outward = drawn * (probe.threat.epsilon / size).reshape(-1, *shape)
    return torch.cat([image.x, inner]), probe.threat.project(border + outward, border)


def _features(probe: Probe, x: Tensor) -> Features:
    """Images to answers, of a routed model under the route of one image (1, ...)."""
    model = probe.model
    if not isinstance(model, RoutedModel):
        return lambda images: routed(model, images).logits
    route = routed(model, x).route
    if route is None:
        return lambda images: model.routed(images).logits
    held = pin(route)
    return lambda images: model.routed(images, _repeated(held, len(images))).logits


def _repeated(tree: RouteTree, count: int) -> RouteTree:
    """The route of one image for so many."""

    def repeat(leaf: Route) -> Route:
        columns = (leaf.scores, leaf.experts, leaf.weights)
        return Route(*(column.expand(count, *column.shape[1:]) for column in columns))

    return map_route(repeat, tree)
