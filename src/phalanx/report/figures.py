"""The plots of a page, each with the table of the numbers in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from phalanx.report.curves import Curves, ValidationPoint
from phalanx.report.page import Attack, Page, Row, Tradeoff
from phalanx.report.plots import Dot, Series, interval_plot, line_plot, load_plot
from phalanx.report.words import ABSENT, bounds, percent, rated
from phalanx.runs.rate import Rate


@dataclass(frozen=True)
class Plot:
    """A drawing and the numbers in it."""

    title: str
    note: str
    svg: Markup
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def intervals(page: Page) -> Plot:
    """Every accuracy with its interval, grouped by row."""
    measured = [(row, _measured(row, page.attacks)) for row in page.rows]
    groups = [
        (f"{row.label} (n = {row.n:,})", [_dot(name, rate, color) for name, rate, color in measurements])
        for row, measurements in measured
    ]
    lines = [
        (row.label, name, f"{rate.n:,}", f"{rate.held:,}", percent(rate.share), bounds(rate))
        for row, measurements in measured
        for name, rate, _ in measurements
    ]
    svg = interval_plot("intervals", groups, "Accuracy with 95 % interval: " + "; ".join(map(_told, lines)))
    head = ("model", "measured", "n", "held", "accuracy, %", "95 % interval")
    return Plot("Accuracy, clean and attacked", "", Markup(svg), head, tuple(lines))


def _told(line: tuple[str, ...]) -> str:
    label, name, n, _, share, interval = line
    return f"{label}, {name}: {share} % {interval}, n = {n}"


def _measured(row: Row, attacks: Sequence[Attack]) -> list[tuple[str, Rate, int]]:
    faced = [
        (f"RA, {attack.label}", Rate(done.held, done.n), place)
        for place, (attack, done) in enumerate(zip(attacks, row.attacks, strict=True), start=1)
        if done
    ]
    several = len(faced) + len(row.challenges) > 1
    worst = [("RA, worst case", row.worst, len(attacks) + 1)] if row.worst is not None and several else []
    return [("SA, clean", row.clean, 0), *worst, *faced]


def _dot(name: str, rate: Rate, color: int) -> Dot:
    low, high = rate.interval
    return Dot(name, 100 * rate.share, 100 * low, 100 * high, rated(rate), color)


def history(name: str, row: Row) -> list[Plot]:
    """How the row's training went; none of a row that is put together from two runs. `name` is unique on the page."""
    curves = row.curves
    plots = []
    if any(point.loss is not None for point in curves.train):
        plots.append(_loss_plot(f"{name}-loss", row.label, curves))
    if curves.validation or any(point.accuracy is not None for point in curves.train):
        plots.append(_accuracy_plot(f"{name}-accuracy", row.label, curves))
    if curves.load:
        plots.append(_load_plot(f"{name}-load", row.label, curves))
    return plots


def _loss_plot(name: str, label: str, curves: Curves) -> Plot:
    epochs = [point.epoch for point in curves.train]
    series = [Series("loss", epochs, [point.loss for point in curves.train], 0)]
    return Plot(
        "Loss",
        "Mean over the epoch, as the method trained on the images.",
        Markup(line_plot(name, series, "loss", f"Training loss of {label} by epoch")),
        ("epoch", "loss", "learning rate", "images without gradient, %"),
        tuple(
            (str(point.epoch), _number(point.loss), _number(point.lr), _share(point.zero_gradient))
            for point in curves.train
        ),
    )


def _accuracy_plot(name: str, label: str, curves: Curves) -> Plot:
    validated = [point.epoch for point in curves.validation]
    robust = [point.robust.interval for point in curves.validation]
    series = [
        Series(
            "training, as trained on",
            [point.epoch for point in curves.train],
            [None if point.accuracy is None else 100 * point.accuracy for point in curves.train],
            0,
        ),
        Series("validation, clean", validated, [100 * point.clean.share for point in curves.validation], 2),
        Series(
            f"validation, {curves.validation_attack}",
            validated,
            [100 * point.robust.share for point in curves.validation],
            1,
            low=[100 * low for low, _ in robust],
            high=[100 * high for _, high in robust],
        ),
    ]
    trained = {point.epoch: point.accuracy for point in curves.train}
    measured = {point.epoch: point for point in curves.validation}
    drawn = [line for line in series if line.at]
    return Plot(
        "Accuracy",
        _validation_note(curves),
        Markup(line_plot(name, drawn, "accuracy, %", f"Accuracy of {label} by epoch", percent=True)),
        ("epoch", "training, %", "validation clean, %", f"validation under {curves.validation_attack}, %", "n"),
        tuple(
            (str(epoch), _share(trained.get(epoch)), *_validated(measured.get(epoch)))
            for epoch in sorted(trained.keys() | measured.keys())
        ),
    )


def _validation_note(curves: Curves) -> str:
    if not curves.validation:
        return "Not validated yet."
    sizes = sorted({point.clean.n for point in curves.validation})
    images = " or ".join(f"{n:,}" for n in sizes)
    return (
        f"Validation on {images} images; robust accuracy under {curves.validation_attack}, "
        "the band is its 95 % interval. The best weights are chosen here, never on the evaluated images."
    )


def _validated(point: ValidationPoint | None) -> tuple[str, ...]:
    if point is None:
        return ABSENT, ABSENT, ABSENT
    return rated(point.clean), rated(point.robust), f"{point.clean.n:,}"


def _load_plot(name: str, label: str, curves: Curves) -> Plot:
    epochs = [epoch for epoch, _ in curves.load]
    experts = max(len(load) for _, load in curves.load)
    loads = [tuple(100 * share for share in load) for _, load in curves.load]
    return Plot(
        "Router load",
        f"Share of the training images that each expert got; even is {percent(1 / experts)} %.",
        Markup(load_plot(name, epochs, loads, f"Share of the images per expert of {label} by epoch")),
        ("epoch", *(f"expert {expert}, %" for expert in range(experts))),
        tuple((str(epoch), *(percent(share) for share in load)) for epoch, load in curves.load),
    )


# -- alpha ---------------------------------------------------------------------------------------------------------


def tradeoff_plot(name: str, page: Page, tradeoff: Tradeoff) -> Plot:
    """SA, RA and the worst case of dual models of the same two runs, by alpha (Figure 3 of the dual-model paper)."""
    rows = [page.rows[place] for place in tradeoff.rows]
    parts: list[tuple[str, int, Callable[[Row], Rate | None]]] = [
        ("SA, clean", 0, lambda row: row.clean),
        ("RA, deployed model", 2, lambda row: row.columns.get("RA")),
        ("RA, worst case", 1, lambda row: row.worst),
    ]
    series = [line for name, color, rate in parts if (line := _by_alpha(name, color, rows, rate)).at]
    halves = f"{tradeoff.standard} (standard) and {tradeoff.robust} (robust)"
    return Plot(
        f"Accuracy by alpha: {halves}",
        "Alpha is the weight of the robust half; the bands are 95 % intervals.",
        Markup(line_plot(name, series, "accuracy, %", f"Accuracy by alpha of {halves}", across="alpha", percent=True)),
        ("alpha", "model", "n", *(f"{name}, %" for name, _, _ in parts)),
        tuple(
            (f"{row.alpha:.6g}", row.label, f"{row.n:,}", *(rated(rate(row)) for _, _, rate in parts)) for row in rows
        ),
    )


def _by_alpha(name: str, color: int, rows: Sequence[Row], rate: Callable[[Row], Rate | None]) -> Series:
    return banded(name, [(row.alpha or 0.0, found) for row in rows if (found := rate(row)) is not None], color)


def banded(name: str, points: Sequence[tuple[float, Rate]], color: int) -> Series:
    """A line through shares, in percent, and the band of their intervals."""
    limits = [rate.interval for _, rate in points]
    return Series(
        name,
        [value for value, _ in points],
        [100 * rate.share for _, rate in points],
        color,
        low=[100 * low for low, _ in limits],
        high=[100 * high for _, high in limits],
    )


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else percent(value)
