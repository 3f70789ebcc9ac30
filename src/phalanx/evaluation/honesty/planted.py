"""Models with a flaw that is known: what checks and attacks must find. Deterministic; nothing is trained."""

# B images, C classes

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.attacks import PGD, Attack
from phalanx.attacks.target import Target
from phalanx.data import Batch, ImageSet
from phalanx.rng import SampleRng
from phalanx.routing import MixtureOfExperts
from phalanx.threat import Norm, ThreatModel

IMAGES = 24
SIDE = 8
CLASSES = 10
EPS = "8/255"
DARK, GREY, BRIGHT, LEVELS = 25, 128, 230, 255
MARGIN = 0.6
"""How far the planted router's score lies from its boundary, in units of what the whole radius can do to it."""
_LABEL_GAIN = 20.0
_FAR = 3.0


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, and the threat in which it is flawed; it is right about `images()` when they are clean."""

    model: nn.Module
    threat: ThreatModel
    direction: Tensor
    """(D,) along which a perturbation of every pixel by the radius breaks every image."""

    @property
    def batch(self) -> Batch:
        (batch,) = images().batches(IMAGES)
        return batch

    @torch.no_grad()
    def truth(self) -> float:
        """Accuracy on the images moved along `direction`, each judged alone; an answer that is not finite is wrong."""
        x, y, _ = self.batch
        moved = self.threat.project(x + self.threat.epsilon * self.direction.reshape(x.shape[1:]), x)
        logits = torch.cat([self.model(image) for image in torch.split(moved, 1)])
        return float(((logits.argmax(-1) == y) & logits.isfinite().all(-1)).double().mean())

    def own(self, attack: Attack) -> Attack:
        """The attack within this threat."""
        return replace(attack, eps=self.threat.eps, norm=self.threat.norm)


def images() -> ImageSet:
    """Grey images (B, 3, 8, 8). The label is written into the first row of the first channel, one bright pixel among
    `CLASSES` dark ones, too bright for a perturbation of 8/255 to change; all else is the same in every image."""
    pixels = np.full((IMAGES, 3, SIDE, SIDE), GREY, dtype=np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    flat = pixels.reshape(IMAGES, -1)
    flat[:, :CLASSES] = DARK
    flat[np.arange(IMAGES), labels] = BRIGHT
    return ImageSet(pixels, labels.astype(np.int64), np.arange(IMAGES), LEVELS)


def radius(norm: Norm) -> str:
    """Of the planted threats: too small to change a label."""
    return {"Linf": EPS, "L2": "0.4", "L1": "0.5"}[norm]


class Oracle(nn.Module):
    """Reads the label from its pixels; `right` False answers with the next class."""

    def __init__(self, right: bool = True) -> None:
        super().__init__()
        self.shift = 0 if right else 1

    def extra_repr(self) -> str:
        """What the weights, of which there are none, do not show."""
        return f"shift={self.shift}"

    def forward(self, x: Tensor) -> Tensor:
        return _LABEL_GAIN * x.flatten(1)[:, :CLASSES].roll(self.shift, 1)


class SideRouter(nn.Module):
    """Scores (B, 2): a weighted sum of the pixels that hold no label, against a threshold."""

    def __init__(self, weights: Tensor, threshold: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.threshold = threshold

    def extra_repr(self) -> str:
        """What the buffers do not show."""
        return f"threshold={self.threshold:.6g}"

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weights, Tensor)
        lead = x.flatten(1) @ self.weights - self.threshold
        return torch.stack([lead, -lead], 1)


class HardMixture(MixtureOfExperts):
    """A top-1 mixture whose choice has no gradient, as in code that indexes with an argmax."""

    def gate(self, x: Tensor) -> Any:
        route = super().gate(x)
        return replace(route, weights=route.weights.detach())


def hard_routing(norm: Norm = "Linf") -> Planted:
    """Expert 0 is always right, expert 1 always wrong, and each image is `MARGIN` of the radius from the boundary.

    AutoAttack differentiates expert 0 alone, which nothing breaks; a step along the router's weights turns the route.
    """
    threat, signs = ThreatModel(norm, radius(norm)), _signs()
    # what the whole radius adds to the weighted sum: the dual norm of the weights
    order = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}[norm]
    reach = threat.epsilon * float(torch.linalg.vector_norm(signs, ord=order))
    router = SideRouter(signs, float(_typical() @ signs) - MARGIN * reach)
    return Planted(HardMixture(router, [Oracle(), Oracle(right=False)]).eval(), threat, -signs)


def _typical() -> Tensor:
    """(D,) what all images have in common; 0 where labels are written."""
    typical = torch.full((3 * SIDE * SIDE,), GREY / LEVELS)
    typical[:CLASSES] = 0
    return typical


def _signs() -> Tensor:
    """(D,) a checkerboard of +1 and -1, 0 where labels are written."""
    signs = torch.ones(3 * SIDE * SIDE)
    signs[1::2] = -1
    signs[:CLASSES] = 0
    return signs


class _Fragile(nn.Module):
    """Right on the planted images; a step of half the radius along a checkerboard breaks it."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        signs = _signs()
        self.register_buffer("signs", signs)
        self.register_buffer("typical", _typical())
        self.slope = 2.0 / (eps * float(signs.abs().sum()))

    def extra_repr(self) -> str:
        """What the buffers do not show."""
        return f"slope={self.slope:.6g}"

    def margin(self, x: Tensor) -> Tensor:
        """(B,) 1 on clean images, -1 at worst in the ball."""
        assert isinstance(self.signs, Tensor) and isinstance(self.typical, Tensor)
        return 1 - self.slope * ((x.flatten(1) - self.typical) @ self.signs)

    def answer(self, x: Tensor, margin: Tensor) -> Tensor:
        """(B, C) the label's class where the margin is positive, the next one where it is negative."""
        label = (x.flatten(1)[:, :CLASSES].detach() - 0.5).sign().clamp_min(0)
        following = label.roll(1, 1)
        return margin[:, None] * (label - following) - _FAR * (1 - label - following)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x, self.margin(x))


class _Saturated(_Fragile):
    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x, torch.tanh(1e4 * self.margin(x)))


class _Probabilities(_Fragile):
    def forward(self, x: Tensor) -> Tensor:
        return (200 * super().forward(x)).softmax(-1)


class _Quantised(_Fragile):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 15).round() / 15)


class _NotFinite(_Fragile):
    """Where a pixel is not that of the clean images, the class that it would name is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.typical, Tensor)
        known = (x.flatten(1) - self.typical)[:, CLASSES:].abs().amax(1) < 1e-6
        logits = self.answer(x, torch.ones_like(x.flatten(1)[:, 0])) + 0 * super().forward(x)
        named = torch.nn.functional.one_hot(logits.argmax(-1), CLASSES).bool() & ~known[:, None]
        return logits.masked_fill(named, float("nan"))


class _Capacity(_Fragile):
    """The first image of a batch gets the fragile expert; the others are dropped to one that nothing breaks."""

    def forward(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        sturdy = torch.ones_like(margin)
        first = torch.arange(len(x), device=x.device) == 0
        return self.answer(x, torch.where(first, margin, 2 * sturdy))


class _DeadCorner(_Fragile):
    """Flat, without a gradient, wherever all pixels are darker than the clean image by more than half the radius."""

    def __init__(self, eps: float) -> None:
        super().__init__(eps)
        self.dead = eps / 2

    def extra_repr(self) -> str:
        """What the buffers do not show."""
        return f"{super().extra_repr()}, dead={self.dead:.6g}"

    def margin(self, x: Tensor) -> Tensor:
        assert isinstance(self.typical, Tensor)
        brighter = (x.flatten(1) - self.typical)[:, CLASSES:].mean(1)
        return 1 - torch.relu(brighter + self.dead) / (2 * self.dead)


_FRAGILE: dict[str, type[_Fragile]] = {
    "fragile": _Fragile,
    "saturated": _Saturated,
    "not finite": _NotFinite,
    "capacity": _Capacity,
    "dead corner": _DeadCorner,
    "probabilities": _Probabilities,
    "quantised": _Quantised,
}


def fragile(kind: str = "fragile") -> Planted:
    """A model that a perturbation of 8/255 breaks on every image, with the flaw that `kind` names; "fragile" has none,
    and hides nothing."""
    threat = ThreatModel("Linf", EPS)
    model = _FRAGILE[kind](threat.epsilon).eval()
    return Planted(model, threat, _signs().abs() if isinstance(model, _DeadCorner) else _signs())


@dataclass(frozen=True, kw_only=True)
class CornerPGD(PGD):
    """PGD whose "random start" is the darkest corner of the ball, as when a start is scaled by mean and deviation."""

    def _start(self, target: Target, rng: SampleRng, restart: int) -> Tensor:
        del rng, restart
        return self.threat.project(target.x - self.threat.epsilon, target.x)
