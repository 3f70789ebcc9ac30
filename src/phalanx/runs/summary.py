"""From verdicts to the few numbers that are reported, each with its 95 % Wilson interval.

The denominator is always every sample of the ledger; nothing that was not tried, not finished or not finite
counts as robust. Robust accuracy is per sample the worst case over everything tried.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from phalanx.errors import CorruptError
from phalanx.runs.verdict import CLEAN, Outcome, Verdict

# of one sample's restarts, the first outcome in this order is the one that counts
_WORST_FIRST: tuple[Outcome, ...] = ("broken", "invalid", "timeout", "held")


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion, in [0, 1]; z = 1.959964 gives 95 %. (0, 1) for n = 0.

    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in 0..n={n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at the ends the interval touches 0 or 1 exactly; rounding must not move it
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


@dataclass(frozen=True, slots=True)
class AttackSummary:
    """What one attack on one surface did, each sample counted once by its worst restart."""

    attack: str
    surface: str
    held: int
    broken: int
    invalid: int
    timeout: int
    untried: int
    """Samples right on clean input that have no row of this attack: not counted as held."""
    n: int
    """Every sample of the ledger."""

    @property
    def accuracy(self) -> float:
        """held / n."""
        return _share(self.held, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.held, self.n)


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole ledger in numbers."""

    n: int
    """Samples."""
    clean_correct: int
    robust: int
    """Samples right on clean input that every attack of these rows has tried and none has broken, found invalid or left
    unfinished."""
    incomplete: int
    """Samples nothing has broken yet, which some attack has still to try: not counted as robust."""
    attacks: tuple[AttackSummary, ...]
    """By attack and surface, sorted; without the clean rows."""

    @property
    def clean_accuracy(self) -> float:
        """clean_correct / n."""
        return _share(self.clean_correct, self.n)

    @property
    def clean_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the clean accuracy."""
        return wilson(self.clean_correct, self.n)

    @property
    def robust_accuracy(self) -> float:
        """robust / n."""
        return _share(self.robust, self.n)

    @property
    def robust_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the robust accuracy."""
        return wilson(self.robust, self.n)


def _share(count: int, n: int) -> float:
    return count / n if n else 0.0


def _by_sample(rows: Iterable[Verdict]) -> Mapping[int, Sequence[Verdict]]:
    samples: dict[int, list[Verdict]] = defaultdict(list)
    for row in rows:
        samples[row.sample].append(row)
    for sample, found in samples.items():
        labels = sorted({row.label for row in found})
        if len(labels) > 1:
            raise CorruptError(f"sample {sample} has the labels {labels}: the rows are of different data")
    return samples


def _is_clean_correct(rows: Sequence[Verdict]) -> bool:
    return all(row.clean_predicted == row.label and (row.attack != CLEAN or row.verdict == "held") for row in rows)


def _worst(rows: Iterable[Verdict]) -> Outcome:
    return min((row.verdict for row in rows), key=_WORST_FIRST.index)


def _outcomes(rows: Sequence[Verdict]) -> dict[tuple[str, str], Outcome]:
    """One sample's worst outcome by (attack, surface), without the clean row."""
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for row in rows:
        if row.attack != CLEAN:
            groups[row.attack, row.surface].append(row)
    return {key: _worst(group) for key, group in groups.items()}


def summarise(rows: Iterable[Verdict]) -> Summary:
    """The numbers of a ledger's rows, in any order.

    A sample wrong on clean input is robust against nothing, whether or not it was attacked.
    Raises CorruptError if a sample has two labels.
    """
    samples = _by_sample(rows)
    correct = {sample: _outcomes(found) for sample, found in samples.items() if _is_clean_correct(found)}
    keys = sorted({(row.attack, row.surface) for found in samples.values() for row in found if row.attack != CLEAN})
    standing = [outcomes for outcomes in correct.values() if all(outcome == "held" for outcome in outcomes.values())]
    incomplete = sum(len(outcomes) < len(keys) for outcomes in standing)
    return Summary(
        n=len(samples),
        clean_correct=len(correct),
        robust=len(standing) - incomplete,
        incomplete=incomplete,
        attacks=tuple(_summarise_attack(key, correct.values(), len(samples)) for key in keys),
    )


def _summarise_attack(
    key: tuple[str, str], correct: Iterable[Mapping[tuple[str, str], Outcome]], n: int
) -> AttackSummary:
    counts = Counter(outcomes.get(key, "untried") for outcomes in correct)
    return AttackSummary(
        *key,
        held=counts["held"],
        broken=counts["broken"],
        invalid=counts["invalid"],
        timeout=counts["timeout"],
        untried=counts["untried"],
        n=n,
    )
