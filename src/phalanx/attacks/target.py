"""The model as a search sees it: one surface, one objective, the samples that are still attacked."""

# A samples still attacked, C classes

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.attacks.objectives import OBJECTIVES
from phalanx.attacks.surfaces import SURFACES, Model
from phalanx.errors import InputError
from phalanx.routing import Routed, routed, select


class Climb(NamedTuple):
    """One evaluation of the attacked surface."""

    gain: Tensor
    """(A,) the objective; for a targeted attack its negative at the wanted class."""
    gradient: Tensor | None
    """(A, ...) of the summed gain with respect to the images; None where it was not asked for."""
    logits: Tensor
    """(A, C) of the attacked surface."""


@dataclass(frozen=True, eq=False)
class Target:
    """What an attack climbs; `target[index]` follows the samples as they drop."""

    model: Model
    """The real model: the only judge."""
    search: Model
    """What gradients come from: the model, or a folded copy of it."""
    surface: str
    objective: str
    x: Tensor
    """(A, ...) clean images."""
    y: Tensor
    """(A,) int64 true labels."""
    wanted: Tensor | None = None
    """(A,) int64 the classes that a targeted attack aims at."""
    clean: Routed | None = None
    """The pass on the clean images, where the surface or the objective reads it."""
    judged: bool = False
    """A verdict follows: the search should watch for errors and may stop at the first."""
    largest_label: int = -1
    """A model of no more classes than this is refused at its first answer; -1 where the labels have been checked."""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Target:
        clean = self.clean
        if clean is not None:
            clean = Routed(clean.logits[index], None if clean.route is None else select(clean.route, index))
        wanted = None if self.wanted is None else self.wanted[index]
        return replace(self, x=self.x[index], y=self.y[index], wanted=wanted, clean=clean)

    def _gain(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        attacked = SURFACES[self.surface](self.search, x_adv, self.x, self.clean)
        check_known(self.largest_label, attacked.logits)
        objective = OBJECTIVES[self.objective]
        if self.wanted is None:
            return objective(attacked, self.clean, self.y), attacked.logits.detach()
        return -objective(attacked, self.clean, self.wanted), attacked.logits.detach()

    def climb(self, x_adv: Tensor) -> Climb:
        """Gain, its gradient and the surface's logits at `x_adv` (A, ...)."""
        with torch.enable_grad():
            leaf = self._laid_out(x_adv.detach()).requires_grad_()
            gain, logits = self._gain(leaf)
            # a model may ignore its input (a constant, a quantiser): that is a zero gradient, not an error
            if not gain.requires_grad:
                return Climb(gain.detach(), torch.zeros_like(x_adv), logits)
            (gradient,) = torch.autograd.grad(gain.sum(), leaf, allow_unused=True)
        return Climb(gain.detach(), torch.zeros_like(x_adv) if gradient is None else gradient, logits)

    @torch.no_grad()
    def look(self, x_adv: Tensor) -> Climb:
        """The same without a gradient."""
        gain, logits = self._gain(self._laid_out(x_adv))
        return Climb(gain, None, logits)

    def _laid_out(self, x_adv: Tensor) -> Tensor:
        """A folded copy's convolutions are in channels_last: images that come so are not rearranged layer by layer."""
        if self.search is self.model or x_adv.dim() != 4:
            return x_adv
        return x_adv.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def answers(self, x_adv: Tensor) -> Tensor:
        """(A, C) logits of the deployed model, whatever the surface, from the copy that is searched on."""
        return routed(self.search, self._laid_out(x_adv)).logits

    @torch.no_grad()
    def errors(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) wrong and (A,) non-finite: the real model's answers at `x_adv`."""
        return errors_of(routed(self.model, x_adv).logits, self.y)


def wrong_classes(target: Target, count: int) -> list[Tensor]:
    """(A,) int64 the most likely wrong class of each clean image, the second most likely, ...: `count` of them, or
    all C - 1 for 0."""
    assert target.clean is not None
    logits_AC = target.clean.logits.scatter(-1, target.y[:, None], float("-inf"))
    order_AC = logits_AC.argsort(-1, descending=True)
    wrong = logits_AC.shape[1] - 1
    return [order_AC[:, rank] for rank in range(min(count or wrong, wrong))]


def errors_of(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(A,) finite and wrong, (A,) non-finite, of logits (A, C). Non-finite is invalid, never robust."""
    invalid = ~logits.isfinite().all(-1)
    return (logits.argmax(-1) != y) & ~invalid, invalid


def check_answers(logits: object, y: Tensor) -> None:
    """Raises InputError unless the model answers with one logit per class (A, C), and knows every label (A,)."""
    if not (isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(y)):
        kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model must answer with logits ({len(y)}, C), got {kind}; wrap it in one that does")
    check_classes("labels", y, logits.shape[1])


def check_known(largest_label: int, logits: Tensor) -> None:
    """Raises InputError for a model whose logits (A, ...) have no such class; asks nothing of the device."""
    if logits.shape[-1] <= largest_label:
        raise InputError(
            f"labels must be in 0..{logits.shape[-1] - 1}, the model's classes, got {largest_label}; "
            "count classes from 0, and use the data the model is for"
        )


def check_classes(what: str, classes: Tensor, num_classes: int) -> None:
    """Raises InputError for a class the model does not have: it would only look like a wrong answer."""
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise InputError(
            f"{what} must be in 0..{num_classes - 1}, the model's classes, "
            f"got {int(classes.min())}..{int(classes.max())}; count classes from 0, and use the data the model is for"
        )
