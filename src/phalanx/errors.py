"""The errors a user meets: each is one clear message and one exit code (`docs/guides/exit-codes.md`).

Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PhalanxError(Exception):
    """Base of every error that is reported as one message without a traceback."""

    exit_code = 1


class InputError(PhalanxError, ValueError):
    """What the user gave is wrong: the message says what, where, and the way out."""

    exit_code = 2

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        """The setting it is about, dotted, as far as known where it is raised: see `about`."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """An InputError from inside is about the setting `key`, or about the one under it that it names itself."""
    try:
        yield
    except InputError as error:
        error.key = f"{key}.{error.key}" if error.key else key
        raise


class DivergedError(PhalanxError):
    """Training met a non-finite number; the last finite checkpoint is kept."""

    exit_code = 3


class CorruptError(PhalanxError):
    """A file does not match its recorded sha256, or is cut short."""

    exit_code = 4


class DiskError(PhalanxError):
    """A write failed for want of space or permission; what was there before is intact."""

    exit_code = 5


class LockedError(PhalanxError):
    """Another process holds the run folder."""

    exit_code = 6


class HonestyError(PhalanxError):
    """A check of the numbers themselves failed: they say nothing, and are not to be quoted."""

    exit_code = 7


class Interrupted(PhalanxError):
    """A signal asked the work to stop; it was saved first. Exit code is 128 + the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum
