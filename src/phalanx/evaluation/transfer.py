"""Transfer: the search is made on another model, the verdict is the attacked one's."""

# A samples given to the search, C classes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from phalanx.attacks import APGD, APGDTargeted, Attack, Found, Target
from phalanx.attacks.given import handed_over
from phalanx.errors import InputError
from phalanx.evaluation.evaluate import model_sha256
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.nn import frozen
from phalanx.rng import SampleRng
from phalanx.routing import routed
from phalanx.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Another model for the same images and classes."""

    label: str
    model: Callable[[Tensor], Any]

    def __post_init__(self) -> None:
        if not self.label or not self.label.isprintable() or "," in self.label:
            raise InputError(f"a surrogate's label is printable and has no comma, got {self.label!r}")


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """APGD on the cross-entropy and towards the surrogate's likeliest wrong classes, both on the surrogate alone.

    The searches do not stop at the surrogate's first error: the further an image goes, the likelier it is to carry
    over. Of the two images of each sample the first that breaks the real model is handed back. The surrogate is frozen
    and in evaluation mode meanwhile, and as it was afterwards. `queries` counts passes of the real model alone.

    Raises InputError for a surrogate with other classes.
    """

    name: str = "transfer"
    label: str
    surrogate: Surrogate = field(repr=False)
    steps: int = 100
    """Gradient steps of each of the searches."""
    targets: int = 9
    """Classes aimed at, at most all that are wrong."""

    def __post_init__(self) -> None:
        self._check_fixed("transfer", objective="cross_entropy", surface="whole", targeted=False)
        super().__post_init__()
        self._searches()

    @property
    def gradient_steps(self) -> int:
        return sum(search.gradient_steps for search in self._searches())

    def _searches(self) -> tuple[APGD, APGDTargeted]:
        ball = {"eps": self.eps, "norm": self.norm, "steps": self.steps}
        return APGD(**ball), APGDTargeted(**ball, targets=self.targets)  # type: ignore[arg-type]

    def spec(self) -> dict[str, Any]:
        """The surrogate by its label and the sha256 of its weights."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "surrogate"}
        return {"attack": type(self).__name__, **plain, "surrogate_sha256": model_sha256(self.surrogate.model)}

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        self._check_classes(target)
        found = handed_over(target, target.x.clone())
        left, before = torch.arange(len(target), device=target.x.device), 0
        for attempt, search in enumerate(self._searches()):
            if not len(left):
                break
            aim = target[left]
            x_adv = search(self.surrogate.model, aim.x, aim.y, rng=rng[left].fold(attempt))
            before += search.gradient_steps
            wrong, invalid = target[left].errors(x_adv)
            hit = wrong | invalid
            found.x_adv[left] = x_adv
            found.queries[left] += 1
            found.restart[left] = attempt
            found.first_success[left[hit]] = before
            left = left[~hit]
        return found

    def _check_classes(self, target: Target) -> None:
        with torch.no_grad(), frozen(self.surrogate.model):
            theirs = routed(self.surrogate.model, target.x[:1]).logits
        ours = routed(target.search, target.x[:1]).logits
        if theirs.shape != ours.shape:
            raise InputError(
                f"surrogate {self.label!r} answers with {theirs.shape[-1]} classes, the model with {ours.shape[-1]}; "
                "give one that was trained on the same classes"
            )


def with_surrogates(protocol: Protocol, surrogates: Sequence[Surrogate], threat: ThreatModel) -> Protocol:
    """The protocol with a member "transfer:LABEL" for each: part of the cascade that the protocol ends with, or on
    every image that is classified rightly where it does not end with one.

    Raises InputError for two of one label.
    """
    labels = [surrogate.label for surrogate in surrogates]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"two surrogates are called {twice.pop()!r}; give them different labels")
    found = protocol
    for surrogate in surrogates:
        last = found.members[-1]
        attack = Transfer(label=surrogate.label, surrogate=surrogate).within(threat)
        member = Member(f"transfer:{surrogate.label}", attack, (*last.after, last.name) if last.after else ())
        found = replace(found, members=(*found.members, member))
    return found
