"""What is wrong with a recipe, where it was written, and the page that says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phalanx.errors import InputError

KeyPath = tuple[str | int, ...]
"""Mapping keys and list positions from the top of a recipe; () is the recipe itself."""

_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Place:
    """Where a key was written: a line of a file, or a source without lines such as one `--set`."""

    source: str
    line: int | None = None
    """Counted from 1."""
    detail: str = ""

    @property
    def origin(self) -> str:
        """The place without its detail: "recipe.yaml:3" or "--set"."""
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def __str__(self) -> str:
        return f"{self.origin} {_cut(self.detail)}" if self.detail else self.origin


DEFAULT = Place("default")
"""The place of what nobody wrote: values that a configuration type declares."""


@dataclass(frozen=True)
class Problem:
    """One mistake: `message` is the constraint, the value got and the way out."""

    place: Place
    path: KeyPath
    message: str

    @property
    def key(self) -> str:
        """The dotted key, e.g. "model.top_k"; empty when the mistake is the file's and no key's."""
        return dotted(self.path)

    def __str__(self) -> str:
        subject = f"{self.key}: " if self.path else ""
        return f"{printable(str(self.place))}  {subject}{self.message}"


class RecipeErrors(InputError):
    """Every mistake found in a recipe; `str()` is the whole page, one line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: list[Problem] = in_reading_order(problems)
        count = len(self.problems)
        title = f"{count} problem{'' if count == 1 else 's'} in the recipe:"
        super().__init__("\n".join([title, *(f"  {problem}" for problem in self.problems)]))


def in_reading_order(problems: Iterable[Problem]) -> list[Problem]:
    """Files before sources without lines, each in the order met, lines rising within it."""
    found = list(problems)
    sources = list(dict.fromkeys(problem.place.source for problem in found))

    def order(problem: Problem) -> tuple[bool, int, int]:
        place = problem.place
        return place.line is None, sources.index(place.source), place.line or 0

    return sorted(found, key=order)


def printable(text: str) -> str:
    """`text` fit for one line of a terminal: control characters and lone surrogates escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown(value: object) -> str:
    """`value` as a message shows it: one line, at most 60 characters."""
    return _cut(printable(repr(value)))


def dotted(path: KeyPath) -> str:
    """("model", "experts", 0) to "model.experts.0", each key fit to be shown."""
    return ".".join(_cut(printable(str(part))) for part in path)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def either(choices: Sequence[str]) -> str:
    """["a", "b", "c"] to "'a', 'b' or 'c'"."""
    quoted = [f"'{choice}'" for choice in choices]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
