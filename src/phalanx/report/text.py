"""Tables and paragraphs as plain text, in lines of at most `WIDTH` characters."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.report.words import clipped

WIDTH = 100
"""Characters of a line."""

_GAP = "  "


def aligned(head: tuple[str, ...], sides: str, lines: Sequence[tuple[str, ...]]) -> str:
    """Columns at their natural width; text columns ("l") give way until the table fits.

    A head may have several lines. A line of one cell runs across all columns.
    """
    heads = _stacked(head)
    table = [tuple(_printable(cell) for cell in line) for line in (*heads, *lines)]
    widths = [max(map(len, column)) for column in zip(*(line for line in table if len(line) > 1), strict=True)]
    text = [place for place, side in enumerate(sides) if side == "l"]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
        widths[max(text, key=lambda place: widths[place])] -= 1
    rendered = [_spaced(line, widths, sides) for line in table]
    rule = _GAP.join("-" * width for width in widths)
    return "\n".join([*rendered[: len(heads)], rule, *rendered[len(heads) :]])


def _stacked(head: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The lines of a head whose cells may hold several, the last ones on one level."""
    cells = [cell.split("\n") for cell in head]
    height = max(map(len, cells))
    return list(zip(*([""] * (height - len(cell)) + cell for cell in cells), strict=True))


def _spaced(line: tuple[str, ...], widths: Sequence[int], sides: str) -> str:
    if len(line) == 1:
        return clipped(line[0], WIDTH)
    cells = zip(line, widths, sides, strict=True)
    return _GAP.join(
        f"{clipped(cell, width):{'<' if side == 'l' else '>'}{width}}" for cell, width, side in cells
    ).rstrip()


def wrapped(text: str, indent: int = 0) -> str:
    """The text in lines, all but the first one indented."""
    lines = [""]
    for word in _printable(text).split():
        pieces = [word[start : start + WIDTH - indent] for start in range(0, len(word), WIDTH - indent)]
        for piece in pieces:
            if lines[-1].strip() and len(lines[-1]) + 1 + len(piece) > WIDTH:
                lines.append(" " * indent)
            lines[-1] += f" {piece}" if lines[-1].strip() else piece
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Without control characters: a label must not be able to drive the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
