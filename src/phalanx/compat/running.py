"""One evaluation as AutoAttack runs it: clean pass, then attack by attack over all images."""

# N images of the evaluation, B batch

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phalanx.attacks import check_answers
from phalanx.attacks.autoattack import fitted
from phalanx.compat.state import State
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.evaluation import Member, Protocol, autoattack_log
from phalanx.evaluation.checks import check_logits, remarks
from phalanx.evaluation.filling import Tell
from phalanx.evaluation.halving import Halving
from phalanx.evaluation.rows import attack_rows, clean_rows
from phalanx.evaluation.standing import Standing
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import routed
from phalanx.runs import Verdict
from phalanx.runs.verdict import CLEAN

_SQUARE_GAIN = 0.002
"""A search without gradients that takes so much more says that the gradients mislead (AutoAttack's own threshold)."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images (N, ...), labels (N,), and how they are batched."""

    x: Tensor
    y: Tensor
    bs: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Those at `rows`, by default all."""
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), self.bs):
            ids = torch.tensor(rows[start : start + self.bs], dtype=torch.int64)
            x, y = self.x[ids.to(self.x.device)], self.y[ids.to(self.y.device)].long()
            yield Batch(x.to(self.device), y.to(self.device), ids.to(self.device))


class Run:
    """Fills a state; `say` hears the log, `warn` what must be known about the model."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        state: State,
        chosen: Protocol,
        images: Images,
        seed: int,
        say: Tell,
        warn: Tell,
    ) -> None:
        self._model, self._state, self._protocol, self._images = model, state, chosen, images
        self._seed, self._say, self._warn = seed, say, warn
        self._standing, self._halving = Standing(chosen, state.book), Halving(warn)

    def through(self, names: Sequence[str]) -> float:
        """Runs every attack, `names` being what the log calls them; the robust accuracy, a share."""
        self._say(autoattack_log.using(self._protocol.name, names))
        resumed = self._standing.judged(0)
        self._clean()
        accuracies = {"clean": self._accuracy(())}
        self._say(autoattack_log.initial(accuracies["clean"]))
        if resumed:
            so_far = self._accuracy(self._protocol.members)
            self._say(f"robust accuracy at the time of restoring the state: {so_far:.2%}")
        started = time.monotonic()
        for number, (name, member) in enumerate(zip(names, self._protocol.members, strict=True), 1):
            if not min(accuracies.values()):
                break
            self._attack(name, member)
            accuracies[name] = self._accuracy(self._protocol.members[:number])
            self._say(autoattack_log.after(name, accuracies[name], time.monotonic() - started))
        self._doubt(accuracies)
        return min(accuracies.values())

    def _accuracy(self, members: Sequence[Member]) -> float:
        """The share of the images that are right when clean, and that none of these has taken."""
        standing = _held(self._state.book.outcomes(CLEAN, "whole"))
        for member in members:
            outcomes = self._state.book.outcomes(member.name, member.attack.surface)
            standing -= outcomes.keys() - _held(outcomes)
        return len(standing) / len(self._images)

    @torch.no_grad()
    def _clean(self) -> None:
        declared = False
        for batch in self._images.batches():
            for rows, logits, x in self._halving.pieces(batch, self._judged):
                if not declared:
                    self._declare(x, logits)
                    declared = True
                new = [row for row in rows if not self._standing.judged(row.sample)]
                self._state.book.add(new)
                self._standing.add(new)

    def _judged(self, batch: Batch) -> tuple[list[Verdict], Tensor, Tensor]:
        with frozen(self._model), exact_fp32(), preserved_rng():
            logits = routed(self._model, batch.x).logits
        check_answers(logits, batch.y)
        return clean_rows(batch, logits), logits, batch.x

    def _declare(self, x: Tensor, logits: Tensor) -> None:
        """Says what each attack is on this model, and what must be known about the model."""
        try:
            check_logits(logits, ())
        except InputError as error:
            # the reference goes on, too
            self._warn(str(error))
        for remark in remarks(self._model, x, logits, self._protocol):
            self._warn(remark)
        self._state.book.declare_size(len(self._images))
        for member in self._protocol.members:
            spec = {**fitted(member.attack, logits.shape[1]).spec(), "seed": self._seed}
            after = {"after": list(member.after)} if member.after else {}
            self._state.book.declare_attack(member.name, {**spec, **after})

    def _attack(self, name: str, member: Member) -> None:
        due = [sample for sample in range(len(self._images)) if self._standing.due(member, sample)]
        total = -(-len(due) // self._images.bs)
        for number, batch in enumerate(self._images.batches(due), 1):
            broken = 0
            for rows, x_adv in self._halving.pieces(batch, partial(self._attacked, member)):
                self._state.add(rows, x_adv)
                self._standing.add(rows)
                broken += sum(row.verdict != "held" for row in rows)
            self._say(f"{name} - {number}/{total} - {broken} out of {len(batch.y)} successfully perturbed")

    def _attacked(self, member: Member, batch: Batch) -> tuple[list[Verdict], Tensor]:
        rng = SampleRng(derive_seed(self._seed, member.name), batch.ids)
        result = member.attack.run(self._model, batch.x, batch.y, rng=rng)
        distance = member.attack.threat.distance(result.x_adv, batch.x)
        return attack_rows(batch, member, result, distance), result.x_adv

    def _doubt(self, accuracies: Mapping[str, float]) -> None:
        others = [accuracy for name, accuracy in accuracies.items() if name != "square"]
        gain = min(others) - accuracies.get("square", 1.0)
        if len(others) > 1 and gain > _SQUARE_GAIN:
            self._warn(
                f"Square Attack has decreased the robust accuracy by {gain:.2%}, without gradients: they may mislead, "
                "and the robust accuracy be too high; try more queries or an attack made for this model"
            )


def _held(outcomes: Mapping[int, str]) -> set[int]:
    return {sample for sample, outcome in outcomes.items() if outcome == "held"}
