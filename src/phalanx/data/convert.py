"""From an examined source to decoded images, one at a time: memory is flat in their number."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.data.auto import target_of
from phalanx.data.config import DataConfig
from phalanx.data.decode import Decoded, Target, UnreadableImage, decode
from phalanx.data.problems import Problems
from phalanx.data.source import Source

Sink = Callable[[str, NDArray[np.uint8]], None]
"""Receives the name of a split and one image, (C, H, W) uint8."""


Progress = Callable[[int, int, str], None]
"""Told how many images are done, of how many, and what is done with them."""


class Converted(NamedTuple):
    """What is known once every image was decoded."""

    labels: dict[str, NDArray[np.int64]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def discard(split: str, pixels: NDArray[np.uint8]) -> None:
    """The sink of a check that keeps nothing."""


def convert(source: Source, config: DataConfig, sink: Sink, progress: Progress | None = None) -> Converted:
    """Decode every image of `source`, in order, into `sink`; `progress` hears of each.

    Raises DataProblems naming the files or rows that cannot be used, and those that differ in size or colour.
    """
    problems = Problems(source.title)
    seen = _Seen(problems)
    if progress is not None:
        sink = _counting(sink, sum(source.counts.values()), progress)
    target = target_of(source, config)
    labels = {name: _convert_split(name, source, target, seen, sink) for name in source.counts}
    problems.raise_if_any()
    return Converted(labels, source.class_names or _numbered(labels), (*source.notes, *seen.notes(target)))


def _counting(sink: Sink, total: int, progress: Progress) -> Sink:
    done = itertools.count(1)

    def counted(split: str, pixels: NDArray[np.uint8]) -> None:
        sink(split, pixels)
        progress(next(done), total, "decoding images")

    return counted


def _convert_split(name: str, source: Source, target: Target, seen: _Seen, sink: Sink) -> NDArray[np.int64]:
    labels = []
    noted = len(seen.problems.found)
    for row in source.rows(name, seen.problems):
        try:
            image = decode(row.data, *target)
        except UnreadableImage as reason:
            seen.problems.add(f"{row.where}: {reason}")
            continue
        if seen.accept(row.where, image):
            sink(name, image.pixels)
            labels.append(row.label)
    if len(labels) != source.counts[name] and len(seen.problems.found) == noted and not seen.differs:
        seen.problems.add(f"{name}: {source.counts[name]} images announced, {len(labels)} found; fetch the data again")
    return np.array(labels, dtype=np.int64)


def _numbered(labels: dict[str, NDArray[np.int64]]) -> tuple[str, ...]:
    return tuple(str(k) for k in range(1 + max(int(values.max()) for values in labels.values())))


class _Seen:
    """The images so far: their common shape, and what a report must say of them."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.first: tuple[str, Decoded] | None = None
        self.differs: set[str] = set()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.formats: Counter[str] = Counter()
        self.flattened = 0

    def accept(self, where: str, image: Decoded) -> bool:
        """Count the image; False if it differs from the first in size or colour, each a problem told once."""
        self.sizes[image.stored] += 1
        self.formats[image.format] += 1
        self.flattened += image.flattened
        self.first = self.first or (where, image)
        first_where, first = self.first
        if image.pixels.shape == first.pixels.shape:
            return True
        if image.pixels.shape[1:] != first.pixels.shape[1:]:
            sizes = f"{where} is {_side(image.stored)} pixels but {first_where} is {_side(first.stored)}"
            self._tell("size", f"{sizes}; set data.size, to a number or to auto, for one side length")
        if image.pixels.shape[0] != first.pixels.shape[0]:
            modes = f"{where} is {_mode(image)} but {first_where} is {_mode(first)}"
            self._tell("color", f"{modes}; set data.color to rgb, grey or auto")
        return False

    def _tell(self, what: str, problem: str) -> None:
        if what not in self.differs:
            self.differs.add(what)
            self.problems.add(problem)

    def notes(self, target: Target) -> tuple[str, ...]:
        total = self.sizes.total()
        notes = []
        if self.formats["JPEG"]:
            notes.append(
                f"{self.formats['JPEG']} of {total} images are stored as JPEG (lossy): if the set was"
                " published uncompressed, these are not its pixels"
            )
        if target.size is not None and set(self.sizes) != {(target.size, target.size)}:
            low, high = min(self.sizes), max(self.sizes)
            sizes = _side(low) if low == high else f"{_side(low)} to {_side(high)}"
            notes.append(f"resized {sizes} -> {_side((target.size, target.size))} (bicubic, centre crop)")
        if target.color != "keep":
            notes.append(f"all images brought to {target.color}")
        if self.flattened:
            notes.append(f"{self.flattened} of {total} images have transparency, laid over white")
        return tuple(notes)


def _side(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _mode(image: Decoded) -> str:
    return "grey" if len(image.pixels) == 1 else "colour"
