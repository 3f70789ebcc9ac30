"""Matplotlib figures as SVG that lives inside a page: its colours, its font, no address, the same bytes each time."""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# each colour stands for a variable of the page's style sheet, so that a plot follows light and dark
INK, MUTED, RULE = "#1c2430", "#5b6675", "#dde2e8"
SERIES = ("#2b6cb0", "#c2631a", "#3a8a5c", "#7a57a8", "#b5435a", "#24868f", "#97761a", "#66727f")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES, start=1)
}

_DPI = 72
FONT_SIZE = 10.5
"""In units of the view box, which is drawn at about one CSS pixel each."""

_STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: every machine measures, and so lays out, alike
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label with dollar signs is a label
}


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of that many view box units, and its axes. Use inside `styled()`."""
    drawing = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasSVG(drawing)
    return drawing, drawing.add_subplot()


def styled(name: str) -> AbstractContextManager[None]:
    """A context with the page's style; `name` makes the ids inside the SVG unlike those of other plots."""
    # the SVG writer reads these from matplotlib's settings alone; the context puts them back
    settings: Any = {**_STYLE, "svg.hashsalt": name}
    return mpl.rc_context(settings)


def render(drawing: Figure, description: str) -> str:
    """One `<svg>` element, described for those who cannot see it. Call inside the `styled()` that drew the figure."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg")
    written = buffer.getvalue()
    view_box = re.search(r'<svg[^>]* viewBox="([^"]*)"[^>]*>', written)
    assert view_box is not None
    body = _FOREIGN.sub("", written[view_box.end() :])
    # within tags only: text is the user's
    body = _TAG.sub(lambda tag: _adapted(tag[0]), body)
    body = _EMPTY_GROUP.sub("", _UNSEEN.sub("", _BETWEEN_TAGS.sub("><", body))).strip()
    return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(description, quote=True)}">{body}'


# the metadata holds the date and matplotlib's web address, and the style element would apply to the whole page
_FOREIGN = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)
_TAG = re.compile(r"<[a-z][^>]*>")
_BETWEEN_TAGS = re.compile(r">\s+<")
# what is drawn in no colour at all
_UNSEEN = re.compile(r'<path [^>]*style="fill: none"/>')
_EMPTY_GROUP = re.compile(r"<g/>|<defs></defs>")
_NO_ROTATION = re.compile(r' transform="rotate\(-0 [^"]*"')
_FONT = re.compile(r"font: ([a-z0-9]+ )?([\d.]+px) [^;\"]*")
_FONT_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
_GROUP_ID = re.compile(r'(?<=<g) id="[^"]*"')
_DECIMALS = re.compile(r"(\.\d\d)\d+")


def _adapted(tag: str) -> str:
    """A tag with the page's colours and font, without what only adds bytes."""
    for color, variable in _VARIABLES.items():
        tag = tag.replace(color, f"var(--{variable})")
    tag = _FONT.sub(lambda font: f"font-weight: {(font[1] or '400').strip()}; font-size: {font[2]}", tag)
    # the size that nearly all text has stands in the style sheet
    tag = _FONT_FAMILY.sub("", tag).replace(f"font-size: {FONT_SIZE}px; ", "")
    # the groups' ids repeat in every figure and nothing refers to them
    tag = _GROUP_ID.sub("", tag)
    return _DECIMALS.sub(r"\1", _NO_ROTATION.sub("", " ".join(tag.split())))
