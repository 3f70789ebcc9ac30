"""From verdicts to the few numbers that are reported, each with its 95 % Wilson interval.

The denominator is always every sample of the ledger; nothing that was not tried, not finished or not finite
counts as robust. Robust accuracy is per sample the worst case over everything tried.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, TypeVar

from phalanx.errors import CorruptError
from phalanx.runs.canonical import JSON
from phalanx.runs.verdict import CLEAN, WORST_FIRST, Outcome, Verdict

Key: TypeAlias = tuple[str, str]
"""An attack and the surface it climbed."""
Name = TypeVar("Name", bound=Hashable)
Specs: TypeAlias = Mapping[str, Mapping[str, JSON]]
"""What each declared attack's name means."""

AUTOATTACK: Mapping[str, tuple[str, ...]] = {
    "Linf": ("apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000"),
    "L2": ("apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000"),
    "L1": ("apgd-100x5", "apgd-t-100x5", "fab-t-100x9", "square-5000"),
}
"""By norm what a ledger calls the members of AutoAttack's standard version: `phalanx.attacks.autoattack.VERSIONS`, for
readers without torch."""


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
    """Samples right on clean input that this attack has still to try: not counted as held. None of submitted images."""
    n: int
    """Every sample of the ledger."""
    spared: int = 0
    """Samples right on clean input that an earlier attack of its cascade has taken, and which it was therefore not to
    try: not counted as held either, so that the accuracy is that after this attack and those before it."""
    routed: int = 0
    """Samples right on clean input that it was tried on and whose route is known; 0 for a model without one."""
    flipped: int = 0
    """Of these, samples whose route it changed, in any restart."""

    @property
    def tried(self) -> int:
        """Samples that have a row of this attack. In a cascade `broken` of them is this attack's share: what it broke
        first."""
        return self.held + self.broken + self.invalid + self.timeout

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
    unfinished; attacks that stand aside have no say."""
    incomplete: int
    """Samples nothing has broken yet, which some attack has still to try: not counted as robust."""
    attacks: tuple[AttackSummary, ...]
    """By attack and surface, sorted, a cascade in its order; without the clean rows, with the attacks that stand
    aside."""

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

    @property
    def standing(self) -> int:
        """Samples right on clean input that nothing has taken yet, tried by everything or not. Over n an upper bound of
        the robust accuracy that these samples will end with, at any moment of an evaluation."""
        return self.robust + self.incomplete


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
    return min((row.verdict for row in rows), key=WORST_FIRST.index)


def _by_key(rows: Sequence[Verdict]) -> Mapping[Key, Sequence[Verdict]]:
    """One sample's rows by (attack, surface), without the clean row."""
    groups: dict[Key, list[Verdict]] = defaultdict(list)
    for row in rows:
        if row.attack != CLEAN:
            groups[row.attack, row.surface].append(row)
    return groups


def _correct(samples: Iterable[Sequence[Verdict]]) -> list[Mapping[Key, Sequence[Verdict]]]:
    """The samples that are right on clean input, each as its attacks' rows."""
    return [_by_key(rows) for rows in samples if _is_clean_correct(rows)]


def radius(eps: JSON) -> float:
    """A radius such as "8/255", "0.03" or 0.03, in the double precision that attacks compute in.

    Raises CorruptError for what is no number.
    """
    try:
        return float(Fraction("".join(str(eps).split())))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise CorruptError(f"a ledger's eps must be a number or a fraction, got {eps!r}; evaluate again") from None


def aside_attacks(specs: Specs, norm: str, eps: JSON) -> tuple[str, ...]:
    """Of the attacks declared in `specs`, those that say nothing of the worst case within radius `eps` in `norm`.

    They are the reproductions of published attacks, and the attacks outside the threat: of another norm (Linf where a
    spec has none), or of a larger radius. A smaller one is inside: what it finds lies in the larger ball, too.
    Raises CorruptError for a radius that is no number.
    """
    return tuple(name for name, spec in specs.items() if spec.get("reproduction") or _is_outside(spec, norm, eps))


def _is_outside(spec: Mapping[str, JSON], norm: str, eps: JSON) -> bool:
    # an attack that was given no norm uses Linf
    if (spec.get("norm") or "Linf") != norm:
        return True
    own = spec.get("eps")
    return own is not None and radius(own) > radius(eps)


def external_attacks(specs: Specs) -> tuple[str, ...]:
    """Of the attacks declared in `specs`, the images that somebody submitted (`external` in their spec).

    They are there for some samples only, and nobody has still to try them on the others: they can take a sample away
    from the worst case, and do nothing else.
    """
    return tuple(name for name, spec in specs.items() if spec.get("external"))


def fallen_samples(rows: Iterable[Verdict], attacks: Collection[str]) -> set[int]:
    """The samples that one of the named attacks did not leave held."""
    return {row.sample for row in rows if row.attack in attacks and row.verdict != "held"}


def summarise(rows: Iterable[Verdict], *, aside: Collection[str] = (), attacks: Specs | None = None) -> Summary:
    """The numbers of a ledger's rows, in any order.

    `attacks` are the ledger's declared ones: those without a row yet are then summed up, too, and a cascade (the
    "after" of their specs) is known. A sample wrong on clean input is robust against nothing, whether or not it was
    attacked. The attacks named in `aside` (see `aside_attacks`) are summed up as the others are, and take no part in
    `robust` and `incomplete`. Submitted images (see `external_attacks`) take part where there is a row of them, and
    have nothing left to try elsewhere. Raises CorruptError if a sample has two labels.
    """
    samples, attacks = _by_sample(rows), attacks or {}
    correct = _correct(samples.values())
    keys = _keys(samples.values(), attacks)
    counted = [key for key in keys if key[0] not in aside]
    external = external_attacks(attacks)
    due = [key for key in counted if key[0] not in external]
    outcomes = [{key: _worst(tried[key]) for key in counted if key in tried} for tried in correct]
    standing = [found for found in outcomes if all(outcome == "held" for outcome in found.values())]
    incomplete = sum(not found.keys() >= set(due) for found in standing)
    return Summary(
        n=len(samples),
        clean_correct=len(correct),
        robust=len(standing) - incomplete,
        incomplete=incomplete,
        attacks=tuple(
            _summarise_attack(key, _before(key, attacks), correct, len(samples), due=key[0] not in external)
            for key in keys
        ),
    )


def _keys(samples: Iterable[Sequence[Verdict]], attacks: Specs) -> list[Key]:
    """Every attack and surface that was tried or declared."""
    tried = {(row.attack, row.surface) for found in samples for row in found if row.attack != CLEAN}
    named = {attack for attack, _ in tried}
    untried = {(name, str(spec.get("surface", "whole"))) for name, spec in attacks.items() if name not in named}
    return sorted(tried | untried, key=lambda key: (len(_before(key, attacks)), key))


def _before(key: Key, attacks: Specs) -> Collection[str]:
    """The attacks before it in its cascade."""
    found = attacks.get(key[0], {}).get("after")
    return found if isinstance(found, list | tuple) else ()


def _summarise_attack(
    key: Key, before: Collection[str], correct: Iterable[Mapping[Key, Sequence[Verdict]]], n: int, *, due: bool
) -> AttackSummary:
    tried = [found.get(key, ()) for found in correct]
    taken = [
        any(_worst(rows) != "held" for (attack, _), rows in found.items() if attack in before) for found in correct
    ]
    counts = Counter(
        _worst(rows) if rows else "spared" if was_taken else "untried"
        for rows, was_taken in zip(tried, taken, strict=True)
    )
    routed = [rows for rows in tried if any(row.flipped is not None for row in rows)]
    return AttackSummary(
        *key,
        held=counts["held"],
        broken=counts["broken"],
        invalid=counts["invalid"],
        timeout=counts["timeout"],
        untried=counts["untried"] if due else 0,
        n=n,
        spared=counts["spared"],
        routed=len(routed),
        flipped=sum(any(row.flipped for row in rows) for rows in routed),
    )


def autoattack_keys(attacks: Collection[str], norm: str) -> list[Key]:
    """The members of AutoAttack's standard version among a ledger's declared attacks, if all of them are there: what
    to read AutoAttack's own number from, beside a worst case that may know more. Else none."""
    members = AUTOATTACK.get(norm, ())
    return [(name, "whole") for name in members] if members and {*members} <= {*attacks} else []


def held_by_all(rows: Iterable[Verdict], choices: Mapping[Name, Collection[Key]]) -> dict[Name, int]:
    """How many samples `held_samples` finds for each choice."""
    return {name: len(samples) for name, samples in held_samples(rows, choices).items()}


def held_samples(rows: Iterable[Verdict], choices: Mapping[Name, Collection[Key]]) -> dict[Name, set[int]]:
    """For each choice of attacks, the samples that are right on clean input and held against all of them.

    A sample that one of them has not tried does not count; with nothing chosen, all that are right on clean input do.
    Raises CorruptError if a sample has two labels.
    """
    held = {
        sample: {key for key, tried in _by_key(found).items() if _worst(tried) == "held"}
        for sample, found in _by_sample(rows).items()
        if _is_clean_correct(found)
    }
    return {
        name: {sample for sample, keys in held.items() if keys.issuperset(chosen)} for name, chosen in choices.items()
    }
