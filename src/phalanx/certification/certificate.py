"""Search the largest ball that a bound certifies around each image, and say what limits it."""

# N samples, C classes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from phalanx.certification.constants import Constants
from phalanx.certification.models import Read, Reader, read_model
from phalanx.certification.moe import Certifiable
from phalanx.certification.networks import METHODS, Method
from phalanx.certification.radii import Radii, require_images
from phalanx.certification.reach import REACHABLE, Reachable
from phalanx.certification.search import LEVEL, Search, diameter, holds
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.nn import exact_fp32
from phalanx.threat import Norm, parse_epsilon, parse_norm

Reason = Literal["certified", "misclassified", "tied", "non-finite"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True, eq=False)
class Certificate(Radii):
    """Radii within which no image in [0, 1] changes the answer. Sound: a bound, whatever the attack; float64, with an
    allowance for the deployed precision. A radius is at most the diameter of [0, 1]^D, where it covers every image."""

    limits: tuple[str, ...]
    """For each certified image, which class, through which part of the model, ends the ball."""
    norm: Norm
    method: Method
    constants: dict[str, float]
    """The largest Lipschitz constant of a difference of two outputs, by network."""
    notes: tuple[str, ...] = ()
    reachable: Reachable = "pairwise"
    """The rule for when a top-1 gate can reach an expert."""
    kinds: ClassVar[tuple[str, ...]] = REASONS

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
    reachable: str = "pairwise",
    batch_size: int = 256,
    constants: Constants | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Certificate:
    """Certifies a model's answers to all images, in evaluation mode.

    Args:
        model: a `MixtureOfExperts`, `DualModel`, `Ensemble` or single network of layers that bounds are known for.
        norm: "L2", "Linf" or "L1".
        method: "lipschitz", "ibp", "crown", or "auto", the best of those that apply.
        reachable: "pairwise", or "exact": when a top-1 gate behind a linear router can reach an expert, all rivals
            together (2 % later on average).
        batch_size: images looked at together; changes no radius.
        constants: those of `lipschitz_constants`, where they were made before.
        progress: hears done, total and a note.

    Raises InputError for a model in training mode or without known bounds (naming the layer and its path), an unknown
    norm, method or rule, the exact rule for a model that has no gate for it, and no images.
    """
    chosen, wanted = parse_wanted(norm, method)
    rule = parse_reachable(reachable)
    require_images(images)
    read = read_model(model, Reader(images.shape, chosen, rule, constants or {}))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[_Found] = []
    for batch in images.batches(batch_size, device):
        found.append(_certified(model, read.model, batch.x, batch.y, chosen, wanted))
        if progress is not None:
            progress(sum(len(part.reasons) for part in found), len(images), "certified")
    return _together(found, read, chosen, wanted, rule)


def lipschitz_constants(model: nn.Module, shape: tuple[int, ...], norm: str) -> Constants:
    """The Lipschitz constants of all of a model's networks on images (*shape); raises InputError as `certify`."""
    read = read_model(model, Reader(shape, parse_wanted(norm, "auto")[0])).model
    return {network.name: network.lipschitz for mixture in read.mixtures for network in mixture.networks}


def check_certifiable(model: nn.Module, shape: tuple[int, ...], norm: str) -> None:
    """Raises InputError, naming the layer and its path or the reason, for a model in evaluation mode on images (*shape)
    that no bound is known for, whatever its weights."""
    read_model(model, Reader(shape, parse_wanted(norm, "auto")[0]))


def lower_margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float | str | Tensor,
    *,
    method: str = "auto",
    reachable: str = "pairwise",
) -> Tensor:
    """(N, C) float64: lower bounds of F^y - F^k over all images within `eps` of x (N, C, H, W) in [0, 1], infinite at
    k = y, less an allowance for rounding. All positive: no image there is answered otherwise than y (N,).

    F are the model's logits; for averages of probabilities these. `eps` is a number, a fraction such as "8/255", or
    (N,). Raises InputError as `certify`, and for images outside [0, 1], labels that are not (N,) or no class, or eps
    below 0.
    """
    chosen, wanted = parse_wanted(norm, method)
    _check_pixels(x)
    radius = _radii(eps, x)
    certifiable = read_model(model, Reader(tuple(x.shape[1:]), chosen, parse_reachable(reachable))).model
    if y.shape != x.shape[:1]:
        raise InputError(f"labels must have shape ({len(x)},), one for each image, got {tuple(y.shape)}")
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
    if method == "smoothing":
        raise InputError(
            "method smoothing certifies another classifier, the smoothed one; use px.certify_smoothed(model, images, "
            "sigma=...), or phalanx certify RUN --method smoothing"
        )
    raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def parse_reachable(rule: str) -> Reachable:
    """Raises InputError for an unknown rule."""
    for known in REACHABLE:
        if rule == known:
            return known
    raise InputError(f"reachable must be one of {', '.join(REACHABLE)}, got {rule!r}")


def _radii(eps: float | str | Tensor, x: Tensor) -> Tensor:
    """(N,) float64 of images x (N, C, H, W)."""
    try:
        number = float(parse_epsilon(eps)) if isinstance(eps, str) else eps
    except ValueError as error:
        raise InputError(str(error)) from None
    radius = torch.as_tensor(number, dtype=torch.float64, device=x.device)
    if radius.shape not in ((), x.shape[:1]) or not bool((radius >= 0).all()):
        raise InputError(f"eps must be at least 0, a number or one for each of {len(x)} images, got {eps}")
    return radius.expand(len(x))


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


def _together(found: list[_Found], read: Read, norm: Norm, method: Method, reachable: Reachable) -> Certificate:
    return Certificate(
        radius=torch.cat([part.radius.cpu() for part in found]),
        reasons=tuple(reason for part in found for reason in part.reasons),
        limits=tuple(limit for part in found for limit in part.limits),
        norm=norm,
        method=method,
        constants={
            network.name or "the network": float(network.lipschitz.max())
            for mixture in read.model.mixtures
            for network in mixture.networks
        },
        reachable=reachable,
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
    clean_N = holds(read, seen, y, torch.zeros(len(x), dtype=torch.float64, device=x.device), "lipschitz")
    if bool((clean_N & finite_N & ~right_N).any()):
        raise InputError("the model answers otherwise than its parts say that it must; no bound can be given for it")
    held = (clean_N & right_N).nonzero()[:, 0]
    radius_N = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    limits = [""] * len(x)
    if len(held):
        search = Search(read, seen.select(held), y[held], diameter(tuple(x.shape[1:]), norm), method)
        radius_N[held] = search.radii()
        for place, limit in zip(held.tolist(), search.limits(radius_N[held]), strict=True):
            limits[place] = limit
    certified = set(held.tolist())
    reasons: tuple[Reason, ...] = tuple(
        "certified" if i in certified else "tied" if right else "misclassified" if finite else "non-finite"
        for i, (right, finite) in enumerate(zip(right_N.tolist(), finite_N.tolist(), strict=True))
    )
    return _Found(radius_N, reasons, tuple(limits))
