"""What an attack with several aims does: one search after the other, each on the samples that none before has lost."""

# A samples given to the search, C classes

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.pgd import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng


@dataclass(frozen=True, kw_only=True)
class AimedAttack(Attack):
    """A PGD search for each of several aims. A subclass names them; `restart` of a result counts them.

    A sample that none breaks keeps the perturbation of the first aim.
    """

    name: str
    steps: int = 50
    """Gradient steps for each aim."""
    step_size: float | str | None = None
    """Length of a step in pixel units; by default eps / 4."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")
        # checks steps and step_size
        self._search()

    @property
    def reads_clean_pass(self) -> bool:
        return True

    @property
    def reads_clean_logits(self) -> bool:
        return True

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def _search(self) -> PGD:
        return PGD(
            eps=self.eps,
            norm=self.norm,
            steps=self.steps,
            step_size=self.step_size,
            keep="best",
            early_drop=True,
        )

    @abstractmethod
    def _aims(self, target: Target) -> Iterator[Target]:
        """At least one target with the surface, objective and wanted classes to search for; its samples are all."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        search = self._search()
        found: Found | None = None
        for attempt, aim in enumerate(self._aims(target)):
            if found is None:
                found = search.perturb(aim, rng)
                continue
            rows = (found.first_success < 0).nonzero().squeeze(1)
            if not len(rows):
                break
            part = search.perturb(aim[rows], rng[rows].fold(attempt))
            found = _merged(found, rows, part, attempt, steps_before=attempt * self.steps)
        assert found is not None
        return found


def _merged(found: Found, rows: Tensor, part: Found, attempt: int, *, steps_before: int) -> Found:
    """`found` with the errors that `part`, a search of its samples `rows`, has found, and the queries it has spent."""
    queries = found.queries.index_add(0, rows, part.queries)
    won = part.first_success >= 0
    part = part._replace(
        restart=torch.full_like(part.restart, attempt),
        first_success=part.first_success + steps_before,
    )
    merged = (whole.index_copy(0, rows[won], new[won].to(whole.dtype)) for whole, new in zip(found, part, strict=True))
    return Found(*merged)._replace(queries=queries)


def wrong_classes(target: Target, count: int) -> list[Tensor]:
    """(A,) int64 the most likely wrong class of each clean image, the second most likely, ...: `count` of them, or
    all C - 1 for 0."""
    assert target.clean is not None
    logits_AC = target.clean.logits.scatter(-1, target.y[:, None], float("-inf"))
    order_AC = logits_AC.argsort(-1, descending=True)
    wrong = logits_AC.shape[1] - 1
    return [order_AC[:, rank] for rank in range(min(count or wrong, wrong))]
