"""Robust accuracy taken apart: the router, the experts held to their route, each expert, the worst and the best route.

All numbers are of the same images and, but for the ledger's own, of one attack. Each is an upper bound of what it
names, as far as that attack is strong.
"""

# B batch, N all images, E experts

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.attacks import PGD
from phalanx.data import Batch, ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.experts import Part, PartColumns, PartNumbers, choosing_parts, look, numbers
from phalanx.evaluation.ladder import RungColumns, climb, rung, rungs_of
from phalanx.rng import SampleRng, derive_seed
from phalanx.runs.rate import Rate
from phalanx.runs.rungs import Rung
from phalanx.threat import ThreatModel

STEPS = 20
"""Of every attack here. A model with E experts is attacked 6 times, and 3 times for each expert: with 4 experts about
the gradients of 7 times PGD-50 on the same images."""


@dataclass(frozen=True)
class Decomposition:
    """What `decompose` found."""

    attack: str
    n: int
    whole: Rate
    """The ledger's worst case on these images."""
    router: Rate
    """RA-R: only the route is attacked, the experts of the search seeing the clean image; judged on the whole model."""
    experts: Rate
    """RA-E: the route is held at that of the clean image while searching; judged on the whole model."""
    missed: tuple[int, ...]
    """Samples that the ledger counts as robust and that an image made here, within the threat, breaks."""
    parts: tuple[PartNumbers, ...]
    """The model, or both halves of a dual one; without those that have no choice."""
    ladder: tuple[Rung, ...]
    attacks_run: int


class _Columns(NamedTuple):
    router_B: Tensor
    experts_B: Tensor
    rungs: dict[str, RungColumns]
    parts: dict[str, PartColumns]


def decompose(
    model: Callable[[Tensor], Any],
    images: ImageSet,
    standing: Collection[int],
    threat: ThreatModel,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Decomposition:
    """The numbers above, of `images`.

    Args:
        model: with a route that has a choice.
        images: what is attacked.
        standing: ids of the samples that an evaluation counts as robust.
        threat: of every attack, but for the rung of twice its radius.
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: of the random numbers.
        device: where the model is.
        progress: called after every batch with the images done, their total and what is going on.

    Raises InputError for no images.
    """
    if not len(images):
        raise InputError("there are no images to attribute; raise the number of images to evaluate on")
    attack, name = PGD(steps=STEPS).within(threat), f"pgd-{STEPS}"
    seed, parts = derive_seed(seed, "attribution", name), choosing_parts(model, images, device)
    found: list[_Columns] = []
    done = 0
    for batch in images.batches(batch_size, device):
        found.append(_columns(model, parts, batch, attack, seed))
        done += len(batch.y)
        if progress is not None:
            progress(done, len(images), f"router and experts under {name}")
    return _joined(images, parts, found, standing, attack, name, batch_size, seed)


def _columns(model: Callable[[Tensor], Any], parts: Sequence[Part], batch: Batch, attack: PGD, seed: int) -> _Columns:
    on_surface = {}
    for surface in ("router", "experts"):
        rng = SampleRng(derive_seed(seed, surface), batch.ids)
        result = replace(attack, surface=surface).run(model, batch.x, batch.y, rng=rng)
        on_surface[surface] = (~(result.broken | result.invalid)).cpu()
    rungs = {multiple: climb(model, batch, scaled, multiple, seed) for multiple, scaled in rungs_of(attack).items()}
    return _Columns(
        on_surface["router"],
        on_surface["experts"],
        rungs,
        {
            part.name: look(
                model, part, batch, attack, derive_seed(seed, part.name), None if part.name else rungs["1"].held_B
            )
            for part in parts
        },
    )


def _joined(
    images: ImageSet,
    parts: Sequence[Part],
    found: Sequence[_Columns],
    standing: Collection[int],
    attack: PGD,
    name: str,
    batch_size: int,
    seed: int,
) -> Decomposition:
    router_N = torch.cat([columns.router_B for columns in found])
    experts_N = torch.cat([columns.experts_B for columns in found])
    whole_N = torch.from_numpy(np.isin(images.ids, list(standing)))
    attacks = rungs_of(attack)
    rungs = {multiple: [columns.rungs[multiple] for columns in found] for multiple in attacks}
    held_N = router_N & experts_N
    for multiple in set(attacks) - {"2"}:
        held_N &= torch.cat([columns.held_B for columns in rungs[multiple]])
    measured = []
    for part in parts:
        columns = [batch.parts[part.name] for batch in found]
        known_N = None if part.name else whole_N
        made, breaks_N = numbers(part, columns, known_N, images, attack, batch_size, derive_seed(seed, part.name))
        measured.append(made)
        held_N &= ~breaks_N
    return Decomposition(
        attack=name,
        n=len(images),
        whole=Rate.of(whole_N),
        router=Rate.of(router_N),
        experts=Rate.of(experts_N),
        missed=tuple(sorted(images.ids[(whole_N & ~held_N).numpy()].tolist())),
        parts=tuple(measured),
        ladder=tuple(rung(multiple, attacks[multiple].threat.epsilon, columns) for multiple, columns in rungs.items()),
        attacks_run=2 + len(attacks) - 1 + sum(part.attacks_run for part in parts),
    )
