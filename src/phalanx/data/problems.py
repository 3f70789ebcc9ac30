"""Mistakes in a data set, collected so that the user mends them in one go."""

from __future__ import annotations

from pathlib import Path

from phalanx.errors import InputError

MAX_PROBLEMS = 10


class DataProblems(InputError):
    """One or more things wrong with a data set; `problems` holds one sentence each."""

    def __init__(self, title: str, problems: tuple[str, ...], *, more: bool = False) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        tail = f"\n  (stopped after {len(problems)}; there may be more)" if more else ""
        super().__init__(f"{title}: {count}:\n" + "\n".join(f"  {problem}" for problem in problems) + tail)


class Problems:
    """A list of problems that raises by itself once it is full."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem; the tenth raises DataProblems with all of them."""
        self.found.append(problem)
        if len(self.found) == MAX_PROBLEMS:
            raise DataProblems(self.title, tuple(self.found), more=True)

    def raise_if_any(self) -> None:
        """Raise DataProblems if anything was noted."""
        if self.found:
            raise DataProblems(self.title, tuple(self.found))


def shown(path: Path | str) -> str:
    """A path fit for a terminal: names with control characters or broken encodings appear escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
