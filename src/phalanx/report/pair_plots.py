"""Two numbers beside each other for each line of a list, and counts from one thing to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import Rectangle

from phalanx.report.svg import INK, MUTED, SERIES, figure, render, styled
from phalanx.report.words import clipped

_LINE = 17.0
"""Height of one line."""
_DOT: dict[str, Any] = {"markersize": 5.5, "clip_on": False}
_DARKEST = 0.45
"""Of a cell of a matrix: numbers stay readable on it, in light and in dark."""


@dataclass(frozen=True)
class Pair:
    """Two numbers of one thing."""

    name: str
    before: float
    after: float | None


def pair_plot(
    name: str,
    pairs: Sequence[Pair],
    heads: tuple[str, str],
    axis: str,
    limits: tuple[float, float],
    description: str,
) -> str:
    """For each line a ring (before), a dot (after) and what lies between; `name` is unique on the page."""
    with styled(name):
        drawing, axes = figure(350, 74 + _LINE * len(pairs))
        for place, pair in enumerate(pairs):
            if pair.after is not None:
                axes.plot([pair.before, pair.after], [place, place], color=SERIES[1], linewidth=2, alpha=0.5)
        places = range(len(pairs))
        axes.plot(
            [one.before for one in pairs], places, "o", color=SERIES[0], markerfacecolor="none", label=heads[0], **_DOT
        )
        values = [math.nan if one.after is None else one.after for one in pairs]
        axes.plot(values, places, "o", color=SERIES[1], label=heads[1], **_DOT)
        axes.set(xlim=limits, ylim=(len(pairs) - 0.4, -0.6), xlabel=axis)
        axes.set_yticks(places, [clipped(pair.name, 18) for pair in pairs])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0, pad=7)
        drawing.legend(loc="outside upper left", frameon=False, ncols=2, handlelength=1.2, labelcolor=INK)
        return render(drawing, description)


def matrix_plot(name: str, counts: Sequence[Sequence[int]], sides: tuple[str, str], description: str) -> str:
    """Counts from row to column, the more the darker; `name` is unique on the page."""
    size = len(counts)
    most = max(max(max(row) for row in counts), 1)
    with styled(name):
        drawing, axes = figure(350, min(260.0, 50 + 42.0 * size))
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                shade = _DARKEST * count / most
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=SERIES[0], alpha=shade, linewidth=0))
                if count and size <= 12:
                    axes.text(column, row, f"{count:,}", ha="center", va="center", color=INK)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), ylabel=sides[0], xlabel=sides[1])
        axes.set_xticks(range(size))
        axes.set_yticks(range(size))
        axes.tick_params(length=0, labelcolor=MUTED)
        axes.spines[["left", "bottom"]].set_visible(False)
        return render(drawing, description)
