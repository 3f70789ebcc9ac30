"""Adaptive smoothing's mixing network, trained to tell attacked images from clean ones while it is attacked itself."""

# B batch, A samples given to the search

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks import OBJECTIVES, PGD, Attack, Found, Target
from phalanx.errors import InputError
from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, check_weight
from phalanx.methods.draws import check_draws, draw
from phalanx.rng import Rng, SampleRng
from phalanx.routing import AdaptiveSmoothing, Routed, RoutedModel
from phalanx.threat import ThreatModel, parse_epsilon


@dataclass(frozen=True, kw_only=True)
class AdaptiveSmoothingTraining(Stateless):
    """Mean of bce BCE(gamma) + ce CE(f) + product BCE(gamma) CE(f), over clean images (label 0) and attacked ones (1).

    Bai et al. 2024, SIMODS; the halves stay as they are. Each image is attacked with a radius of its own, and with a
    weight of its own on a term that drives gamma towards "clean", so that the mixing network sees attacks that aim at
    it, too weak ones and ones beyond the threat. The loss is of the unsqueezed alpha = sigmoid(gamma); the attack is on
    the squeezed one, which is deployed.

    Deviations from the released code: PGD instead of APGD with targeted DLR; the step count is drawn from a set, for a
    batch, instead of chi-square; attacked and clean images weigh the same in the loss, however many there are.

    What a step costs per clean image, in passes through one expert of each half, with K steps on 1 / N of the images:
    2K / N for the attack and 1 + 1 / N for the loss. The halves get no gradient in the loss.
    """

    name: Literal["adaptive_smoothing"] = "adaptive_smoothing"
    attack: PGD = field(default_factory=PGD)
    """The attack on the whole model; its radius, by default the recipe's threat, is multiplied by `radius`."""
    draw_steps: tuple[int, ...] | None = (10, 20, 30)
    """Step counts; each batch is attacked with one of them, drawn uniformly, in place of the attack's steps."""
    radius: tuple[float, float] = (0.4, 1.1)
    """Each image's radius is drawn uniformly from this range, in units of the attack's eps. It shrinks the largest
    ball with its walls, so that a pixel goes no farther than that share of its way to 0 or 1."""
    mislead: float = 0.4
    """Each image's weight of -gamma in what the attack climbs is drawn uniformly from 0 to this."""
    clean_per_attacked: int = 4
    """Clean images for each attacked one; the authors have about ten."""
    bce: float = 1.0
    """Weight of the binary cross-entropy of gamma. Published: 1.5, 0, 0.3 for the three weights on CIFAR-10."""
    ce: float = 0.5
    """Weight of the cross-entropy of the mixture."""
    product: float = 0.1
    """Weight of the product of both, image by image."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        for name in ("mislead", "bce", "ce", "product"):
            check_weight(name, getattr(self, name))
        if self.bce == self.ce == self.product == 0:
            raise ValueError("bce, ce and product are all 0, so there is nothing to learn from; set one")
        if not 0 < self.radius[0] <= self.radius[1]:
            raise ValueError(f"radius must be a range of positive numbers that goes up, got {self.radius}")
        if self.clean_per_attacked < 1:
            raise ValueError(f"clean_per_attacked must be at least 1, got {self.clean_per_attacked}")
        if self.attack.surface != "whole" or self.attack.targeted:
            raise ValueError("attack must be on the surface 'whole' and untargeted; leave surface and targeted out")
        check_draws(self.attack, {"steps": self.draw_steps}, {"steps": "draw_steps"})

    def check(self, model: RoutedModel, num_classes: int) -> None:
        del num_classes
        self._adaptive(model)

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        adaptive = self._adaptive(model)
        x, y, ids = batches["train"].x, batches["train"].y, batches["train"].ids
        # the loader shuffles, so the first images are a random share
        attacked = max(1, len(x) // self.clean_per_attacked)
        attack, drawn = draw(self.attack, {"steps": self.draw_steps}, rng, x.device)
        found = Misleading.of(attack, self.radius, self.mislead).search(
            adaptive, x[:attacked], y[:attacked], rng=rng.fold("attack").samples(ids[:attacked])
        )
        inputs, labels = torch.cat([x, found.x_adv]), torch.cat([y, y[:attacked]])
        is_attacked = torch.arange(len(inputs), device=x.device) >= len(x)
        logs = {"zero_gradient": found.zero_gradient.float().mean(), **drawn}
        yield Update(lambda: self._loss(adaptive, inputs, labels, is_attacked), logs=logs)

    def _loss(self, model: AdaptiveSmoothing, x: Tensor, y: Tensor, is_attacked: Tensor) -> Loss:
        """Of images (B, C, H, W) of which some, (B,) bool, are attacked."""
        logits, gamma, _ = model.smoothed(x)
        bce = F.binary_cross_entropy_with_logits(gamma, is_attacked.to(gamma.dtype), reduction="none")
        ce = F.cross_entropy(logits, y, reduction="none")
        each = self.bce * bce + self.ce * ce + self.product * bce * ce
        # as many attacked images as clean ones, by weight
        value = (each[is_attacked].mean() + each[~is_attacked].mean()) / 2
        right, told = logits.detach().argmax(-1) == y, (gamma.detach() > 0) == is_attacked
        kinds = {"clean": ~is_attacked, "attacked": is_attacked}
        logs = {f"{kind}_accuracy": right[rows].float().mean() for kind, rows in kinds.items()}
        logs |= {f"{kind}_told": told[rows].float().mean() for kind, rows in kinds.items()}
        return Loss(value, {"accuracy": right.float().mean(), **logs})

    def _adaptive(self, model: RoutedModel) -> AdaptiveSmoothing:
        if not isinstance(model, AdaptiveSmoothing):
            raise InputError(
                f"{self.name} trains an AdaptiveSmoothing, got {type(model).__name__}; "
                "set model.name to adaptive, or use another method"
            )
        return model


@dataclass(frozen=True, kw_only=True)
class Misleading(Attack):
    """`attack`'s own search with, for each image, a radius of its own and a weight of its own on -gamma.

    It runs in the largest ball, and every point of it stands for one that is drawn towards the clean image by the
    image's share.
    """

    attack: PGD
    shares: tuple[float, float]
    """Radii are drawn from this range, in units of eps."""
    mislead: float
    """Weights are drawn from 0 to this."""

    @classmethod
    def of(cls, attack: PGD, radius: tuple[float, float], mislead: float) -> Self:
        """With radii in units of the attack's eps, which may exceed 1."""
        low, high = radius
        largest = parse_epsilon(attack.threat.eps) * Fraction(str(high))
        if attack.threat.norm == "Linf":
            largest = min(largest, Fraction(1))
        inner = replace(attack, eps=str(largest))
        return cls(
            eps=inner.eps,
            norm=inner.norm,
            objective=inner.objective,
            attack=inner,
            shares=(low / high, 1.0),
            mislead=mislead,
        )

    @property
    def gradient_steps(self) -> int:
        return self.attack.gradient_steps

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        low, high = self.shares
        share = (low + (high - low) * rng.uniform("radius")).to(target.x.dtype)
        weight = (self.mislead * rng.uniform("mislead")).to(target.x.dtype)
        found = self.attack.perturb(_Misled(**vars(target), share=share, weight=weight), rng)
        return found._replace(x_adv=_towards(target.x, found.x_adv, share))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Misled(Target):
    """A target in a shrunken ball, whose gain falls with gamma."""

    share: Tensor
    """(A,)"""
    weight: Tensor
    """(A,)"""

    def __getitem__(self, index: Tensor) -> Target:
        part = super().__getitem__(index)
        assert isinstance(part, _Misled)
        return replace(part, share=self.share[index], weight=self.weight[index])

    def _gain(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.search, AdaptiveSmoothing)
        logits, gamma, route = self.search.smoothed(_towards(self.x, x_adv, self.share))
        gain = OBJECTIVES[self.objective](Routed(logits, route), self.clean, self.y)
        return gain - self.weight * gamma, logits.detach()


def _towards(x: Tensor, x_adv: Tensor, share: Tensor) -> Tensor:
    return x + share.reshape(-1, *([1] * (x.dim() - 1))) * (x_adv - x)
