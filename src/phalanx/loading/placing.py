"""Where a setting was written, for mistakes that only the data or the model show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from phalanx.errors import InputError
from phalanx.loading.problems import RecipeErrors


@contextmanager
def placed(sources: Mapping[str, str]) -> Iterator[None]:
    """Puts file and line before an InputError from inside that is about a setting (`phalanx.errors.about`).

    `sources` are those of `Loaded`. Where nobody wrote the setting, the error names it alone.
    """
    try:
        yield
    except RecipeErrors:
        raise
    except InputError as error:
        if not error.key:
            raise
        place = _place(error.key, sources)
        message = str(error).removeprefix(f"{error.key} ").removeprefix(f"{error.key}: ")
        raise InputError(f"{place}  {error.key}: {message}" if place else f"{error.key}: {message}") from None


def _place(key: str, sources: Mapping[str, str]) -> str | None:
    """Where `key` was written, else where the first key under it was."""
    return sources.get(key) or next((place for other, place in sources.items() if other.startswith(f"{key}.")), None)
