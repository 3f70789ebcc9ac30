"""Who is to blame for each broken sample: the router that sent it elsewhere, the expert that it was sent to, or both.

The images that broke the model are not kept by a ledger. They are made again: the attack that broke a sample runs once
more on that sample alone, with the same random numbers, which costs a part of what the evaluation cost and proves that
the verdict can be reproduced. Kept images would fill the disk and prove nothing.
"""

# B batch, E experts, G gates

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from phalanx.attacks import SURFACES
from phalanx.data import Batch, ImageSet
from phalanx.evaluation.alone import answer, right
from phalanx.evaluation.gates import GateLook, first_choice, flips, gates_of, reweighs
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import Routed, leaves
from phalanx.runs import Verdict
from phalanx.runs.verdict import CLEAN

Culprit = Literal["router", "expert", "both"]
"""router: under the old route, that of the clean image, the model is still right at x', so the change of route (other
experts, or other weights of the same ones) broke it. expert: the route is the same, and the answer wrong. both: the
route flipped, and under the old one the answer is wrong, too."""
CULPRITS: tuple[Culprit, ...] = get_args(Culprit)


@dataclass(frozen=True)
class Blamed:
    """One broken sample."""

    sample: int
    attack: str
    """The first of the protocol that broke it."""
    culprit: Culprit
    flipped: bool
    """Some gate selects another set of experts at x' or, where it selects them all, weighs another one most."""
    old_right: bool
    """Under the clean image's route, experts and weights, the answer to x' is right."""
    any_right: bool
    """Some single expert is right at x'; with several gates, some j to which every gate that has an expert j is
    forced. Of a dual model likewise, so that combinations of different experts are not tried."""


@dataclass(frozen=True)
class GateMoves:
    """Where one gate sends the broken samples."""

    name: str
    """As in `GateLook`."""
    flipped: int
    moves: tuple[tuple[int, ...], ...]
    """(E, E) samples by the expert that weighs most on the clean image (row) and on x' (column)."""


@dataclass(frozen=True)
class Blame:
    """What `blame` found."""

    samples: tuple[Blamed, ...]
    gates: tuple[GateMoves, ...]
    lost: tuple[int, ...]
    """Samples whose attack, run again, did not break them: random answers, or rounding at the edge."""
    unexplained: tuple[int, ...]
    """Samples broken by an attack only that the protocol does not have."""


class _Columns(NamedTuple):
    """Of the broken samples of a batch, on the CPU."""

    samples: list[Blamed]
    gates: list[GateLook]
    flipped_GB: Tensor


def blame(
    model: Callable[[Tensor], Any],
    images: ImageSet,
    rows: Iterable[Verdict],
    protocol: Protocol,
    *,
    aside: Collection[str] = (),
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Blame:
    """Attributes every one of `images` that `rows` count as broken to router or expert, at the image that broke it.

    Args:
        model: with a route.
        images: those to explain; rows of others are passed over.
        rows: an evaluation's verdicts.
        protocol: its attacks; of several that broke a sample the first is run again.
        aside: attacks that count nowhere.
        batch_size: images attacked at once.
        seed: the evaluation's.
        device: where the model is.
        progress: called with the samples done, their total and the attack's name.
    """
    won, unexplained = _won(rows, protocol.members, aside, set(images.ids.tolist()))
    total, done = sum(map(len, won.values())), 0
    found: list[_Columns] = []
    lost: list[int] = []
    for member in protocol.members:
        chosen = images.select(np.flatnonzero(np.isin(images.ids, won[member.name])))
        for batch in chosen.batches(batch_size, device) if len(chosen) else ():
            result = member.attack.run(model, batch.x, batch.y, rng=member.streams(seed, batch.ids))
            lost += batch.ids[~result.broken].tolist()
            if bool(result.broken.any()):
                part = Batch(*(column[result.broken] for column in batch))
                found.append(_explained(model, part, result.x_adv[result.broken], member.name))
            done += len(batch.y)
            if progress is not None:
                progress(done, total, f"who is to blame: {member.name}")
    return Blame(
        samples=tuple(sample for columns in found for sample in columns.samples),
        gates=_moves(found),
        lost=tuple(sorted(lost)),
        unexplained=unexplained,
    )


def _won(
    rows: Iterable[Verdict], members: Sequence[Member], aside: Collection[str], samples: Collection[int]
) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    """By attack the samples that it was the first of the protocol to break; and those that only others broke."""
    order = {member.name: place for place, member in enumerate(members)}
    first: dict[int, int] = {}
    others = set()
    for row in rows:
        if row.verdict != "broken" or row.attack == CLEAN or row.attack in aside or row.sample not in samples:
            continue
        if row.attack in order:
            first[row.sample] = min(first.get(row.sample, len(order)), order[row.attack])
        else:
            others.add(row.sample)
    won: dict[str, list[int]] = {member.name: [] for member in members}
    for sample, place in first.items():
        won[members[place].name].append(sample)
    return won, tuple(sorted(others - first.keys()))


@torch.no_grad()
def _explained(model: Callable[[Tensor], Any], batch: Batch, x_adv: Tensor, attack: str) -> _Columns:
    clean, attacked = answer(model, batch.x), answer(model, x_adv)
    assert clean.route is not None and attacked.route is not None, "only a model with a route has a router to blame"
    gates = gates_of(model, clean.route, attacked.route)
    flipped_GB = torch.stack([flips(gate.clean, gate.attacked) for gate in gates])
    moved_B = flipped_GB.any(0) | torch.stack([reweighs(gate.clean, gate.attacked) for gate in gates]).any(0)
    # where nothing moved the old route is the new one, whose answer is wrong
    old_right_B = moved_B & right(_on_surface("experts", model, x_adv, batch.x, clean), batch.y)
    last = max(leaf.num_experts for leaf in leaves(clean.route))
    alone = [right(_on_surface(f"expert-{j}", model, x_adv, batch.x, clean), batch.y) for j in range(last)]
    any_right_B = torch.stack(alone).any(0)
    flipped_B = flipped_GB.any(0)
    columns = (batch.ids, flipped_B, old_right_B, any_right_B)
    samples = [
        Blamed(sample, attack, _culprit(flipped, old_right), flipped, old_right, any_right)
        for sample, flipped, old_right, any_right in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return _Columns(samples, gates, flipped_GB.cpu())


def _on_surface(name: str, model: Callable[[Tensor], Any], x_adv: Tensor, x: Tensor, clean: Routed) -> Tensor:
    with frozen(model), exact_fp32(), preserved_rng():
        return SURFACES[name](model, x_adv, x, clean).logits


def _culprit(flipped: bool, old_right: bool) -> Culprit:
    if old_right:
        return "router"
    return "both" if flipped else "expert"


def _moves(found: Sequence[_Columns]) -> tuple[GateMoves, ...]:
    if not found:
        return ()
    moves = []
    for place, gate in enumerate(found[0].gates):
        size = gate.clean.num_experts
        table = torch.zeros(size * size, dtype=torch.int64)
        for columns in found:
            look = columns.gates[place]
            pairs = first_choice(look.clean) * size + first_choice(look.attacked)
            table += torch.bincount(pairs.cpu(), minlength=size * size)
        flipped = sum(int(columns.flipped_GB[place].sum()) for columns in found)
        moves.append(GateMoves(gate.name, flipped, tuple(map(tuple, table.reshape(size, size).tolist()))))
    return tuple(moves)
