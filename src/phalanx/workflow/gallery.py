"""A few images of an evaluation, clean and attacked, for people to look at."""

# K images, C channels, H height, W width, G gates

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.data import Batch, ImageSet
from phalanx.evaluation import Evaluation, Protocol
from phalanx.evaluation.alone import answer
from phalanx.evaluation.gates import first_choice, gates_of
from phalanx.evaluation.protocols import Member
from phalanx.runs import Verdict
from phalanx.runs.verdict import CLEAN

GALLERY_NAME = "gallery.npz"

BROKEN, HELD = 8, 4
"""At most so many images are kept of either kind."""


class _Shown(NamedTuple):
    """Images as one attack left them, on the CPU."""

    x: Tensor
    """(K, C, H, W)"""
    x_adv: Tensor
    y: Tensor
    """(K,) as the next three."""
    ids: Tensor
    predicted: Tensor
    held: Tensor
    before: Tensor
    """(K, G) first expert of each gate that has a choice."""
    after: Tensor


def gallery(
    model: Callable[[Tensor], Any],
    images: ImageSet,
    found: Evaluation,
    protocol: Protocol,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> bytes | None:
    """A few broken images and a few that held, of as many classes as there are, as the content of an .npz file.

    A ledger keeps no image: each is made again with the same random numbers, a broken one by the first attack of the
    protocol that broke it, one that held by the attack that broke the most others. A broken one that does not break
    again is left out. The file has x and x_adv (K, C, H, W) float32 in [0, 1]; y, ids, predicted (K,) int64; held (K,)
    bool; attack (K,) text; before and after (K, G) int64, each gate's first expert, and gates (G,) its names.

    Returns None where nothing was attacked.
    """
    counted = {member.name: member for member in protocol.members if member.name not in found.aside}
    chosen = _chosen(found, counted, {int(i): int(y) for i, y in zip(images.ids, images.labels, strict=True)})
    parts: list[_Shown] = []
    attacks: list[str] = []
    names: tuple[str, ...] = ()
    for name, wanted in chosen.items():
        for batch in images.select(np.flatnonzero(np.isin(images.ids, list(wanted)))).batches(batch_size, device):
            names, part = _attacked(model, batch, counted[name], seed)
            same = part.held == torch.tensor([wanted[sample] for sample in part.ids.tolist()])
            parts.append(_Shown(*(column[same] for column in part)))
            attacks += [name] * int(same.sum())
    if not attacks:
        return None
    columns = {field: torch.cat([getattr(part, field) for part in parts]).numpy() for field in _Shown._fields}
    return _packed({**columns, "attack": np.array(attacks, dtype=np.str_), "gates": np.array(names, dtype=np.str_)})


def _chosen(found: Evaluation, members: Mapping[str, Member], labels: Mapping[int, int]) -> dict[str, dict[int, bool]]:
    """By attack the samples to show after it, and whether they held."""
    first = _first_broken(found.rows, members, labels)
    if not members:
        return {}
    chosen: dict[str, dict[int, bool]] = {name: {} for name in members}
    for sample in _spread(first, labels, BROKEN):
        chosen[first[sample]][sample] = False
    strongest = Counter(dict.fromkeys(members, 0)) + Counter(first.values())
    name = strongest.most_common(1)[0][0] if strongest else next(iter(members))
    for sample in _spread(found.standing & labels.keys(), labels, HELD):
        chosen[name][sample] = True
    return {name: samples for name, samples in chosen.items() if samples}


def _first_broken(rows: Iterable[Verdict], members: Mapping[str, Member], samples: Collection[int]) -> dict[int, str]:
    """The first attack of the protocol that broke each broken sample."""
    order = {name: place for place, name in enumerate(members)}
    first: dict[int, str] = {}
    for row in rows:
        if row.verdict == "broken" and row.attack != CLEAN and row.attack in order and row.sample in samples:
            first[row.sample] = min(first.get(row.sample, row.attack), row.attack, key=order.__getitem__)
    return first


def _spread(samples: Iterable[int], labels: Mapping[int, int], count: int) -> list[int]:
    """The first `count` samples, going around the classes."""
    seen: Counter[int] = Counter()
    turns = {}
    for sample in sorted(samples):
        turns[sample] = seen[labels[sample]]
        seen[labels[sample]] += 1
    return sorted(turns, key=lambda sample: (turns[sample], sample))[:count]


def _attacked(
    model: Callable[[Tensor], Any], batch: Batch, member: Member, seed: int
) -> tuple[tuple[str, ...], _Shown]:
    """The images after the attack, and the names of the gates."""
    result = member.attack.run(model, batch.x, batch.y, rng=member.streams(seed, batch.ids))
    clean, attacked = answer(model, batch.x), answer(model, result.x_adv)
    gates = gates_of(model, clean.route, attacked.route)
    size = (len(batch.y), len(gates))
    before = torch.stack([first_choice(gate.clean) for gate in gates], 1) if gates else batch.y.new_zeros(size)
    after = torch.stack([first_choice(gate.attacked) for gate in gates], 1) if gates else batch.y.new_zeros(size)
    held = ~(result.broken | result.invalid)
    columns = (batch.x, result.x_adv, batch.y, batch.ids, result.predicted, held, before, after)
    return tuple(gate.name for gate in gates), _Shown(*(column.cpu() for column in columns))


def _packed(columns: Mapping[str, NDArray[Any]]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **columns)
    return content.getvalue()
