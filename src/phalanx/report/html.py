"""The page: one HTML file with everything in it, that loads nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from phalanx import __version__
from phalanx.report.page import Attack, Curves, Page, Rate, Row, ValidationPoint
from phalanx.report.plots import Dot, Series, interval_plot, line_plot, load_plot
from phalanx.report.words import ABSENT, bounds, percent, plural, rated, shown
from phalanx.runs.canonical import JSON

_LOOSE = re.compile(r"(?<=Linf) (?=\d)|(?<=L[12]) (?=\d)|(?<=\d) (?=%)|(?<=%) (?=\[)|(?<=\d,) (?=[\d.]+\])")


@dataclass(frozen=True)
class Plot:
    """A drawing and the numbers in it."""

    title: str
    note: str
    svg: Markup
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class GridLine:
    """One key and its value in each column."""

    key: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


@dataclass(frozen=True)
class Grid:
    """Values by key, side by side."""

    head: tuple[str, ...]
    lines: tuple[GridLine, ...]


def render_html(page: Page) -> str:
    """The whole page; the same page gives the same text, byte for byte."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "bounds": bounds,
        "plural": plural,
        "unbroken": _unbroken,
        "rate": lambda attack: Rate(attack.held, attack.n),
    }
    labels = tuple(row.label for row in page.rows)
    return environment.get_template("page.html.j2").render(
        page=page,
        version=__version__,
        intervals=_intervals(page),
        histories=[(row, _history(f"run-{number}", row)) for number, row in enumerate(page.rows)],
        attacks=_grid([attack.label for attack in page.attacks], [attack.spec for attack in page.attacks]),
        data=_grid(labels, [row.data for row in page.rows]),
        measurements=_grid(labels, [row.measurement for row in page.rows]),
        environments=_grid(labels, [row.environment for row in page.rows]),
        settings=_grid(labels, [row.settings for row in page.rows]),
    )


def _template(name: str) -> str:
    return (resources.files("phalanx.report") / "templates" / name).read_text(encoding="utf-8")


def _unbroken(text: str) -> str:
    """The text with every number kept on one line with its unit and its interval."""
    return _LOOSE.sub("\N{NO-BREAK SPACE}", text)


# -- values side by side -------------------------------------------------------------------------------------------


def _grid(head: Sequence[str], columns: Sequence[Mapping[str, JSON]]) -> Grid:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Grid(
        tuple(head),
        tuple(GridLine(key, tuple(shown(column.get(key)) for column in columns)) for key in keys),
    )


# -- plots ---------------------------------------------------------------------------------------------------------


def _intervals(page: Page) -> Plot:
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
    worst = [("RA, worst case", row.worst, len(attacks) + 1)] if row.worst is not None and len(faced) > 1 else []
    return [("SA, clean", row.clean, 0), *worst, *faced]


def _dot(name: str, rate: Rate, color: int) -> Dot:
    low, high = rate.interval
    return Dot(name, 100 * rate.share, 100 * low, 100 * high, rated(rate), color)


def _history(name: str, row: Row) -> list[Plot]:
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
    drawn = [line for line in series if line.epochs]
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


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else percent(value)
