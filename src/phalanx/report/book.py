"""What a ledger says: the union over its attacks, the columns of the papers, each attack and each class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phalanx.errors import CorruptError, InputError
from phalanx.report.columns import Faced
from phalanx.report.headline import ATTACKED, AUTOATTACK, MINIMUM, WORST, column_of, minimum
from phalanx.report.headline import CLEAN as CLEAN_COLUMN
from phalanx.runs import Binding, Ledger, Verdict, summarise
from phalanx.runs.headline import Challenge, challenges
from phalanx.runs.rate import Rate
from phalanx.runs.summary import (
    Key,
    aside_attacks,
    autoattack_keys,
    external_attacks,
    fallen_samples,
    held_by_all,
    held_samples,
)
from phalanx.runs.threats import Coverage, coverage
from phalanx.runs.verdict import CLEAN

Rates = Mapping[str, Rate | None]


@dataclass(frozen=True)
class Book:
    """What a ledger holds."""

    binding: Binding
    samples: frozenset[int]
    """The images, by their position in the source data set."""
    clean: Rate
    clean_invalid: int
    faced: tuple[Faced, ...]
    """The attacks that count."""
    released: tuple[Faced, ...]
    """Attacks run to reproduce a paper: they count nowhere."""
    outside: tuple[Faced, ...]
    """Attacks of another norm or a larger radius than the ledger's: they count nowhere either."""
    challenges: tuple[Challenge, ...]
    """Images that somebody submitted: they count in the worst case alone, and can only lower it."""
    unchallenged: Rate | None
    """The worst case without them; None without an attack."""
    threats: tuple[Coverage, ...]
    """What was measured of each kind of attacker."""
    counted: Mapping[str, Sequence[Key]]
    """The attacks whose union each column of the first table is."""
    columns: Rates
    """By column of the first table, without the minimum, whose rule depends on the model; None without an attack."""
    released_columns: Mapping[str, Rates]
    """The same for each released attack, named without its surface."""
    classes: Mapping[int, tuple[Rate, Rate | None]]
    """By label: clean, and the worst case."""
    seeds: tuple[int, ...]

    def filled(self, *, dual: bool) -> Rates:
        """The columns with the papers' minimum for a dual model or for another."""
        return {**self.columns, MINIMUM: minimum(self.columns, dual=dual)}


def read_book(path: Path) -> Book:
    """Raises InputError if the ledger is missing or empty, CorruptError if it is damaged or names an attack that it
    does not declare."""
    with Ledger.read(path) as ledger:
        rows, declared, binding = ledger.rows(), ledger.attacks(), ledger.binding()
    if not rows:
        raise InputError(f"the ledger {path} holds no verdict yet; evaluate the run first")
    unexplained = sorted({row.attack for row in rows} - {CLEAN, *declared})
    if unexplained:
        raise CorruptError(f"the ledger {path} does not say what the attack {unexplained[0]!r} is; evaluate again")
    aside = aside_attacks(declared, binding.norm, binding.eps)
    found = summarise(rows, aside=aside, attacks=declared)
    everything = [Faced(declared[attack.attack], attack) for attack in found.attacks]
    external = external_attacks(declared)
    faced = tuple(attack for attack in everything if attack.summary.attack not in (*aside, *external))
    standing_aside = [attack for attack in everything if attack.summary.attack in aside]
    released = tuple(attack for attack in standing_aside if attack.spec.get("reproduction"))
    outside = tuple(attack for attack in standing_aside if not attack.spec.get("reproduction"))
    fallen = fallen_samples(rows, [name for name in external if name not in aside])
    counted = _counted(faced, binding.norm)
    return Book(
        binding=binding,
        samples=frozenset(row.sample for row in rows),
        clean=Rate(found.clean_correct, found.n),
        clean_invalid=sum(row.attack == CLEAN and row.verdict == "invalid" for row in rows),
        faced=faced,
        released=released,
        outside=outside,
        challenges=challenges(rows, declared, aside=aside),
        unchallenged=_worst(rows, faced, (), found.n),
        threats=coverage(rows, declared, binding.norm, binding.eps),
        counted=counted,
        columns=_columns(rows, faced, counted, fallen),
        released_columns=_released_columns(rows, released, found.n),
        classes=_classes(rows, faced, fallen),
        seeds=tuple(sorted({spec["seed"] for spec in declared.values() if "seed" in spec})),
    )


def _counted(faced: Sequence[Faced], norm: str) -> Mapping[str, Sequence[Key]]:
    choices = _by_column(faced)
    if standard := autoattack_keys([attack.summary.attack for attack in faced], norm):
        choices[AUTOATTACK] = standard
        # it has a column of its own, so that RA stays what the papers call so, wherever something else was tried
        others = _by_column([attack for attack in faced if attack.key not in standard])
        choices[ATTACKED] = others[ATTACKED] or choices[ATTACKED]
    return choices


def _columns(
    rows: Sequence[Verdict], faced: Sequence[Faced], counted: Mapping[str, Sequence[Key]], fallen: Collection[int]
) -> Rates:
    """`fallen` are samples that submitted images took from the worst case."""
    n, clean = len({row.sample for row in rows}), held_by_all(rows, {"": ()})[""]
    return {
        CLEAN_COLUMN: Rate(clean, n),
        WORST: _worst(rows, faced, fallen, n),
        **_rates(rows, counted, n),
    }


def _worst(rows: Sequence[Verdict], faced: Sequence[Faced], fallen: Collection[int], n: int) -> Rate | None:
    if not faced and not fallen:
        return None
    held = held_samples(rows, {"": [attack.key for attack in faced]})[""]
    return Rate(len(held.difference(fallen)), n)


def _released_columns(rows: Sequence[Verdict], released: Sequence[Faced], n: int) -> Mapping[str, Rates]:
    families: dict[str, list[Faced]] = defaultdict(list)
    for attack in released:
        families[attack.summary.attack.partition("@")[0]].append(attack)
    return {name: _rates(rows, _by_column(own), n) for name, own in families.items()}


def _by_column(attacks: Sequence[Faced]) -> dict[str, list[Key]]:
    choices: dict[str, list[Key]] = defaultdict(list)
    for attack in attacks:
        column = column_of(attack.spec, attack.summary.surface)
        if column is not None and _stands_alone(attack, choices.get(column, ())):
            choices[column].append(attack.key)
    return choices


def _stands_alone(attack: Faced, column: Sequence[Key]) -> bool:
    """Whether everything before it in its cascade is in its column: else what others took would count against it."""
    before = attack.spec.get("after")
    return not isinstance(before, list) or {*before} <= {name for name, _ in column}


def _rates(rows: Sequence[Verdict], choices: Mapping[str, Sequence[Key]], n: int) -> dict[str, Rate | None]:
    return {column: Rate(held, n) for column, held in held_by_all(rows, choices).items()}


def _classes(
    rows: Iterable[Verdict], faced: Sequence[Faced], fallen: Collection[int]
) -> Mapping[int, tuple[Rate, Rate | None]]:
    by_label: dict[int, list[Verdict]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    classes = {}
    for label, own in sorted(by_label.items()):
        n = len({row.sample for row in own})
        classes[label] = Rate(held_by_all(own, {"": ()})[""], n), _worst(own, faced, fallen, n)
    return classes
