"""Fills a book with verdicts: batch by batch, in each one attack after the other, each written down at once."""

# B batch, E experts

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phalanx.attacks import check_answers
from phalanx.attacks.autoattack import fitted
from phalanx.data import Batch, ImageSet
from phalanx.evaluation.books import Book
from phalanx.evaluation.budget import Limits, OutOfTime, at_most, duration, estimate
from phalanx.evaluation.checks import check_logits, remarks
from phalanx.evaluation.halving import Halving
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.evaluation.rows import attack_rows, clean_rows, timeout_rows
from phalanx.evaluation.standing import Standing
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import load_per_expert, routed
from phalanx.runs import Verdict

Tell: TypeAlias = Callable[[str], None]
Progress: TypeAlias = Callable[[int, int, str], None]


def nobody(message: str) -> None:
    """Hears a message and does nothing."""
    del message


class Filling:
    """One call's work on a book."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        book: Book,
        protocol: Protocol,
        seed: int,
        limits: Limits,
        allow: Collection[str],
        notify: Tell,
        announce: Tell | None,
    ) -> None:
        self._model, self._book, self._protocol, self._seed, self._limits = model, book, protocol, seed, limits
        self._allow, self._notify, self._announce = allow, notify, announce
        self._standing = Standing(protocol, book)
        self._halving = Halving(notify)
        self._declared = False
        self._end = None if limits.seconds is None else time.monotonic() + limits.seconds

    def over(
        self, images: ImageSet, batch_size: int, device: torch.device | str, progress: Progress | None
    ) -> tuple[float, ...] | None:
        """Attacks what is left to attack, until the end or the time is over.

        The share of the images that each expert answers, None before the end or without a route.
        """
        seen, unread = 0, []
        load: Tensor | None = None
        for batch in images.batches(batch_size, device):
            seen += len(batch.y)
            if worked := not self._all_finished(batch):
                load = _sum(load, self._fill(batch, images))
            else:
                unread.append(slice(seen - len(batch.y), seen))
            if worked and self._is_over() and not (seen == len(images) and self._all_finished(batch)):
                return None
            if progress is not None:
                progress(seen, len(images), self._protocol.name)
        for rows in unread:
            for batch in images.select(rows).batches(batch_size, device):
                load = _sum(load, self._read(batch))
        return None if load is None else tuple((load / load.sum()).tolist())

    def _is_over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def _all_finished(self, batch: Batch) -> bool:
        return all(map(self._standing.finished, batch.ids.tolist()))

    def _fill(self, batch: Batch, images: ImageSet) -> Tensor | None:
        """The images of the batch per expert (E,)."""
        first = not self._declared
        load = self._read(batch)
        if first:
            self._prepare(batch, images.ids.tolist())
        for member in self._protocol.members:
            due = [self._standing.due(member, sample) for sample in batch.ids.tolist()]
            if not any(due):
                continue
            chosen = torch.tensor(due, device=batch.x.device)
            part = Batch(*(column[chosen] for column in batch))
            for rows in self._halving.pieces(part, partial(self._attack, member)):
                self._note(rows)
            if self._is_over():
                break
        return load

    def _note(self, rows: Sequence[Verdict]) -> None:
        self._book.add(rows)
        self._standing.add(rows)

    @torch.no_grad()
    def _read(self, batch: Batch) -> Tensor | None:
        """The clean pass; the images per expert (E,)."""
        load: Tensor | None = None
        for rows, logits, part in self._halving.pieces(batch, self._clean):
            self._declare(logits)
            self._note([row for row in rows if not self._standing.judged(row.sample)])
            load = _sum(load, part)
        return load

    def _clean(self, batch: Batch) -> tuple[list[Verdict], Tensor, Tensor | None]:
        with frozen(self._model), exact_fp32(), preserved_rng():
            logits, route = routed(self._model, batch.x)
        check_answers(logits, batch.y)
        load = None if route is None else max(load_per_expert(route), key=len).double() * len(batch.y)
        return clean_rows(batch, logits), logits, load

    def _declare(self, logits: Tensor) -> None:
        """Says what each attack is on this model, once the first answers are there."""
        if self._declared:
            return
        self._declared = True
        check_logits(logits, self._allow)
        for member in self._protocol.members:
            spec = {**fitted(member.attack, logits.shape[1]).spec(), "seed": self._seed}
            self._book.declare_attack(member.name, {**spec, "after": list(member.after)} if member.after else spec)

    def _prepare(self, batch: Batch, samples: Sequence[int]) -> None:
        """What there is to say before the first attack."""
        piece = Batch(*(column[: self._halving.size(len(batch.y))] for column in batch))
        with torch.no_grad():
            _, logits, _ = self._clean(piece)
        for remark in remarks(self._model, piece.x, logits, self._protocol):
            self._notify(remark)
        right = logits.argmax(-1) == piece.y
        if self._announce is None or not bool(right.any()):
            return
        members = [replace(member, attack=fitted(member.attack, logits.shape[1])) for member in self._protocol.members]

        def estimated(batch: Batch) -> dict[str, float]:
            return estimate(self._model, batch, members, self._standing, samples)

        # gradients take more room than the clean pass: of the first images that fit
        left = next(self._halving.pieces(Batch(*(column[right] for column in piece)), estimated))
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in left.items())
        self._announce(f"about {duration(sum(left.values()))} at most: {parts}")

    def _attack(self, member: Member, batch: Batch) -> list[Verdict]:
        attack = member.attack
        rng = member.streams(self._seed, batch.ids)
        try:
            with at_most(self._limits.attack_seconds, self._model):
                result = attack.run(self._model, batch.x, batch.y, rng=rng)
        except OutOfTime:
            return timeout_rows(batch, member)
        assert bool(attack.threat.contains(result.x_adv, batch.x).all()), f"{member.name} left its ball"
        return attack_rows(batch, member, result, attack.threat.distance(result.x_adv, batch.x))


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part
