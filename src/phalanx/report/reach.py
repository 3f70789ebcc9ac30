"""How much of a mixture's routing is proved, as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields

from phalanx.report.records import Fields
from phalanx.runs.rate import Rate

REACH_TITLE = "Routes that cannot be flipped"
REACH_NOTE = (
    "For a top-1 mixture whose router is linear in the pixels, in closed form and for every perturbation within the "
    "threat: the share of images with a single reachable expert, and the mean number of reachable experts. The number "
    "errs on the high side where there are more than two experts. Contradicted: unflippable images whose route an "
    "attack did change; anything but 0 is a defect."
)
REACH_HEAD = ("model", "n", "proved unflippable, %", "reachable experts, mean", "contradicted")


@dataclass(frozen=True)
class Reach:
    """What an evaluation's record says of it."""

    n: int
    unflippable: int
    reachable: int
    """Experts, summed over the images."""
    contradicted: int

    @property
    def proved(self) -> Rate:
        """Of the images, those with one reachable expert."""
        return Rate(self.unflippable, self.n)

    @property
    def mean(self) -> float:
        """Reachable experts of an image."""
        return self.reachable / self.n if self.n else 0.0


def read_reach(evaluation: Fields | None) -> Reach | None:
    """None where nothing is proved, and of an evaluation that did not end or is older than the proof.

    Raises CorruptError naming the file and the key.
    """
    if evaluation is None or evaluation.values.get("reach") is None:
        return None
    found = evaluation.fields("reach")
    return Reach(**{field.name: found.integer(field.name) for field in fields(Reach)})
