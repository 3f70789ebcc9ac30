"""What a ledger says: the union over its attacks, the columns of the papers, each attack and each class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phalanx.errors import CorruptError, InputError
from phalanx.report.columns import Faced
from phalanx.report.headline import CLEAN as CLEAN_COLUMN
from phalanx.report.headline import MINIMUM, WORST, column_of, minimum
from phalanx.report.rate import Rate
from phalanx.runs import Binding, Ledger, Summary, Verdict, summarise
from phalanx.runs.summary import Key, aside_attacks, held_by_all
from phalanx.runs.verdict import CLEAN

Rates = Mapping[str, Rate | None]


@dataclass(frozen=True)
class Book:
    """What a ledger holds."""

    binding: Binding
    clean: Rate
    clean_invalid: int
    faced: tuple[Faced, ...]
    """The attacks that count."""
    released: tuple[Faced, ...]
    """Attacks run to reproduce a paper: they count nowhere."""
    outside: tuple[Faced, ...]
    """Attacks of another norm or a larger radius than the ledger's: they count nowhere either."""
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
    faced = tuple(attack for attack in everything if attack.summary.attack not in aside)
    standing_aside = [attack for attack in everything if attack.summary.attack in aside]
    released = tuple(attack for attack in standing_aside if attack.spec.get("reproduction"))
    outside = tuple(attack for attack in standing_aside if not attack.spec.get("reproduction"))
    return Book(
        binding=binding,
        clean=Rate(found.clean_correct, found.n),
        clean_invalid=sum(row.attack == CLEAN and row.verdict == "invalid" for row in rows),
        faced=faced,
        released=released,
        outside=outside,
        columns=_columns(rows, faced, found),
        released_columns=_released_columns(rows, released, found.n),
        classes=_classes(rows, faced),
        seeds=tuple(sorted({spec["seed"] for spec in declared.values() if "seed" in spec})),
    )


def _columns(rows: Sequence[Verdict], faced: Sequence[Faced], found: Summary) -> Rates:
    choices = _by_column(faced)
    if faced:
        choices[WORST] = [attack.key for attack in faced]
    return {CLEAN_COLUMN: Rate(found.clean_correct, found.n), WORST: None, **_rates(rows, choices, found.n)}


def _released_columns(rows: Sequence[Verdict], released: Sequence[Faced], n: int) -> Mapping[str, Rates]:
    families: dict[str, list[Faced]] = defaultdict(list)
    for attack in released:
        families[attack.summary.attack.partition("@")[0]].append(attack)
    return {name: _rates(rows, _by_column(own), n) for name, own in families.items()}


def _by_column(attacks: Sequence[Faced]) -> dict[str, list[Key]]:
    choices: dict[str, list[Key]] = defaultdict(list)
    for attack in attacks:
        column = column_of(attack.spec, attack.summary.surface)
        if column is not None:
            choices[column].append(attack.key)
    return choices


def _rates(rows: Sequence[Verdict], choices: Mapping[str, Sequence[Key]], n: int) -> dict[str, Rate | None]:
    return {column: Rate(held, n) for column, held in held_by_all(rows, choices).items()}


def _classes(rows: Iterable[Verdict], faced: Sequence[Faced]) -> Mapping[int, tuple[Rate, Rate | None]]:
    by_label: dict[int, list[Verdict]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    keys = [attack.key for attack in faced]
    classes = {}
    for label, own in sorted(by_label.items()):
        n = len({row.sample for row in own})
        held = held_by_all(own, {"clean": (), "worst": keys})
        classes[label] = Rate(held["clean"], n), Rate(held["worst"], n) if faced else None
    return classes
