"""Search the largest ball that a bound certifies around each image, and say what limits it."""

# N samples, C classes

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from phalanx.certification.models import Read, read_model
from phalanx.certification.moe import Certifiable, Seen
from phalanx.certification.networks import METHODS, Method
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.nn import exact_fp32
from phalanx.runs import wilson
from phalanx.threat import Norm, parse_norm

Reason = Literal["certified", "misclassified", "tied", "non-finite"]
REASONS: tuple[Reason, ...] = get_args(Reason)

LEVEL = 1 / 255
"""The smallest change of an 8-bit image, in every norm: a ball of less holds no other image."""

_HALVINGS = 40
_COARSE = 7
"""Halvings where a bound is dear: the radius is then within 1 % of the largest that it certifies."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """Radii within which no image in [0, 1] changes the answer. Sound: a bound, whatever the attack; float64, with an
    allowance for the deployed precision."""

    radius: Tensor
    """(N,) float64. At most the diameter of [0, 1]^D, where it covers every image. 0 without a certificate."""
    reasons: tuple[Reason, ...]
    """Why, for each image."""
    limits: tuple[str, ...]
    """For each certified image, which class, through which part of the model, ends the ball."""
    norm: Norm
    method: Method
    constants: dict[str, float]
    """The largest Lipschitz constant of a difference of two outputs, by network."""
    notes: tuple[str, ...] = ()

    def certified(self, radius: float) -> int:
        """How many images are right, and certified at `radius`; at 0 all that are right beyond rounding."""
        if not radius >= 0:
            raise InputError(f"the radius must be at least 0, got {radius}")
        return sum(
            reason == "certified" and held >= radius
            for reason, held in zip(self.reasons, self.radius.tolist(), strict=True)
        )

    def accuracy_at(self, radius: float) -> float:
        """The share of images that are right and certified at `radius`."""
        return self.certified(radius) / len(self.reasons)

    def interval_at(self, radius: float) -> tuple[float, float]:
        """95 % Wilson interval of `accuracy_at`."""
        return wilson(self.certified(radius), len(self.reasons))

    @property
    def counts(self) -> dict[str, int]:
        """Images by reason."""
        found = Counter(self.reasons)
        return {reason: found[reason] for reason in REASONS}

    @property
    def vacuous(self) -> str | None:
        """What is wrong where no radius reaches one level of one 8-bit pixel; None where one does."""
        largest = float(self.radius.max()) if len(self.radius) else 0.0
        if largest >= LEVEL or not self.counts["certified"]:
            return None
        name = max(self.constants, key=lambda key: self.constants[key])
        return (
            f"vacuous: the largest radius is {largest:.2g}, less than one level of one pixel (1/255); {name} has a "
            f"Lipschitz bound of {self.constants[name]:.2g}"
        )


def certify(
    model: nn.Module,
    images: ImageSet,
    *,
    norm: str = "L2",
    method: str = "auto",
    batch_size: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
) -> Certificate:
    """Certifies a model's answers to all images, in evaluation mode.

    Args:
        model: a `MixtureOfExperts`, `DualModel`, `Ensemble` or single network of layers that bounds are known for.
        norm: "L2", "Linf" or "L1".
        method: "lipschitz", "ibp", "crown", or "auto", the best of those that apply.
        batch_size: images looked at together; changes no radius.
        progress: hears done, total and a note.

    Raises InputError for a model in training mode or without known bounds (naming the layer and its path), an unknown
    norm or method.
    """
    chosen, wanted = parse_wanted(norm, method)
    read = read_model(model, images.shape, chosen)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[_Found] = []
    for batch in images.batches(batch_size, device):
        found.append(_certified(model, read.model, batch.x, batch.y, chosen, wanted))
        if progress is not None:
            progress(sum(len(part.reasons) for part in found), len(images), "certified")
    return _together(found, read, chosen, wanted)


def lower_margins(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float | Tensor, *, method: str = "auto"
) -> Tensor:
    """(N, C) float64: lower bounds of F^y - F^k over all images within `eps` of x (N, C, H, W) in [0, 1], infinite at
    k = y, less an allowance for rounding. All positive: no image there is answered otherwise than y (N,).

    F are the model's logits; for averages of probabilities these. `eps` is a number or (N,). Raises InputError as
    `certify`, and for images outside [0, 1], labels that are no class or eps below 0.
    """
    chosen, wanted = parse_wanted(norm, method)
    _check_pixels(x)
    radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device).expand(len(x))
    if not bool((radius >= 0).all()):
        raise InputError(f"eps must be at least 0, got {eps}")
    certifiable = read_model(model, tuple(x.shape[1:]), chosen).model
    _check_labels(y, certifiable)
    with torch.no_grad():
        return certifiable.low(certifiable.see(x.detach().double()), y, radius, wanted).margins


def parse_wanted(norm: str, method: str) -> tuple[Norm, Method]:
    """A norm in any of the field's spellings, and a method; raises InputError for an unknown one."""
    try:
        chosen = parse_norm(norm)
    except ValueError as error:
        raise InputError(str(error)) from None
    for known in METHODS:
        if method == known:
            return chosen, known
    raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _check_pixels(x: Tensor) -> None:
    if len(x) and not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError("images must have pixels in [0, 1]; normalisation is the model's first layer")


def _check_labels(y: Tensor, read: Certifiable) -> None:
    if not bool(((y >= 0) & (y < read.classes)).all()):
        raise InputError(f"labels must be in 0..{read.classes - 1}, the model's classes")


@dataclass(frozen=True, eq=False)
class _Found:
    radius: Tensor
    reasons: tuple[Reason, ...]
    limits: tuple[str, ...]


def _together(found: list[_Found], read: Read, norm: Norm, method: Method) -> Certificate:
    return Certificate(
        radius=torch.cat([part.radius.cpu() for part in found]),
        reasons=tuple(reason for part in found for reason in part.reasons),
        limits=tuple(limit for part in found for limit in part.limits),
        norm=norm,
        method=method,
        constants=read.model.constants,
        notes=read.notes,
    )


@torch.no_grad()
def _certified(model: nn.Module, read: Certifiable, x: Tensor, y: Tensor, norm: Norm, method: Method) -> _Found:
    """Of one batch."""
    _check_labels(y, read)
    with exact_fp32():
        logits_NC = model(x.to(next((p.dtype for p in model.parameters()), x.dtype)))
    seen = read.see(x.double())
    finite_N = logits_NC.isfinite().all(1)
    right_N = finite_N & (logits_NC.argmax(1) == y)
    clean_N = _holds(read, seen, y, torch.zeros(len(x), dtype=torch.float64, device=x.device), "lipschitz")
    if bool((clean_N & finite_N & ~right_N).any()):
        raise InputError("the model answers otherwise than its parts say that it must; no bound can be given for it")
    held = (clean_N & right_N).nonzero()[:, 0]
    radius_N = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    limits = [""] * len(x)
    if len(held):
        search = _Search(read, seen.select(held), y[held], _diameter(x, norm), method)
        radius_N[held] = search.radii()
        for place, limit in zip(held.tolist(), search.limits(radius_N[held]), strict=True):
            limits[place] = limit
    certified = set(held.tolist())
    reasons: tuple[Reason, ...] = tuple(
        "certified" if i in certified else "tied" if right else "misclassified" if finite else "non-finite"
        for i, (right, finite) in enumerate(zip(right_N.tolist(), finite_N.tolist(), strict=True))
    )
    return _Found(radius_N, reasons, tuple(limits))


def _diameter(x: Tensor, norm: Norm) -> float:
    """Of [0, 1]^D: the largest distance of two images."""
    pixels = math.prod(x.shape[1:])
    return {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}[norm]


def _holds(read: Certifiable, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Tensor:
    """(N,) bool: every margin's bound is positive. A bound that is not a number holds nothing."""
    return (read.low(seen, y, radius, method).margins > 0).all(1)


@dataclass(frozen=True, eq=False)
class _Search:
    """Samples that are right."""

    read: Certifiable
    seen: Seen
    y: Tensor
    most: float
    method: Method

    def radii(self) -> Tensor:
        """(N,): every radius returned has itself been certified, so that nothing rests on the bounds' monotony."""
        zero = torch.zeros(len(self.y), dtype=torch.float64, device=self.y.device)
        # cheap, and where the others begin
        low = self._halved(*self._doubled(zero, "lipschitz"), _HALVINGS, "lipschitz")
        if self.method == "lipschitz":
            return low
        if self.method != "auto":
            low = torch.where(_holds(self.read, self.seen, self.y, low, self.method), low, zero)
        return self._halved(*self._doubled(low, self.method), _COARSE, self.method)

    def _doubled(self, low: Tensor, method: Method) -> tuple[Tensor, Tensor]:
        """Radii that are certified, and at most twice as large ones that are not, from certified ones; both are the
        diameter where that is certified."""
        low, high = low.clone(), (2 * low).clamp(LEVEL / 4, self.most)
        left = (low < self.most).nonzero()[:, 0]
        while len(left):
            holds = _holds(self.read, self.seen.select(left), self.y[left], high[left], method)
            left = left[holds]
            low[left] = high[left]
            left = left[high[left] < self.most]
            high[left] = (2 * high[left]).clamp_max(self.most)
        return low, high

    def _halved(self, low: Tensor, high: Tensor, rounds: int, method: Method) -> Tensor:
        for _ in range(rounds):
            middle = (low + high) / 2
            holds = _holds(self.read, self.seen, self.y, middle, method)
            low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
        return low

    def limits(self, radius: Tensor) -> list[str]:
        """What is no longer certified just beyond each radius."""
        found = self.read.low(self.seen, self.y, radius * 1.02 + 1e-9, self.method)
        classes = found.margins.argmin(1)
        parts = found.through.gather(1, classes[:, None])[:, 0]
        return [
            "nothing: it holds every image" if held >= self.most else f"class {klass} through {self.read.names[part]}"
            for held, klass, part in zip(radius.tolist(), classes.tolist(), parts.tolist(), strict=True)
        ]
