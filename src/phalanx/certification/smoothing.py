"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019): what a model answers to most noisy copies of an image is
certified in L2 with high probability, whatever the model. docs/certification.md has the statements."""

# N samples, C classes

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phalanx.certification.binomial import fair_p_value, lower_bound
from phalanx.certification.gaussian import smoothed_radius
from phalanx.certification.radii import Radii, require_images
from phalanx.certification.votes import Model, Smoothing, Voter, Votes
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.runs import wilson
from phalanx.threat import Norm, parse_norm

METHOD = "smoothing"
ABSTAINED = -1
"""Instead of a class."""


@dataclass(frozen=True, eq=False)
class SmoothedCertificate(Radii):
    """Radii in L2 within which the SMOOTHED classifier's answer does not change, each with probability `confidence`
    over the noise that was drawn. Of the model itself, without noise, it says nothing."""

    predicted: Tensor
    """(N,) int64: what the smoothed classifier answers, ABSTAINED where too few votes tell."""
    labels: Tensor
    """(N,) int64."""
    lower: Tensor
    """(N,) float64 lower bounds of the probability that a noisy copy is given the winner's class."""
    smoothing: Smoothing
    notes: tuple[str, ...] = ()
    norm: ClassVar[Norm] = "L2"
    method: ClassVar[str] = METHOD
    kinds: ClassVar[tuple[str, ...]] = ("certified", "misclassified", "abstained", "non-finite")

    @property
    def correct(self) -> int:
        """How many images the smoothed classifier answers rightly; an abstention is none."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """The smoothed classifier's accuracy on clean images."""
        return self.correct / len(self.labels)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `accuracy`."""
        return wilson(self.correct, len(self.labels))

    @property
    def abstentions(self) -> int:
        """How often the smoothed classifier gives no answer."""
        return int((self.predicted == ABSTAINED).sum())


def certify_smoothed(
    model: Model,
    images: ImageSet,
    *,
    norm: str = "L2",
    sigma: float = Smoothing.sigma,
    samples: int = Smoothing.samples,
    selection_samples: int = Smoothing.selection_samples,
    confidence: float = Smoothing.confidence,
    smoothed: str = Smoothing.smoothed,
    seed: int = Smoothing.seed,
    batch_size: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
) -> SmoothedCertificate:
    """Certifies the smoothed classifier of any callable, images (B, C, H, W) to logits (B, C), which meets images with
    noise, beyond [0, 1]: CERTIFY and PREDICT of Cohen et al. 2019, on the same votes.

    Args:
        norm: "L2", the only one that Gaussian noise certifies well.
        sigma: standard deviation of the noise, in pixel units of [0, 1]; best what the model was trained with.
        samples, selection_samples: noisy copies of each image, to estimate and to pick the winner.
        confidence: of each image's certificate. More samples, not less confidence, buy larger radii.
        smoothed: "robust" smooths a dual model's robust half alone.
        seed: of the noise.
        batch_size: noisy copies at a time; changes no noise.
        progress: hears done, total and a note.

    Raises InputError for another norm, numbers out of range or that can certify nothing, no images, a model in training
    mode, answers that are no logits or depend on the rest of the batch or on chance, labels that are no class.
    """
    require_l2(norm)
    smoothing = Smoothing(
        sigma=sigma,
        samples=samples,
        selection_samples=selection_samples,
        confidence=confidence,
        smoothed=smoothed,  # type: ignore[arg-type]  # checked there
        seed=seed,
    )
    voter = Voter.of(model, smoothing)
    check_batch_size(batch_size)
    require_images(images)
    voter.check(images)
    found = []
    for row, sample in enumerate(images.ids.tolist()):
        found.append(voter.votes(images.images([row])[0], sample, batch_size))
        if progress is not None:
            progress(len(found), len(images), "certified")
    return counted(found, images, voter)


def require_l2(norm: str) -> None:
    """Raises InputError for any other norm."""
    try:
        chosen = parse_norm(norm)
    except ValueError as error:
        raise InputError(str(error)) from None
    if chosen != "L2":
        raise InputError(
            f"Gaussian noise certifies L2 balls, not {chosen}: use norm L2; its radius r covers the L1 ball of r "
            "and the Linf ball of r / sqrt(D), D the number of pixels and channels"
        )


def check_batch_size(batch_size: int) -> None:
    """Raises InputError unless it is positive."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")


def counted(votes: Sequence[Votes], images: ImageSet, voter: Voter) -> SmoothedCertificate:
    """What votes (N) on `images` prove."""
    smoothing = voter.smoothing
    labels = torch.from_numpy(images.labels.copy())
    lower = [_lower(each, smoothing) for each in votes]
    proved = [_proved(each, voter) for each in votes]
    reasons = [_reason(each, voter, *rest) for each, *rest in zip(votes, proved, labels.tolist(), strict=True)]
    radius = [held if why == "certified" else 0.0 for held, why in zip(proved, reasons, strict=True)]
    return SmoothedCertificate(
        radius=torch.tensor(radius, dtype=torch.float64),
        reasons=tuple(reasons),
        predicted=torch.tensor([predicted(each, voter) for each in votes], dtype=torch.int64),
        labels=labels,
        lower=torch.tensor(lower, dtype=torch.float64),
        smoothing=smoothing,
        notes=_notes(voter),
    )


def _lower(votes: Votes, smoothing: Smoothing) -> float:
    return lower_bound(votes.counts[votes.winner], smoothing.samples, smoothing.alpha)


def _finite(votes: Votes, voter: Voter) -> bool:
    """Whether most selecting copies, and the half that is not smoothed, were answered with numbers."""
    return votes.winner < len(votes.counts) - 1 and (voter.apart is None or bool(votes.apart))


def _proved(votes: Votes, voter: Voter) -> float:
    """The radius within which the winner is answered, be it right or wrong; 0 where none is proved."""
    low = _lower(votes, voter.smoothing)
    if not low or not _finite(votes, voter):
        return 0.0
    return smoothed_radius(low, 1 - low, voter.smoothing.sigma, voter.lead)


def _reason(votes: Votes, voter: Voter, radius: float, label: int) -> str:
    if not _finite(votes, voter):
        return "non-finite"
    if not radius:
        return "abstained"
    return "certified" if votes.winner == label else "misclassified"


def predicted(votes: Votes, voter: Voter) -> int:
    """What the smoothed classifier answers, or ABSTAINED: the winner where a radius is proved, a test of its own on the
    other images. Either is wrong with probability at most alpha."""
    if _proved(votes, voter):
        return votes.winner
    if voter.apart is not None:
        return _predicted_mix(votes, voter)
    classes = len(votes.counts) - 1
    second, first = sorted(range(classes + 1), key=votes.counts.__getitem__)[-2:]
    surely = fair_p_value(votes.counts[first], votes.counts[second]) <= voter.smoothing.alpha
    return first if surely and first < classes else ABSTAINED


def _predicted_mix(votes: Votes, voter: Voter) -> int:
    """Of (1 - weight) p + weight h: by Hoeffding all C shares h are within `off` of the votes' at once."""
    *counts, _ = votes.counts
    if not votes.apart:
        return ABSTAINED
    samples, classes = voter.smoothing.samples, len(counts)
    mixed = [
        (1 - voter.weight) * p + voter.weight * count / samples for p, count in zip(votes.apart, counts, strict=True)
    ]
    second, first = sorted(range(classes), key=mixed.__getitem__)[-2:]
    off = math.sqrt(math.log(2 * classes / voter.smoothing.alpha) / (2 * samples))
    return first if mixed[first] - mixed[second] > 2 * voter.weight * off else ABSTAINED


def _notes(voter: Voter) -> tuple[str, ...]:
    if voter.smoothing.smoothed == "whole":
        return ()
    return (
        f"only the robust half is smoothed: its votes' shares, weighing {voter.weight:g}, must lead by more than "
        f"{voter.lead:.3g}; the standard half counts as if it were always wrong",
    )
