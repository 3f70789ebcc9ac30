"""What an attack with several aims does: one search after the other, each on the samples that none before has lost."""

# A samples given to the search

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phalanx.attacks.apgd import APGD
from phalanx.attacks.base import Attack
from phalanx.attacks.pgd import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng


@dataclass(frozen=True, kw_only=True)
class AimedAttack(Attack):
    """A search for each of several aims. A subclass names them; `restart` of a result counts them.

    A sample that none breaks keeps the perturbation of the first aim.
    """

    name: str
    steps: int = 50
    """Gradient steps for each aim."""
    step_size: float | str | None = None
    """Length of a step of PGD in pixel units; by default eps / 4."""
    search_rule: Literal["pgd", "apgd"] = "pgd"
    """How each aim is searched for: steps of one length, or Auto-PGD's, whose length follows from how it fares."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")
        if self.search_rule not in ("pgd", "apgd"):
            raise ValueError(f"search_rule must be pgd or apgd, got {self.search_rule!r}")
        if self.search_rule == "apgd" and self.step_size is not None:
            raise ValueError(f"step_size is {self.step_size!r}, but Auto-PGD finds its own; leave one of them out")
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

    def spec(self) -> dict[str, Any]:
        """A search by PGD goes without saying: ledgers from before there was another stay readable."""
        found = super().spec()
        if self.search_rule == "pgd":
            del found["search_rule"]
        return found

    def _search(self) -> Attack:
        if self.search_rule == "apgd":
            return APGD(eps=self.eps, norm=self.norm, steps=self.steps)
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
