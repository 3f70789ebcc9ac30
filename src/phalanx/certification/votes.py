"""What a model answers to many noisy copies of one image."""

# C classes, M noisy copies

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from phalanx.data import ImageSet
from phalanx.data.splits import check_labels
from phalanx.errors import InputError
from phalanx.nn import exact_fp32, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import DualModel, routed

Model = Callable[[Tensor], Any]

Smoothed = Literal["whole", "robust"]
"""What is averaged over noise: the whole model's answers, or those of a dual model's robust half alone."""
SMOOTHED: tuple[Smoothed, ...] = get_args(Smoothed)

_CHECKED = 4
"""So many images are looked at alone and together."""
_DRAWN = 2**20
"""So many numbers are drawn at a time: the generator works on some 100 bytes for each."""
_SAME = 1e-4
"""Answers differ by more than rounding, relative to their size."""


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How a classifier is smoothed, and how surely. Raises InputError for numbers out of range."""

    sigma: float = 0.25
    """Standard deviation of the Gaussian noise, in pixel units of [0, 1]; noisy copies are not clamped."""
    samples: int = 10_000
    """Noisy copies of each image from which the winner's probability is estimated: Cohen's n."""
    selection_samples: int = 100
    """Others, that pick the winner: Cohen's n0."""
    confidence: float = 0.999
    """Of each image's certificate, and of each answer that has none: Cohen's 1 - alpha."""
    smoothed: Smoothed = "whole"
    """ "robust": a dual model's robust half votes, its standard half answers as it is and counts as if always wrong."""
    seed: int = 0
    """Of the noise, which is a function of it, the image's id and the copy's number alone."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma must be positive, got {self.sigma}")
        for name in ("samples", "selection_samples"):
            count = getattr(self, name)
            if not isinstance(count, int):
                raise InputError(f"{name} must be a whole number, got {count!r}")
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence must be in [0.5, 1), such as 0.999, got {self.confidence}")
        if self.smoothed not in SMOOTHED:
            raise InputError(f"smoothed must be one of {', '.join(SMOOTHED)}, got {self.smoothed!r}")

    @property
    def alpha(self) -> float:
        """How often a certificate or an answer may be wrong."""
        return 1 - self.confidence

    @property
    def surest(self) -> float:
        """What a unanimous vote proves: a probability of at least this."""
        return float(self.alpha ** (1 / self.samples))


class Votes(NamedTuple):
    """Of one image."""

    winner: int
    """The class that most of the selecting copies were given; C where most answers were not finite."""
    counts: tuple[int, ...]
    """(C + 1,) of the other copies, by class; last those whose answer was not finite."""
    apart: tuple[float, ...] = ()
    """(C,) probabilities of the half that is not smoothed, at the image itself; empty where there is none, or they are
    not finite."""


@dataclass(frozen=True, eq=False)
class Voter:
    """Lets a model vote on noisy copies of images."""

    model: Model
    apart: Model | None
    """The half that is not smoothed."""
    weight: float
    """Of the smoothed part in the whole."""
    smoothing: Smoothing
    device: torch.device

    @classmethod
    def of(cls, model: Model, smoothing: Smoothing) -> Voter:
        """Raises InputError for a model in training mode, one without the halves that `smoothing` speaks of, and for
        too few samples to certify anything."""
        _refuse_training(model)
        device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
        voter = cls._of_parts(model, smoothing, device or torch.device("cpu"))
        majority = (1 + voter.lead) / 2
        if not smoothing.surest > majority:
            raise InputError(
                f"samples is {smoothing.samples}: at confidence {smoothing.confidence} even a unanimous vote of so few "
                f"proves no share above {majority:.3g}, so that every image would be abstained on; use 1000 or more"
            )
        return voter

    @classmethod
    def _of_parts(cls, model: Model, smoothing: Smoothing, device: torch.device) -> Voter:
        if smoothing.smoothed == "whole":
            return cls(model, None, 1.0, smoothing, device)
        if type(model) is not DualModel or model.mix != "probabilities":
            raise InputError(
                f"smoothed is 'robust', which a dual model of probabilities has, and a {type(model).__name__} has not; "
                "smooth it whole"
            )
        if model.alpha <= 0.5:
            raise InputError(
                f"the dual model's alpha is {model.alpha:g}: at 1/2 or below its standard half may overrule any vote, "
                "so that nothing can be certified; raise alpha, or smooth the whole model"
            )
        return cls(model.robust, model.standard if model.alpha < 1 else None, model.alpha, smoothing, device)

    @property
    def lead(self) -> float:
        """By how much a class must lead in the smoothed part, so that the rest cannot overrule it."""
        return (1 - self.weight) / self.weight

    @torch.no_grad()
    def check(self, images: ImageSet) -> None:
        """Raises InputError if answers depend on the rest of the batch or on chance, so that votes would say nothing
        about one image, for halves with other classes each and for labels that are no class."""
        x = images.images(slice(0, _CHECKED)).to(self.device)
        with exact_fp32(), preserved_rng():
            together = _logits(self.model, x)
            alone = torch.cat([_logits(self.model, x[i : i + 1]) for i in range(len(x))])
            apart = together if self.apart is None else _logits(self.apart, x)
        if _differ(together, alone):
            raise InputError(
                "the model answers an image otherwise when it is alone: its answers depend on the rest of the batch or "
                "on chance, and votes would say nothing about one image"
            )
        if apart.shape != together.shape:
            raise InputError(
                f"the dual model's halves answer for {apart.shape[1]} and {together.shape[1]} classes; they must agree"
            )
        check_labels("images", images.labels, together.shape[1])

    @torch.no_grad()
    def votes(self, image: Tensor, sample: int, batch_size: int) -> Votes:
        """Of one image (C, H, W) in [0, 1] whose id is `sample`; `batch_size` noisy copies at a time.

        Raises InputError for answers that are no logits (M, C).
        """
        selecting = self.smoothing.selection_samples
        total = selecting + self.smoothing.samples
        rng = SampleRng(derive_seed(self.smoothing.seed, "smoothing", sample), torch.arange(total, device=self.device))
        x = image.to(self.device)
        with exact_fp32(), preserved_rng():
            found = [self._answers(x, rng[start : start + batch_size]) for start in range(0, total, batch_size)]
            apart = self._apart(x)
        classes = found[0][1]
        winners = torch.cat([part for part, _ in found])
        counts = [_counted(part, classes) for part in (winners[:selecting], winners[selecting:])]
        return Votes(max(range(classes + 1), key=counts[0].__getitem__), counts[1], apart)

    def _answers(self, x: Tensor, rng: SampleRng) -> tuple[Tensor, int]:
        """(M,) classes of noisy copies, C for an answer that is not finite; and C."""
        logits = _logits(self.model, x + self.smoothing.sigma * _noise(rng, x))
        classes = logits.shape[1]
        return torch.where(logits.isfinite().all(1), logits.argmax(1), classes).cpu(), classes

    def _apart(self, x: Tensor) -> tuple[float, ...]:
        if self.apart is None:
            return ()
        p = _logits(self.apart, x[None])[0].double().softmax(0)
        return tuple(p.tolist()) if bool(p.isfinite().all()) else ()


def _noise(rng: SampleRng, x: Tensor) -> Tensor:
    """(M, C, H, W) standard normal."""
    rows = max(1, _DRAWN // x.numel())
    parts = [rng[start : start + rows].normal("noise", x.shape, dtype=x.dtype) for start in range(0, len(rng), rows)]
    return torch.cat(parts)


def _counted(winners: Tensor, classes: int) -> tuple[int, ...]:
    return tuple(winners.bincount(minlength=classes + 1).tolist())


def _logits(model: Model, x: Tensor) -> Tensor:
    """(M, C) of images (M, C, H, W), in the model's own precision."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    logits = routed(model, x.to(next((p.dtype for p in parameters), x.dtype))).logits
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or not logits.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model must answer {len(x)} images with logits ({len(x)}, C), got {shape}")
    return logits


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether answers (M, C) differ by more than rounding, or are finite in one alone."""
    finite = one.isfinite()
    scale = one.masked_fill(~finite, 0).abs().amax(1, keepdim=True).clamp_min(1.0)
    apart = (one - other).abs() > _SAME * scale
    return bool((finite & (apart | ~other.isfinite()) | ~finite & other.isfinite()).any())


def _refuse_training(model: Model) -> None:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training:
            raise InputError(
                f"{name or 'the model'} is in training mode, where an answer depends on the rest of the batch or on "
                "chance; eval() it"
            )
