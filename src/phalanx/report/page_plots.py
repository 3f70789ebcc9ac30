"""Plots of the analysis: before and after an attack by class and by expert, routes that changed, accuracy by radius."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from phalanx.report.analysis import Analysis
from phalanx.report.attribution import Attribution
from phalanx.report.attribution_tables import moves_tables
from phalanx.report.figures import Plot, banded
from phalanx.report.page import Page, Row
from phalanx.report.pair_plots import Pair, matrix_plot, pair_plot
from phalanx.report.plots import Series, line_plot
from phalanx.report.words import ABSENT, percent, rated

_MOST_LINES = 40
"""Of more classes or experts the table alone is shown."""


def of_row_plots(name: str, row: Row) -> list[Plot]:
    """The drawings of a row's analysis, each with its data; `name` is unique on the page."""
    plots = [*_class_accuracy(f"{name}-classes", row)]
    if row.analysis is not None:
        plots += [*_margins(f"{name}-margins", row, row.analysis), *_loads(f"{name}-load", row, row.analysis)]
    if row.attribution is not None:
        plots += _moves(f"{name}-moves", row, row.attribution)
    return plots


def _class_accuracy(name: str, row: Row) -> Iterator[Plot]:
    pairs = [
        Pair(found.name, 100 * found.clean.share, None if found.worst is None else 100 * found.worst.share)
        for found in row.classes
    ]
    if not 0 < len(pairs) <= _MOST_LINES:
        return
    title = f"Accuracy by class of {row.label}"
    yield Plot(
        "Accuracy by class",
        "Right when clean, and in the worst case over everything tried.",
        Markup(pair_plot(name, pairs, ("clean", "worst case"), "accuracy, %", (0, 100), title)),
        ("class", "n", "SA, %", "worst case, %"),
        tuple((one.name, f"{one.clean.n:,}", rated(one.clean), rated(one.worst)) for one in row.classes),
    )


def _margins(name: str, row: Row, analysis: Analysis) -> Iterator[Plot]:
    found = analysis.margins["model"]
    pairs = [
        Pair(row.class_names[label], clean, attacked)
        for label, (clean, attacked) in enumerate(zip(found.clean, found.attacked, strict=True))
        if clean is not None
    ]
    if not 0 < len(pairs) <= _MOST_LINES:
        return
    title = f"Margins by class of {row.label}"
    yield Plot(
        "Margins by class",
        f"Mean of p_y - max p_k over the images of the class, clean and where {analysis.attack} left them; below 0 the "
        "answer is wrong.",
        Markup(pair_plot(name, pairs, ("clean", "attacked"), "mean margin", (-1, 1), title)),
        ("class", "clean", "attacked"),
        tuple(
            (one.name, *(ABSENT if value is None else f"{value:+.3f}" for value in (one.before, one.after)))
            for one in pairs
        ),
    )


def _loads(name: str, row: Row, analysis: Analysis) -> Iterator[Plot]:
    for number, gate in enumerate(analysis.gates):
        pairs = [
            Pair(f"expert {expert}", 100 * clean, 100 * attacked)
            for expert, (clean, attacked) in enumerate(zip(gate.load_clean, gate.load_attacked, strict=True))
        ]
        if len(pairs) > _MOST_LINES:
            continue
        highest = max(max(pair.before, pair.after or 0.0) for pair in pairs)
        of = f", {gate.name}" if gate.name else ""
        yield Plot(
            f"Router load{of}",
            f"Share of the images that each expert gets, clean and under {analysis.attack}.",
            Markup(
                pair_plot(
                    f"{name}-{number}",
                    pairs,
                    ("clean", "attacked"),
                    "share of the images, %",
                    (0, max(10.0, 1.1 * highest)),
                    f"Router load{of} of {row.label}",
                )
            ),
            ("expert", "clean, %", "attacked, %"),
            tuple((one.name, *(percent((value or 0.0) / 100) for value in (one.before, one.after))) for one in pairs),
        )


def _moves(name: str, row: Row, found: Attribution) -> Iterator[Plot]:
    for number, (gate, table) in enumerate(zip(found.gates, moves_tables(found), strict=True)):
        if 0 < len(gate.moves) <= _MOST_LINES:
            drawn = matrix_plot(
                f"{name}-{number}", gate.moves, ("expert when clean", "under attack"), f"{table.title}, {row.label}"
            )
            yield Plot(table.title, table.note, Markup(drawn), table.head, table.lines)


# -- all rows ------------------------------------------------------------------------------------------------------


def radius_plot(page: Page) -> Plot | None:
    """Accuracy under one attack within multiples of the radius, model by model; None where it was not taken apart."""
    rows = [(row, row.attribution) for row in page.rows]
    found = [(row, told) for row, told in rows if told is not None and told.ladder]
    if not found:
        return None
    series = [
        banded(row.label, [(rung.eps, rung.accuracy) for rung in told.ladder], color)
        for color, (row, told) in enumerate(found)
    ]
    steps = sorted({(rung.eps, rung.multiple) for _, told in found for rung in told.ladder})
    attacks = ", ".join(dict.fromkeys(told.attack for _, told in found))
    drawn = line_plot("radius", series, "accuracy, %", "Accuracy by radius", across="radius", percent=True)
    return Plot(
        "Accuracy by radius",
        f"Under {attacks} on the whole model, within multiples of the threat's radius, the last outside it; the bands "
        "are 95 % intervals. One weak attack: what matters is that accuracy falls.",
        Markup(drawn),
        ("radius", "of eps", *(f"{row.label}, %" for row, _ in found)),
        tuple((f"{eps:.4g}", multiple, *(_at(told, eps) for _, told in found)) for eps, multiple in steps),
    )


def _at(told: Attribution, eps: float) -> str:
    return next((rated(rung.accuracy) for rung in told.ladder if rung.eps == eps), ABSENT)


def validation_plot(page: Page) -> Plot | None:
    """Robust accuracy on the validation split by epoch, for two trained rows or more."""
    found = [row for row in page.rows if row.curves.validation]
    if len(found) < 2:
        return None
    series = [_validated(row, color) for color, row in enumerate(found)]
    epochs = sorted({point.epoch for row in found for point in row.curves.validation})
    attacks = "; ".join(dict.fromkeys(row.curves.validation_attack for row in found))
    title = "Robust accuracy while training"
    return Plot(
        title,
        f"On the validation split under {attacks}: a weak attack, made to choose weights and to see instability.",
        Markup(line_plot("validations", series, "accuracy, %", title, percent=True)),
        ("epoch", *(f"{row.label}, %" for row in found)),
        tuple((str(epoch), *(_robust_at(row, epoch) for row in found)) for epoch in epochs),
    )


def _validated(row: Row, color: int) -> Series:
    points: Sequence[tuple[int, float]] = [(one.epoch, 100 * one.robust.share) for one in row.curves.validation]
    return Series(row.label, [epoch for epoch, _ in points], [share for _, share in points], color)


def _robust_at(row: Row, epoch: int) -> str:
    return next((percent(point.robust.share) for point in row.curves.validation if point.epoch == epoch), ABSENT)
