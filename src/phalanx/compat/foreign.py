"""Attacks of other libraries as members of our protocols: they search, we project and judge."""

# A samples given to the search

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.attacks import Attack, Found, Target
from phalanx.attacks.given import handed_over
from phalanx.errors import InputError
from phalanx.evaluation import Member, Protocol
from phalanx.nn import frozen
from phalanx.rng import SampleRng, derive_seed
from phalanx.threat import ThreatModel

Search = Callable[[Any, Tensor, Tensor], Tensor]
"""(model, images (A, ...), labels (A,)) -> perturbed images (A, ...)."""


@dataclass(frozen=True, kw_only=True)
class ForeignAttack(Attack):
    """A function of the model, images and labels that returns perturbed images.

    It is given the real model, frozen and in evaluation mode, and copies of the images. What it changes of the model
    (mode, weights, BatchNorm's statistics) is put back before the verdict. What it returns is projected onto the ball,
    pixels that are not finite being those of the clean image, and judged as any attack's. Its random numbers are seeded
    once a batch: unlike our attacks' they depend on who else is in it. Its passes are not counted.
    """

    name: str
    """What it is called, "external:NAME" in a ledger."""
    function: Search = field(repr=False)

    def __post_init__(self) -> None:
        self._check_fixed("an external attack", objective="cross_entropy", surface="whole", targeted=False)
        super().__post_init__()

    @property
    def gradient_steps(self) -> int:
        """0: not known."""
        return 0

    def spec(self) -> dict[str, Any]:
        """Also the function's name: a ledger cannot tell two versions of it apart."""
        kind = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "function"}
        return {"attack": type(self).__name__, **plain, "function": kind}

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        """Raises InputError for an answer that is no image for each image."""
        x, y = target.x.clone(), target.y.clone()
        with torch.enable_grad(), _lent(target.model), _seeded(derive_seed(rng.seed, *rng.keys.tolist())):
            x_adv = self.function(target.model, x, y)
        if not isinstance(x_adv, Tensor) or x_adv.shape != target.x.shape:
            got = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise InputError(
                f"external:{self.name} must return images of shape {tuple(target.x.shape)}, got {got}; "
                "return the perturbed images alone"
            )
        x_adv = x_adv.detach().to(target.x)
        return handed_over(target, torch.where(x_adv.isfinite(), x_adv, target.x))


def with_external(protocol: Protocol, searches: Mapping[str, Search], threat: ThreatModel) -> Protocol:
    """The protocol with these attacks, by name, as further members: each on every image that is classified rightly.

    A search should keep to `threat`: of one that does not, the projection is judged.
    """
    members = tuple(
        Member(f"external:{name}", ForeignAttack(name=name, function=search).within(threat))
        for name, search in searches.items()
    )
    names = ",".join([protocol.name, *(member.name for member in members)])
    return Protocol(names, (*protocol.members, *members))


@contextmanager
def _lent(model: Callable[..., Any]) -> Iterator[None]:
    """On leaving, a model's mode, gradient flags, parameters and buffers are what they were on entering."""
    held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    before = [tensor.detach().clone() for tensor in held]
    with frozen(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, own in zip(held, before, strict=True):
                    if not torch.equal(tensor, own):
                        tensor.copy_(own)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every global generator that a library may draw from; torch's own state is the caller's to keep."""
    # numpy's legacy generator takes 32 bits
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])
