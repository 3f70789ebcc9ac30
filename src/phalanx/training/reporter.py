"""Where a run tells how it goes."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Where a run tells how it goes."""

    def progress(self, done: int, total: int, note: str) -> None: ...
    def notify(self, message: str) -> None: ...


class Silent:
    """Tells nobody."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Ignored."""

    def notify(self, message: str) -> None:
        """Ignored."""
