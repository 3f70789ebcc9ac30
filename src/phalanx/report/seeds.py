"""The tables of one study made under several training seeds, as one: mean and deviation, number by number."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from phalanx.errors import InputError
from phalanx.report.findings import ONE_SEED
from phalanx.report.headline import Column
from phalanx.report.page import Notice, NoticeKind, Swept
from phalanx.report.records import Fields
from phalanx.report.threefold import PARTS
from phalanx.report.words import listed, percent, plural
from phalanx.runs.rate import Rate


@dataclass(frozen=True)
class Spread:
    """A share of images under each seed."""

    rates: tuple[Rate, ...]
    """One a seed, in the order of the seeds."""

    @property
    def mean(self) -> float:
        """Of the shares, in [0, 1]."""
        return statistics.fmean(rate.share for rate in self.rates)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the shares (divided by seeds - 1); None for one seed."""
        return statistics.stdev(rate.share for rate in self.rates) if len(self.rates) > 1 else None

    @property
    def text(self) -> str:
        """In percent: "44.0 ± 4.0", of one seed "44.0"."""
        return percent(self.mean) + ("" if self.deviation is None else f" ± {percent(self.deviation)}")


Spreads = Mapping[str, Spread]
"""By name; a number that some seed does not have is left out."""


@dataclass(frozen=True)
class SeedRow:
    """One row of the study."""

    label: str
    n: int
    """Images evaluated, the same under every seed."""
    threat: str
    """That it was attacked within, such as "Linf 3/16"."""
    columns: Spreads
    """By `Column.key`."""
    released: Mapping[str, Spreads]
    """By released attack and `Column.key`."""
    attacks: Spreads
    """By label, those outside the threat among them."""
    threefold: Spreads
    """By `threefold.PARTS`; empty unless every seed has certificates."""
    reported: Mapping[str, float]
    """What a paper printed, in percent."""
    threats: Mapping[str, tuple[Fields, ...]]
    """Of the threat-coverage table by threat each seed's line, where every seed has measured it."""


@dataclass(frozen=True)
class SeedSweep:
    """A curve: accuracy over one number of an attack."""

    kind: str
    """What its attacks have in common."""
    over: Swept
    attacks: tuple[str, ...]
    """Labels, by increasing value."""
    values: tuple[float, ...]
    names: tuple[str, ...]
    """The values as they were written."""
    spreads: tuple[tuple[Spread | None, ...], ...]
    """By value and row."""


@dataclass(frozen=True)
class SeedTable:
    """One study under several seeds."""

    title: str
    description: str
    command: str
    """What makes it again."""
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    attacks: tuple[str, ...]
    """Labels of the attacks, those outside the threat last."""
    rows: tuple[SeedRow, ...]
    reported_source: str
    sweeps: tuple[SeedSweep, ...]
    notices: tuple[Notice, ...]
    """Of every seed; the label says which."""
    summary: tuple[str, ...]
    caveats: tuple[str, ...]


def over_seeds(tables: Sequence[Mapping[str, Any]], command: str) -> SeedTable:
    """One table of several, each the contents of a `table.json`, in their order.

    Args:
        tables: of one study, each under another seed.
        command: what makes all of them again.

    Raises InputError unless they hold the same rows, evaluated on the same images within the same threat by the same
    protocol, under different seeds; CorruptError for what is no table.
    """
    found = [Fields(f"table {number}", table) for number, table in enumerate(tables, start=1)]
    rows = [{row.text("label"): row for row in table.items("rows")} for table in found]
    seeds = _checked_seeds(rows)
    first = found[0]
    columns = tuple(
        Column(column.text("key"), column.text("says"), tuple(map(str, column.values["attacks"])))
        for column in first.items("columns")
    )
    attacks = tuple(a.text("label") for kind in ("attacks", "outside_attacks") for a in first.items(kind))
    made = tuple(_row(label, [seed[label] for seed in rows]) for label in rows[0])
    return SeedTable(
        title=first.text("title"),
        description=first.text("description"),
        command=command,
        seeds=seeds,
        columns=columns,
        attacks=attacks,
        rows=made,
        reported_source=first.text("reported_source"),
        sweeps=_sweeps(found),
        notices=tuple(_notices(found, seeds)),
        summary=(_summary(first, seeds),),
        caveats=_caveats(found, made),
    )


def _checked_seeds(rows: Sequence[Mapping[str, Fields]]) -> tuple[int, ...]:
    if not rows or not all(rows):
        raise InputError("a table over seeds needs at least one table with a row, got none")
    settings = [{label: _setting(row) for label, row in seed.items()} for seed in rows]
    if any(other != settings[0] for other in settings):
        raise InputError("the tables must hold the same rows, images and threat; give the same study's folders")
    seeds = tuple(next(iter(seed.values())).integer("seed") for seed in rows)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the tables must be of different seeds, got {', '.join(map(str, seeds))}")
    return seeds


def _setting(row: Fields) -> tuple[object, ...]:
    measured = row.fields("measurement").values
    images = row.fields("data").values.get("evaluated images (sha256)")
    return row.integer("n"), measured.get("norm"), measured.get("eps"), measured.get("protocol"), images


def _row(label: str, seeds: Sequence[Fields]) -> SeedRow:
    released = [seed.fields("released_columns") for seed in seeds]
    attacks = [{a.text("label"): a for kind in ("attacks", "outside_attacks") for a in s.items(kind)} for s in seeds]
    return SeedRow(
        label=label,
        n=seeds[0].integer("n"),
        threat=_threat(seeds[0]),
        columns=_spreads([_rates(seed.fields("columns")) for seed in seeds]),
        released={
            name: _spreads([_rates(one.fields(name)) for one in released])
            for name in released[0].values
            if all(name in one.values for one in released)
        },
        attacks=_spreads([{name: _rate(attack) for name, attack in seed.items()} for seed in attacks]),
        threefold=_spreads([_threefold(seed) for seed in seeds]),
        reported={key: float(value) for key, value in seeds[0].fields("reported").values.items()},
        threats=_threats(seeds),
    )


def _threat(row: Fields) -> str:
    return " ".join(str(row.fields("measurement").values.get(part)) for part in ("norm", "eps"))


def _threefold(row: Fields) -> dict[str, Rate]:
    # tables written before there were certificates say nothing of them
    if row.values.get("threefold") is None:
        return {}
    found = row.fields("threefold")
    return {part: Rate(found.integer(part), found.integer("n")) for part in PARTS}


def _threats(seeds: Sequence[Fields]) -> dict[str, tuple[Fields, ...]]:
    # tables written before there was this one have none
    by_seed = [
        {line.text("threat"): line for line in seed.items("threats")} if "threats" in seed.values else {}
        for seed in seeds
    ]
    shared = [threat for threat in by_seed[0] if all(threat in seed for seed in by_seed)]
    lines = {threat: tuple(seed[threat] for seed in by_seed) for threat in shared}
    return {threat: own for threat, own in lines.items() if all(line.text("status") != "not measured" for line in own)}


def _rates(columns: Fields) -> dict[str, Rate]:
    return {key: _rate(columns.fields(key)) for key, value in columns.values.items() if value is not None}


def _rate(counts: Fields) -> Rate:
    return Rate(counts.integer("held"), counts.integer("n"))


def _spreads(seeds: Sequence[Mapping[str, Rate]]) -> Spreads:
    shared = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return {name: Spread(tuple(seed[name] for seed in seeds)) for name in shared}


def _sweeps(tables: Sequence[Fields]) -> tuple[SeedSweep, ...]:
    """The curves that every seed has."""
    by_seed = [{_swept(sweep): sweep for sweep in table.items("sweeps")} for table in tables]
    shared = [key for key in by_seed[0] if all(key in seed for seed in by_seed)]
    return tuple(_sweep([seed[key] for seed in by_seed]) for key in shared)


def _swept(sweep: Fields) -> tuple[object, ...]:
    return sweep.text("attack"), sweep.text("over"), sweep.numbers("values")


def _sweep(seeds: Sequence[Fields]) -> SeedSweep:
    first = seeds[0]
    curves = [[_accuracies(row) for row in seed.items("rows")] for seed in seeds]
    by_row = [[_whole(rates) for rates in zip(*row, strict=True)] for row in zip(*curves, strict=True)]
    return SeedSweep(
        kind=first.text("attack"),
        over=cast(Swept, first.text("over")),
        attacks=tuple(map(str, first.values["attacks"])),
        values=tuple(map(float, first.values["values"])),
        names=tuple(map(str, first.values["as_written"])),
        spreads=tuple(zip(*by_row, strict=True)),
    )


def _accuracies(row: Fields) -> list[Rate | None]:
    place = f"{row.where}.accuracies"
    return [None if counts is None else _rate(Fields(place, counts)) for counts in row.values["accuracies"]]


def _whole(rates: Sequence[Rate | None]) -> Spread | None:
    known = tuple(rate for rate in rates if rate is not None)
    return Spread(known) if len(known) == len(rates) else None


def _notices(tables: Sequence[Fields], seeds: Sequence[int]) -> Iterator[Notice]:
    for table, seed in zip(tables, seeds, strict=True):
        for notice in table.items("notices"):
            label = f"{notice.text('label')}, seed {seed}"
            yield Notice(cast(NoticeKind, notice.text("kind")), label, notice.text("text"))


def _summary(table: Fields, seeds: Sequence[int]) -> str:
    rows = table.items("rows")
    data = listed(list(dict.fromkeys(str(row.fields("data").values.get("trained on")) for row in rows)))
    threats = dict.fromkeys(map(_threat, rows))
    return (
        f"{plural(len(rows), 'model')} on {data}, each trained with {plural(len(seeds), 'seed')} "
        f"({listed(list(map(str, seeds)))}) and attacked within {listed(list(threats))}."
    )


def _caveats(tables: Sequence[Fields], rows: Sequence[SeedRow]) -> tuple[str, ...]:
    """Those of every seed but the one that several seeds answer, and what a deviation does not say."""
    said = [[str(caveat) for caveat in table.values["caveats"]] for table in tables]
    shared = [caveat for caveat in said[0] if all(caveat in other for other in said)]
    rates = (rate for row in rows for spread in row.columns.values() for rate in spread.rates)
    width = max(high - low for low, high in (rate.interval for rate in rates))
    return (
        *(caveat for caveat in shared if not caveat.startswith(ONE_SEED)),
        f"± is the sample standard deviation over {plural(len(tables), 'training seed')}, on the same images: how far "
        "the luck of training moves a number. It is no interval of the mean, and the choice of images is not in it: "
        f"the 95 % Wilson interval of a single run is up to {percent(width)} points wide.",
    )
