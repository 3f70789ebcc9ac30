"""The tables of a page's analysis: routes, single experts, margins, classes, training, attacks that count nowhere."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from phalanx.report.analysis import Analysis, Gate, MarginChange
from phalanx.report.counts import HEAD, NOT_COUNTED, NOTE
from phalanx.report.curves import LATE
from phalanx.report.page import Attack, MarginComparison, Page, Row
from phalanx.report.reach import REACH_HEAD, REACH_NOTE, REACH_TITLE
from phalanx.report.table import Table
from phalanx.report.words import ABSENT, bounds, percent, plural, rated
from phalanx.runs import AttackSummary
from phalanx.runs.rate import Rate

# -- all rows ------------------------------------------------------------------------------------------------------


def released_table(page: Page) -> Table | None:
    """What attacks as they were released leave standing, beside the worst case; None if none was run."""
    lines = [
        (row.label, attack.label, f"{done.n:,}", rated(Rate(done.held, done.n)), rated(row.worst))
        for row in page.rows
        for attack, done in zip(page.released, row.released, strict=True)
        if done
    ]
    if not lines:
        return None
    return Table(
        "What the released attacks say of these models",
        "Accuracy under attacks with the defects they were published with, beside the worst case over all others: the "
        "difference is what those defects hide.",
        ("model", "released attack", "n", "accuracy under it, %", "worst case, %"),
        tuple(lines),
    )


def outside_table(page: Page, without: Collection[Attack] = ()) -> Table | None:
    """What attacks outside the threat leave standing, `without` those shown elsewhere; None if there are none."""
    lines = [
        (row.label, attack.label, attack.threat, f"{done.n:,}", rated(Rate(done.held, done.n)))
        for row in page.rows
        for attack, done in zip(page.outside, row.outside, strict=True)
        if done and attack not in without
    ]
    if not lines:
        return None
    return Table(
        "Outside the threat",
        "Accuracy under attacks in another norm, or of a larger radius, than the models were evaluated in: in no other "
        "number of this page.",
        ("model", "attack", "its threat", "n", "accuracy under it, %"),
        tuple(lines),
    )


def across_rows(page: Page) -> list[Table]:
    """Tables that compare the rows: counts, proved routes, what each attack broke, routes changed, classes, stability
    of training, margins."""
    tables = [_counts(page), _reach(page), _shares(page), _flips(page), _classes(page), _stability(page)]
    return [*(table for table in tables if table.lines), *map(_margin_change, page.margin_comparisons)]


def _counts(page: Page) -> Table:
    counted = any(row.counts for row in page.rows)
    lines = [(row.label, *(row.counts.cells if row.counts else NOT_COUNTED)) for row in page.rows if counted]
    return Table("Counts", NOTE, HEAD, tuple(lines))


def _reach(page: Page) -> Table:
    lines = [
        (row.label, f"{reach.n:,}", rated(reach.proved), f"{reach.mean:.2f}", f"{reach.contradicted:,}")
        for row in page.rows
        if (reach := row.reach)
    ]
    return Table(REACH_TITLE, REACH_NOTE, REACH_HEAD, tuple(lines))


def _shares(page: Page) -> Table:
    """Only where some attacks went over what others had left."""
    cascades = any(attack.spec.get("after") for attack in page.attacks)
    lines = [
        (attack.label, *(_broken(row.attacks[place]) for row in page.rows))
        for place, attack in enumerate(page.attacks)
        if cascades
    ]
    return Table(
        "What each attack broke",
        "Of the images that it was tried on. An attack named after another one met only what those before it in their "
        "cascade had left standing: what it broke, it broke first.",
        ("attack", *(row.label for row in page.rows)),
        tuple(lines),
    )


def _broken(done: AttackSummary | None) -> str:
    return ABSENT if done is None else f"{done.broken:,} of {done.tried:,}"


def _flips(page: Page) -> Table:
    lines = [
        (attack.label, *(_flipped(row.attacks[place]) for row in page.rows))
        for place, attack in enumerate(page.attacks)
        if any(done and done.routed for row in page.rows if (done := row.attacks[place]))
    ]
    return Table(
        "Routes changed by each attack",
        "Of the attacked images, the share that another set of experts answers under the attack, in percent.",
        ("attack", *(row.label for row in page.rows)),
        tuple(lines),
    )


def _flipped(done: AttackSummary | None) -> str:
    if done is None or not done.routed:
        return ABSENT
    return f"{percent(done.flipped / done.routed)} of {done.routed:,}"


def _classes(page: Page) -> Table:
    by_row = [{found.name: found for found in row.classes} for row in page.rows]
    names = dict.fromkeys(name for classes in by_row for name in classes)
    lines = []
    for name in names:
        found = [classes.get(name) for classes in by_row]
        sizes = dict.fromkeys(f"{one.clean.n:,}" for one in found if one)
        cells = [cell for one in found for cell in ((rated(one.clean), rated(one.worst)) if one else (ABSENT, ABSENT))]
        lines.append((name, " or ".join(sizes), *cells))
    heads = [head for row in page.rows for head in (f"{row.label}: SA", f"{row.label}: worst case")]
    return Table(
        "Accuracy by class",
        "In percent of the n images of the class.",
        ("class", "n", *heads),
        tuple(lines),
    )


def _stability(page: Page) -> Table:
    return Table(
        "Stability of training",
        "Of the robust accuracy on the validation split, in points: its largest fall from one validation to the next, "
        f"and its standard deviation over the last {LATE}.",
        ("model", "validations", "largest fall", "deviation at the end", "validated under"),
        tuple(
            (
                row.label,
                f"{len(row.curves.validation):,}",
                _share(row.curves.largest_drop),
                _share(row.curves.late_deviation),
                row.curves.validation_attack,
            )
            for row in page.rows
            if row.curves.validation
        ),
    )


def _margin_change(comparison: MarginComparison) -> Table:
    changes = zip(comparison.classes, comparison.clean, comparison.attacked, strict=True)
    return Table(
        f"Margin change by class: {comparison.trained} against {comparison.view}",
        f"Mean margin p_y - max p_k of the class in the trained dual model minus that in the one put together from two "
        f"runs, both at alpha {comparison.alpha:.6g}, clean and under {comparison.attack}: in points of 1/100, and in "
        "percent of the latter's margin.",
        ("class", "clean, points", "clean, %", "attacked, points", "attacked, %"),
        tuple((name, *_change(clean), *_change(attacked)) for name, clean, attacked in changes),
    )


def _change(change: MarginChange | None) -> tuple[str, str]:
    if change is None:
        return ABSENT, ABSENT
    return f"{change.points:+.2f}", ABSENT if change.relative is None else f"{change.relative:+.2f}"


# -- one row -------------------------------------------------------------------------------------------------------


def of_row(row: Row) -> list[Table]:
    """What analysis.json says of the row's gates, its experts and its margins; none without one."""
    if row.analysis is None:
        return []
    return [*_gates(row.analysis), _margins(row.analysis, row.class_names)]


def _gates(analysis: Analysis) -> Iterator[Table]:
    for gate in analysis.gates:
        share = f"{percent(gate.flipped.share)} % {bounds(gate.flipped)}"
        even = math.log(len(gate.experts))
        of_n = plural(analysis.n, "image")
        yield Table(
            _gate_title(gate.name),
            f"Of {of_n}, {share} go to another set of experts under {analysis.attack} on the whole model. "
            f"Entropy of the gate: {_nats(gate.entropy_clean)} nats clean, {_nats(gate.entropy_attacked)} attacked; "
            f"of an even one {even:.2f}. Own: the images that the gate sends to the expert when they are clean. "
            f"RA: under {analysis.attack} on that expert alone.{_oracle(analysis)}",
            (
                "expert",
                "load clean, %",
                "load attacked, %",
                "own images",
                "SA, own, %",
                "RA, own, %",
                "SA, all images, %",
                "RA, all images, %",
            ),
            tuple(_expert(gate, number) for number in range(len(gate.experts))),
        )


def _oracle(analysis: Analysis) -> str:
    if analysis.oracle is None:
        return ""
    clean, robust = (f"{percent(rate.share)} % {bounds(rate)}" for rate in analysis.oracle)
    return (
        f" A gate that knew the label would be right on {clean} and hold {robust}: no accuracy of a model, but what no "
        "gate that sends each image to one of these experts can exceed under this attack."
    )


def _gate_title(name: str) -> str:
    title = "Routing and single experts"
    if name in ("standard", "robust"):
        return f"{title}, {name} half"
    return f"{title}, {name}" if name else title


def _expert(gate: Gate, number: int) -> tuple[str, ...]:
    expert = gate.experts[number]
    rates = [expert.own_clean, expert.own_robust, expert.clean, expert.robust]
    return (
        str(number),
        percent(gate.load_clean[number]),
        percent(gate.load_attacked[number]),
        f"{expert.own_clean.n:,}",
        *(rated(rate) if rate.n else ABSENT for rate in rates),
    )


def _margins(analysis: Analysis, names: Sequence[str]) -> Table:
    left_out = f", without {analysis.invalid:,} whose answer was not finite" if analysis.invalid else ""
    heads = [f"{part}, {state}" for part in analysis.margins for state in ("clean", "attacked")]
    columns = [column for margins in analysis.margins.values() for column in (margins.clean, margins.attacked)]
    return Table(
        "Margins by class",
        f"Mean of p_y - max p_k over the images of the class, in [-1, 1], clean and at the images that "
        f"{analysis.attack} on the whole model found; {plural(analysis.n, 'image')}{left_out}.",
        ("class", "n", *heads),
        tuple(
            (
                names[label],
                f"{count:,}",
                *(_margin(column[label]) for column in columns),
            )
            for label, count in enumerate(analysis.counts)
        ),
    )


def _share(value: float | None) -> str:
    return ABSENT if value is None else percent(value)


def _nats(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _margin(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.3f}"
