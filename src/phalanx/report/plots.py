"""The plots: plain lists in, one SVG element out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from phalanx.report.svg import INK, MUTED, SERIES, figure, render, styled
from phalanx.report.words import clipped

_DASHES = ("-", "--", ":", "-.")
# a longer legend makes a plot taller, not its axes smaller
_LEGEND_LINE, _LEGEND_LINES = 16, 5
_LEAST_APART = 0.07
"""Of the scale, between two numbers written below it."""
_LINE = 18.0
"""Height of one line of the interval plot."""


@dataclass(frozen=True)
class Dot:
    """A share with its interval, all in percent."""

    name: str
    share: float
    low: float
    high: float
    text: str
    """What is written beside it."""
    color: int
    """Which of the series colours, from 0."""


@dataclass(frozen=True)
class Series:
    """A line over the epochs, or over alpha; None leaves a gap."""

    name: str
    at: Sequence[float]
    values: Sequence[float | None]
    color: int
    low: Sequence[float] | None = None
    """With `high`, a band around the line."""
    high: Sequence[float] | None = None


def interval_plot(name: str, groups: Sequence[tuple[str, Sequence[Dot]]], description: str) -> str:
    """A dot and its interval on a scale of 0 to 100 % for each measurement, grouped under headings."""
    lines = sum(1.35 + len(dots) for _, dots in groups)
    with styled(name):
        drawing, axes = figure(430, 44 + _LINE * lines)
        position = 0.0
        for heading, dots in groups:
            position += 0.35
            axes.text(-0.01, position, clipped(heading, 60), ha="left", va="center", weight="bold", clip_on=False)
            for dot in dots:
                position += 1
                _draw_dot(axes, position, dot)
            position += 1
        axes.set(xlim=(0, 100), ylim=(position - 0.2, -0.4), yticks=[])
        axes.set_xlabel("accuracy, % (dot) with its 95 % interval (bar)")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        return render(drawing, description)


def _draw_dot(axes: Axes, position: float, dot: Dot) -> None:
    color = SERIES[dot.color % len(SERIES)]
    # butt: a cap would lengthen the interval; unclipped: an end at 0 or 100 % is drawn whole
    axes.plot(
        [dot.low, dot.high],
        [position, position],
        color=color,
        linewidth=5,
        alpha=0.35,
        solid_capstyle="butt",
        clip_on=False,
    )
    axes.plot([dot.share], [position], color=color, marker="o", markersize=6.5, clip_on=False)
    _write(axes, clipped(dot.name, 26), (0, position), -7, MUTED)
    _write(axes, dot.text, (100, position), 7, INK)


def _write(axes: Axes, text: str, at: tuple[float, float], offset: float, color: str) -> None:
    """Text beside a point: to its right for a positive offset, else to its left."""
    axes.annotate(
        text,
        at,
        (offset, 0),
        textcoords="offset points",
        ha="left" if offset > 0 else "right",
        va="center",
        color=color,
        annotation_clip=False,
    )


def line_plot(
    name: str,
    series: Sequence[Series],
    axis: str,
    description: str,
    *,
    across: str = "epoch",
    percent: bool = False,
    log: bool = False,
) -> str:
    """Lines told apart by dashes as well as by colour.

    Args:
        name: unique on the page.
        series: the lines.
        axis: what they show.
        description: for those who cannot see it.
        across: what runs from left to right; epochs are whole numbers.
        percent: fixes the scale to 0 to 100.
        log: equal ratios of what runs from left to right are equally far apart.
    """
    with styled(name):
        columns = 1 if len(series) <= _LEGEND_LINES else 2
        lines = -(-len(series) // columns)
        drawing, axes = figure(350, 235 + _LEGEND_LINE * max(0, lines - _LEGEND_LINES // columns))
        for number, line in enumerate(series):
            # where the colours begin again, other dashes go with them
            _draw_line(axes, line, _DASHES[(number + number // len(SERIES)) % len(_DASHES)])
        if across == "epoch":
            _epochs_below(axes)
        else:
            if log:
                axes.set_xscale("log")
            _values_below(axes, across, [value for line in series for value in line.at], log)
        axes.set_ylabel(axis)
        if percent:
            axes.set_ylim(0, 100)
        if len(series) > 1:
            drawing.legend(loc="outside upper left", frameon=False, handlelength=2.4, ncols=columns, labelcolor=INK)
        return render(drawing, description)


def _draw_line(axes: Axes, line: Series, dashes: str) -> None:
    color = SERIES[line.color % len(SERIES)]
    values = [math.nan if value is None else value for value in line.values]
    # a lone point makes no line
    marker = "o" if len(values) <= 15 else ""
    axes.plot(line.at, values, dashes, color=color, linewidth=1.7, marker=marker, markersize=3.5, label=line.name)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.at, line.low, line.high, color=color, alpha=0.15, linewidth=0)


def load_plot(name: str, epochs: Sequence[int], loads: Sequence[Sequence[float]], description: str) -> str:
    """The share of the images, in percent, that each expert got in each epoch: stacked, one step an epoch."""
    experts = list(zip(*loads, strict=True))
    edges = [edge for epoch in epochs for edge in (epoch - 0.5, epoch + 0.5)]
    with styled(name):
        drawing, axes = figure(350, 235)
        lower = [0.0] * len(edges)
        for expert, shares in enumerate(experts):
            upper = [low + high for low, high in zip(lower, (s for s in shares for _ in range(2)), strict=True)]
            axes.fill_between(edges, lower, upper, color=SERIES[expert % len(SERIES)], alpha=0.75, linewidth=0)
            if upper[-1] - lower[-1] >= 4:
                _write(axes, f"expert {expert}", (edges[-1], (lower[-1] + upper[-1]) / 2), 5, INK)
            lower = upper
        _epochs_below(axes)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 100), ylabel="share of the images, %")
        return render(drawing, description)


def _epochs_below(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _lined(axes)


def _values_below(axes: Axes, name: str, values: Sequence[float], log: bool) -> None:
    """The values themselves on the scale, or where they are many, round numbers."""
    axes.set_xlabel(name)
    marks = sorted(set(values))
    if len(marks) <= 8:
        marks = _apart(marks, log)
        axes.set_xticks(marks, [f"{mark:,.0f}" if mark >= 1000 else f"{mark:.3g}" for mark in marks])
        axes.set_xticks([], minor=True)
    _lined(axes)


def _apart(marks: Sequence[float], log: bool) -> list[float]:
    """The increasing marks without those that would be written over the one before."""
    at = [math.log(mark) if log else mark for mark in marks]
    kept: list[int] = []
    for place, position in enumerate(at):
        if not kept or position - at[kept[-1]] >= _LEAST_APART * (at[-1] - at[0]):
            kept.append(place)
    return [marks[place] for place in kept]


def _lined(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
