"""How much of a top-1 mixture's routing is proved: the images whose route nobody can flip within the threat."""

# B batch, E experts

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

import torch

from phalanx.data import ImageSet
from phalanx.routing import reachable
from phalanx.runs import Verdict
from phalanx.threat import ThreatModel

_BATCH = 1024


@dataclass(frozen=True)
class Reachability:
    """Over the evaluated images."""

    n: int
    unflippable: int
    """Images with one reachable expert: their route is proved to be the same within the threat."""
    reachable: int
    """Reachable experts, summed over the images; the proof errs on the side of counting one too many."""
    contradicted: int
    """Unflippable images whose route some attack within the threat did change. Anything but 0 is a defect."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@torch.no_grad()
def reachability(
    model: object,
    images: ImageSet,
    threat: ThreatModel,
    rows: Iterable[Verdict] = (),
    *,
    aside: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> Reachability | None:
    """What is proved of `model`'s routes on `images`, and what an evaluation's `rows` say to it; rows of the attacks
    `aside` may be outside the threat and are not asked. None where nothing can be proved (see `reachable`)."""
    unflippable: set[int] = set()
    total = 0
    for batch in images.batches(_BATCH, device):
        found_BE = reachable(model, batch.x, threat)
        if found_BE is None:
            return None
        count_B = found_BE.sum(1)
        total += int(count_B.sum())
        unflippable |= set(batch.ids[count_B == 1].tolist())
    flipped = {row.sample for row in rows if row.flipped and row.attack not in aside}
    return Reachability(len(images), len(unflippable), total, len(flipped & unflippable))
