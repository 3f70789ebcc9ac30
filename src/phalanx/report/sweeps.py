"""One kind of attack at several radii or step counts: accuracy as a function of one number, model by model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from phalanx.report.figures import Plot, banded
from phalanx.report.lines import printed
from phalanx.report.page import Attack, Page, Row, Sweep, Swept
from phalanx.report.plots import Series, line_plot
from phalanx.report.words import listed, rated
from phalanx.runs import AttackSummary
from phalanx.runs.canonical import canonical_json
from phalanx.runs.rate import Rate
from phalanx.runs.summary import radius

FEWEST = 3
"""Fewer points are no curve."""

_SWEPT: tuple[tuple[Swept, frozenset[str]], ...] = (
    ("eps", frozenset({"FGSM", "PGD"})),
    ("steps", frozenset({"PGD"})),
)


class _Faced(NamedTuple):
    """An attack, and what it did to each row."""

    attack: Attack
    done: tuple[AttackSummary | None, ...]


def sweeps(rows: Sequence[Row], attacks: Sequence[Attack], outside: Sequence[Attack]) -> tuple[Sweep, ...]:
    """The attacks that differ in their radius alone, or in their steps alone, if some row faced at least three of them.

    Attacks outside the threat are among them: a curve may cross it.
    """
    faced = [_Faced(attack, tuple(row.attacks[place] for row in rows)) for place, attack in enumerate(attacks)]
    faced += [_Faced(attack, tuple(row.outside[place] for row in rows)) for place, attack in enumerate(outside)]
    found = (_sweep(over, alike) for over, kinds in _SWEPT for alike in _alike(faced, over, kinds))
    return tuple(sweep for sweep in found if any(_points(sweep, place) >= FEWEST for place in range(len(rows))))


def _alike(faced: Sequence[_Faced], over: Swept, kinds: frozenset[str]) -> Iterator[Sequence[_Faced]]:
    groups: dict[bytes, list[_Faced]] = defaultdict(list)
    for one in faced:
        spec = one.attack.spec
        if spec.get("attack") in kinds and spec.get(over) is not None:
            groups[canonical_json({key: value for key, value in spec.items() if key != over})].append(one)
    yield from groups.values()


def _sweep(over: Swept, alike: Sequence[_Faced]) -> Sweep:
    by_value: dict[float, list[_Faced]] = defaultdict(list)
    for one in alike:
        by_value[radius(one.attack.spec[over])].append(one)
    values = sorted(by_value)
    return Sweep(
        over=over,
        attacks=tuple(one.attack for value in values for one in by_value[value]),
        values=tuple(values),
        names=tuple(str(by_value[value][0].attack.spec[over]) for value in values),
        rates=tuple(_rates(by_value[value]) for value in values),
    )


def _rates(same: Sequence[_Faced]) -> tuple[Rate | None, ...]:
    """What is left of each row; under namesakes of one value the least. An attack that did not end says nothing yet."""
    by_row = zip(*(one.done for one in same), strict=True)
    ended = ([Rate(done.held, done.n) for done in row if done and not done.untried] for row in by_row)
    return tuple(min(rates, key=lambda rate: rate.share, default=None) for rates in ended)


def _points(sweep: Sweep, row: int) -> int:
    return sum(rates[row] is not None for rates in sweep.rates)


# -- drawn ---------------------------------------------------------------------------------------------------------


def sweep_plot(name: str, page: Page, sweep: Sweep) -> Plot:
    """A line for each row that has a point, with its 95 % intervals as a band. `name` is unique on the page."""
    shown = [place for place in range(len(page.rows)) if _points(sweep, place)]
    series = [_line(sweep, page.rows[place].label, place) for place in shown]
    title = f"Robust accuracy by {_across(sweep)}: {kind(sweep)}"
    names = listed([attack.label for attack in sweep.attacks])
    reported = {row.label: row.reported for row in page.rows}
    points = printed_points([attack.name for attack in sweep.attacks], len(sweep.values), reported)
    return Plot(
        title,
        f"Each attack by itself, in percent of all images; the bands are 95 % intervals: {names}.{points.note}",
        Markup(line_plot(name, series, "accuracy, %", title, across=_across(sweep), percent=True)),
        (_across(sweep), *(f"{page.rows[place].label}, %" for place in shown), *points.head),
        tuple(
            (value, *(rated(rates[place]) for place in shown), *said)
            for value, rates, said in zip(sweep.names, sweep.rates, points.lines, strict=True)
        ),
    )


class PrintedPoints(NamedTuple):
    """What a paper printed of a curve, as further columns of its data."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    """By value."""
    note: str


def printed_points(attacks: Sequence[str], values: int, reported: Mapping[str, Mapping[str, float]]) -> PrintedPoints:
    """The columns of the rows of which something is printed; none where several attacks share a value.

    Args:
        attacks: names of the curve's attacks, by increasing value.
        values: how many values there are.
        reported: by row label and attack.
    """
    told = [label for label, said in reported.items() if any(name in said for name in attacks)]
    if not told or len(attacks) != values:
        return PrintedPoints((), ((),) * values, "")
    return PrintedPoints(
        tuple(f"{label}, reported, %" for label in told),
        tuple(tuple(printed(reported[label].get(name)) for label in told) for name in attacks),
        " What the paper printed stands in the data beside it.",
    )


def _line(sweep: Sweep, label: str, row: int) -> Series:
    points = [(value, rate) for value, rates in zip(sweep.values, sweep.rates, strict=True) if (rate := rates[row])]
    return banded(label, points, row)


def _across(sweep: Sweep) -> str:
    return f"{sweep.attacks[0].norm} radius" if sweep.over == "eps" else "steps"


def kind(sweep: Sweep) -> str:
    """What its attacks have in common, for example "PGD, 50 steps" or "PGD, Linf 8/255, on experts"."""
    spec = sweep.attacks[0].spec
    words = [str(spec["attack"])]
    if sweep.over == "steps":
        words.append(sweep.attacks[0].threat)
    elif "steps" in spec:
        words.append(f"{spec['steps']} steps")
    for key, several in (("restarts", "restarts"), ("eot", "EoT passes")):
        if spec.get(key, 1) != 1:
            words.append(f"{spec[key]} {several}")
    if spec.get("objective") != "cross_entropy":
        words.append(f"objective {spec.get('objective')}")
    if spec.get("surface") != "whole":
        words.append(f"on {spec.get('surface')}")
    return ", ".join(words)
