"""What every check looks at: the model, a few images, and the evaluation that was made."""

# B images of the checks, R of them classified rightly, S of these still standing, C classes, E experts

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from phalanx.attacks import APGD, FGSM, PGD, APGDTargeted, Attack, AttackResult, HopSkipJump, RayS, Square
from phalanx.attacks.autoattack import fitted
from phalanx.attacks.given import Given
from phalanx.data import Batch
from phalanx.evaluation.checks import is_random
from phalanx.evaluation.filling import nobody
from phalanx.evaluation.gates import joined
from phalanx.evaluation.halving import Halving
from phalanx.evaluation.honesty.again import MadeAgain, to_make_again
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.evaluation.result import Evaluation
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import Route, RoutedModel, leaves, routed
from phalanx.runs import Verdict
from phalanx.runs.proofs import Proof
from phalanx.runs.verdict import CLEAN
from phalanx.threat import ThreatModel

Model = Callable[[Tensor], Any]
T = TypeVar("T")

STANDING = 64
"""At most so many images that held are attacked again by a check."""

_GRADIENT_ATTACKS = (APGD, PGD, APGDTargeted, FGSM)
_DEPLOYED = ("whole", "pinned")
_BLACK_BOX = (Square, RayS, HopSkipJump, Given)


@dataclass(frozen=True, eq=False)
class Probe:
    """The subject of the checks. Everything is computed once, when it is first asked for."""

    model: Model
    batch: Batch
    """(B, ...) images where the model is, their labels and ids."""
    evaluation: Evaluation
    protocol: Protocol
    seed: int = 0
    """Of the evaluation: with a member's name it gives the random numbers that its verdicts came from."""
    batch_size: int = 64
    """Images that go through the model at once; halved where they do not fit the memory."""
    attribution: Mapping[str, Any] | None = None
    """What the attribution of the evaluation says, if there was one."""
    proofs: Sequence[Proof] = ()
    """Certificates of the model, of whatever radius."""

    # -- the model -------------------------------------------------------------------------------------------------

    @contextmanager
    def borrowed(self) -> Iterator[Model]:
        """The model as it is judged: frozen, in exact fp32."""
        with frozen(self.model), exact_fp32(), preserved_rng():
            yield self.model

    @torch.no_grad()
    def answers(self, x: Tensor) -> Tensor:
        """(N, C) logits of images (N, ...)."""
        with self.borrowed() as model:
            return self.by_piece(x, lambda piece: routed(model, piece).logits)

    @cached_property
    def _halving(self) -> Halving:
        return Halving(nobody, self.batch_size)

    def in_pieces(self, batch: Batch, work: Callable[[Batch], T]) -> list[T]:
        """What `work` makes of a batch, in pieces that fit the memory; DoesNotFitError if one image is too much."""
        return list(self._halving.pieces(batch, work)) or [work(batch)]

    def by_piece(self, x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, ...) what `work` makes of images (N, ...), likewise."""
        rows = torch.arange(len(x), device=x.device)
        return torch.cat(self.in_pieces(Batch(x, rows, rows), lambda piece: work(piece.x)))

    @cached_property
    def logits(self) -> Tensor:
        """(B, C) of the clean images."""
        return self.answers(self.batch.x)

    @cached_property
    def random(self) -> bool:
        """Whether two passes over the same images differ."""
        return any(self.in_pieces(self.batch, lambda piece: is_random(self.model, piece.x, self.answers(piece.x))))

    @cached_property
    def gates(self) -> tuple[Route, ...]:
        """The leaves of the clean images' route that choose among experts; none for a model without a router."""
        if not isinstance(self.model, RoutedModel):
            return ()
        with self.borrowed() as model, torch.no_grad():
            routes = self.in_pieces(self.batch, lambda piece: routed(model, piece.x).route)
        parts = zip(*(leaves(route) for route in routes if route is not None), strict=True)
        return tuple(joined(part) for part in parts if part[0].num_experts > 1)

    @cached_property
    def is_hard(self) -> bool:
        """Whether a gate leaves experts out."""
        return any(gate.experts.shape[-1] < gate.num_experts for gate in self.gates)

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    # -- the images ------------------------------------------------------------------------------------------------

    @cached_property
    def right(self) -> Batch:
        """The R images that the model is right about."""
        return self._rows((self.logits.argmax(-1) == self.batch.y) & self.logits.isfinite().all(-1))

    @cached_property
    def standing(self) -> Batch:
        """The S images, at most `STANDING`, that are right and held against everything that was tried on them."""
        held = torch.tensor([self.held(sample) for sample in self.batch.ids.tolist()], device=self.batch.y.device)
        rows = self._rows(held & (self.logits.argmax(-1) == self.batch.y))
        return Batch(*(column[:STANDING] for column in rows))

    def held(self, sample: int) -> bool:
        """Whether an image counts as robust, as far as its own verdicts tell."""
        rows = [row for row in self.rows.get(sample, ()) if row.attack not in self.evaluation.aside]
        return bool(rows) and all(row.verdict == "held" for row in rows)

    @cached_property
    def share_standing(self) -> float:
        """Of all images of the checks: what one of the standing images that are attacked again stands for."""
        held = sum(map(self.held, self.batch.ids.tolist()))
        return held / len(self.batch.y) / max(len(self.standing.y), 1)

    def points(self, lost: int) -> float:
        """Percentage points of robust accuracy, if so many of `standing` are lost."""
        return 100 * lost * self.share_standing

    def _rows(self, chosen: Tensor) -> Batch:
        return Batch(*(column[chosen] for column in self.batch))

    # -- the evaluation --------------------------------------------------------------------------------------------

    @property
    def threat(self) -> ThreatModel:
        return self.evaluation.threat

    @cached_property
    def rows(self) -> Mapping[int, Sequence[Verdict]]:
        """Every verdict of the evaluation, by image."""
        found: dict[int, list[Verdict]] = defaultdict(list)
        for row in self.evaluation.rows:
            found[row.sample].append(row)
        return found

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The attacks that the headline counts, as they run on a model of so many classes."""
        counted = [member for member in self.protocol.members if member.name not in self.evaluation.aside]
        return tuple(replace(member, attack=fitted(member.attack, self.classes)) for member in counted)

    @cached_property
    def principal(self) -> Member | None:
        """The gradient attack on the deployed model that the evaluation leans on: that with the most steps in a run."""
        able = [
            member
            for member in self.members
            if isinstance(member.attack, _GRADIENT_ATTACKS) and member.attack.surface in _DEPLOYED
        ]
        return max(able, key=lambda member: getattr(member.attack, "steps", 1), default=None)

    @cached_property
    def black_box(self) -> frozenset[str]:
        """Names of the members that use no gradient of the model."""
        return frozenset(member.name for member in self.members if isinstance(member.attack, _BLACK_BOX))

    @cached_property
    def broken_by(self) -> Mapping[str, frozenset[int]]:
        """By attack of the headline, the images that it broke."""
        found: dict[str, set[int]] = {member.name: set() for member in self.members}
        for row in self.evaluation.rows:
            if row.verdict == "broken" and row.attack != CLEAN and row.attack in found:
                found[row.attack].add(row.sample)
        return {name: frozenset(samples) for name, samples in found.items()}

    # -- attacks ---------------------------------------------------------------------------------------------------

    def run(self, attack: Attack, batch: Batch, name: str, model: Model | None = None) -> AttackResult:
        """The attack, with random numbers that belong to the check called `name`."""
        seed = derive_seed(self.seed, "honesty", name)
        return self._attacked(attack, batch, lambda ids: SampleRng(seed, ids), self.model if model is None else model)

    @cached_property
    def made_again(self) -> tuple[MadeAgain, ...]:
        """Some errors of each member, with the random numbers of the evaluation."""
        place = {sample: row for row, sample in enumerate(self.batch.ids.tolist())}
        errors = to_make_again(self.evaluation.rows, {member.name for member in self.members}, place)
        found = []
        for member in self.members:
            if member.name in errors:
                rows = [place[row.sample] for row in errors[member.name]]
                part = self._rows(torch.tensor(rows, device=self.batch.y.device))
                result = self._attacked(member.attack, part, partial(member.streams, self.seed), self.model)
                found.append(MadeAgain(member, part, result))
        return tuple(found)

    def _attacked(
        self, attack: Attack, batch: Batch, streams: Callable[[Tensor], SampleRng], model: Model
    ) -> AttackResult:
        pieces = self.in_pieces(batch, lambda piece: attack.run(model, piece.x, piece.y, rng=streams(piece.ids)))
        columns = zip(*pieces, strict=True)
        return AttackResult._make(None if column[0] is None else torch.cat(column) for column in columns)

    def pgd(self, **settings: Any) -> PGD:
        """PGD within the threat, with other settings."""
        return PGD(**settings).within(self.threat)

    def lost(self, attack: Attack, name: str) -> int:
        """How many of `standing` it breaks; unlike the evaluation it may be anything."""
        if not len(self.standing.y):
            return 0
        result = self.run(attack, self.standing, name)
        return int((result.broken | result.invalid).sum())


_BUDGETS = ("steps", "queries", "restarts", "targets", "classes")


def shortened(attack: Attack, steps: int, most: int = 1) -> Attack:
    """The same attack with at most so many steps, and at most so many restarts, targets and classes."""
    limits = {"steps": steps, "queries": steps}
    own = {field.name: getattr(attack, field.name) for field in fields(attack) if field.name in _BUDGETS}
    return replace(attack, **{name: min(value, limits.get(name, most)) for name, value in own.items()})
