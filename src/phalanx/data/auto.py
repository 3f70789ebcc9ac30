"""What "auto" means for a set of images: found from their headers, before any is decoded."""

from __future__ import annotations

import warnings

from phalanx.data.config import AUTO_SIZE, DataConfig
from phalanx.data.decode import Target, UnreadableImage, look
from phalanx.data.problems import Problems
from phalanx.data.source import Source

LEAST_SIZE = 32
"""The side to which "auto" enlarges images that differ in size and are smaller."""


def target_of(source: Source, config: DataConfig) -> Target:
    """The size and colour of `config`, "auto" replaced by what the images of `source` ask for.

    Images that cannot be read have no say: `convert` names them.
    """
    size, color = config.size, config.color
    if size != "auto" and color != "auto":
        return Target(size, color)
    sizes, greys = _survey(source)
    if color == "auto":
        color = "keep" if greys <= {True} else "rgb"
    if size == "auto":
        size = _side(sizes)
    return Target(size, color)


def _survey(source: Source) -> tuple[set[tuple[int, int]], set[bool]]:
    """Sizes that occur, and whether images are grey."""
    sizes, greys = set(), set()
    # what is wrong with a row is told when it is decoded
    unheard = Problems(source.title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for split in source.counts:
            for row in source.rows(split, unheard):
                try:
                    size, grey = look(row.data)
                except UnreadableImage:
                    continue
                sizes.add(size)
                greys.add(grey)
    return sizes, greys


def _side(sizes: set[tuple[int, int]]) -> int | None:
    if not sizes:
        return None
    smallest = min(min(size) for size in sizes)
    same = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
    return None if same and smallest <= AUTO_SIZE else min(max(smallest, LEAST_SIZE), AUTO_SIZE)
