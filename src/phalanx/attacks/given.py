"""Perturbed images that were made elsewhere: looked up, checked and judged as any attack's."""

# A samples given to the search, N images

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.threat import per_image


@dataclass(frozen=True, eq=False)
class GivenImages:
    """Images by the samples that they are perturbations of. Raises InputError for a sample that is named twice, and for
    pixels that are not finite or not in [0, 1]."""

    ids: Tensor
    """(N,) int64 the samples."""
    images: Tensor
    """(N, ...) float, as the model takes them."""

    def __post_init__(self) -> None:
        if self.ids.shape != (len(self.images),) or self.ids.is_floating_point() or not self.images.is_floating_point():
            raise InputError(
                f"given images must be float (N, ...) with N integer ids, got {self.images.dtype} of shape "
                f"{tuple(self.images.shape)} and {self.ids.dtype} of shape {tuple(self.ids.shape)}"
            )
        in_order = self.ids.sort().values
        twice = in_order[1:] == in_order[:-1]
        if bool(twice.any()):
            raise InputError(f"sample {int(in_order[1:][twice][0])} is given twice; give each image once")
        flat = self.images.flatten(1)
        # a NaN fails both comparisons
        outside = ~((flat >= 0) & (flat <= 1)).all(1)
        if bool(outside.any()):
            raise InputError(
                f"{int(outside.sum())} of {len(self.ids)} given images have pixels that are not finite or not in "
                f"[0, 1], the first of sample {int(self.ids[outside][0])}; clip them, and divide uint8 pixels by 255"
            )

    @property
    def sha256(self) -> str:
        """Of ids, shape and pixels in float64: what a ledger knows them by."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.ids.long(), self.images.double()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def of(self, samples: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A, ...) the images of `samples` (A,), those of `like` for samples that none was given for; (A,) bool which
        were. Raises InputError for images of another shape."""
        if self.images.shape[1:] != like.shape[1:]:
            raise InputError(
                f"given images must have the shape {tuple(like.shape[1:])} of the data, "
                f"got {tuple(self.images.shape[1:])}"
            )
        order = self.ids.argsort()
        ids = self.ids[order].to(samples.device)
        if not len(ids):
            return like.clone(), torch.zeros_like(samples, dtype=torch.bool)
        place = torch.searchsorted(ids, samples).clamp_max(len(ids) - 1)
        known = ids[place] == samples
        found = self.images[order[place.cpu()].to(self.images.device)].to(like)
        return torch.where(per_image(known, like), found, like), known


@dataclass(frozen=True, kw_only=True)
class Given(Attack):
    """Images made elsewhere, found by the keys of the samples' random streams, which in an evaluation are their ids.

    A sample that none was given for keeps its clean image. Raises InputError, naming a sample, for an image outside the
    ball: it is not projected, which would make another image of it.
    """

    name: Literal["given"] = "given"
    label: str
    """Who made them."""
    given: GivenImages = field(repr=False)

    def __post_init__(self) -> None:
        self._check_fixed("given images", objective="cross_entropy", surface="whole", targeted=False)
        super().__post_init__()

    @property
    def gradient_steps(self) -> int:
        """0: not known."""
        return 0

    def spec(self) -> dict[str, Any]:
        """The images by their sha256."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "given"}
        return {"attack": type(self).__name__, **plain, "images_sha256": self.given.sha256}

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        x_adv, _ = self.given.of(rng.keys, target.x)
        outside = ~self.threat.contains(x_adv, target.x)
        if bool(outside.any()):
            sample = int(rng.keys[outside][0])
            far = float(self.threat.distance(x_adv[outside][:1], target.x[outside][:1]))
            raise InputError(
                f"{self.label}: the image of sample {sample} is {far:.6g} away from the clean one in "
                f"{self.threat.norm}, more than {self.threat.eps}; give images inside the ball"
            )
        return handed_over(target, x_adv)


def handed_over(target: Target, x_adv: Tensor) -> Found:
    """What a search hands back that has only the images (A, ...) to show: it has seen no answer of the model."""
    return Found.nothing(target.x)._replace(x_adv=x_adv)
