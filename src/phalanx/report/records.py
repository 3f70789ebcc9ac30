"""The JSON files of a folder, read with suspicion: every complaint names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError, InputError
from phalanx.runs.canonical import JSON

RECORD_SCHEMA = 1
"""The newest schema of model.json and evaluation.json that is understood."""


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it comes from. Each reader raises CorruptError for a value of another kind."""

    where: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        return str(self._of(key, str))

    def integer(self, key: str) -> int:
        """A whole number of at least 0."""
        found: int = self._of(key, int)
        if found < 0:
            raise self._wrong(key, "a number of at least 0")
        return found

    def share(self, key: str) -> float:
        """A number in [0, 1]."""
        found = float(self._of(key, int | float))
        if not 0 <= found <= 1:
            raise self._wrong(key, "a number in [0, 1]")
        return found

    def number(self, key: str) -> float | None:
        """A number; None where it is absent, or null because it was not finite."""
        return None if self.values.get(key) is None else float(self._of(key, int | float))

    def shares(self, key: str) -> tuple[float, ...] | None:
        """A list of numbers; None where it is absent or null."""
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, list) or not found or not all(_is_a(share, int | float) for share in found):
            raise self._wrong(key, "a list of numbers")
        return tuple(float(share) for share in found)

    def numbers(self, key: str) -> tuple[float | None, ...]:
        """A list of numbers or nulls."""
        found = self._of(key, list)
        if not all(number is None or _is_a(number, int | float) for number in found):
            raise self._wrong(key, "a list of numbers or nulls")
        return tuple(None if number is None else float(number) for number in found)

    def table(self, key: str) -> tuple[tuple[int, ...], ...]:
        """A square list of lists of whole numbers of at least 0."""
        found = self._of(key, list)
        if not all(isinstance(row, list) and len(row) == len(found) and all(map(_is_count, row)) for row in found):
            raise self._wrong(key, "as many lists of as many whole numbers")
        return tuple(tuple(row) for row in found)

    def fields(self, key: str) -> Fields:
        return Fields(self._place(key), self._of(key, dict))

    def items(self, key: str) -> tuple[Fields, ...]:
        """A list of objects."""
        found = self._of(key, list)
        if not all(isinstance(item, dict) for item in found):
            raise self._wrong(key, "a list of objects")
        return tuple(Fields(f"{self._place(key)}[{place}]", item) for place, item in enumerate(found))

    def _of(self, key: str, kind: Any) -> Any:
        if not _is_a(self.values.get(key), kind):
            raise self._wrong(key, _NAMES.get(kind, "a number"))
        return self.values[key]

    def _wrong(self, key: str, expected: str) -> CorruptError:
        return CorruptError(
            f"{self._place(key)} should be {expected}, got {json.dumps(self.values.get(key))}; restore it from a copy"
        )

    def _place(self, key: str) -> str:
        return f"{self.where}{'.' if ': ' in self.where else ': '}{key}"


_NAMES = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def _is_a(value: object, kind: Any) -> bool:
    # bool is an int to Python, not to JSON
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_a(value, int) and isinstance(value, int) and value >= 0


def read_object(path: Path, *, missing: str) -> Fields:
    """The JSON object in a file. Raises InputError ending in `missing` if there is none, CorruptError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no {path}: {missing}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptError(f"{path} is damaged: it is no JSON object; restore it from a copy")
    return Fields(str(path), found)


def read_record(path: Path, *, missing: str) -> Fields:
    """`read_object` of a file with a schema. Raises InputError, too, if a newer phalanx wrote it."""
    record = read_object(path, missing=missing)
    schema = record.integer("schema")
    if schema > RECORD_SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version reads up to {RECORD_SCHEMA}; use a newer phalanx")
    return record


def flatten(values: Mapping[str, JSON], prefix: str = "") -> dict[str, JSON]:
    """By dotted key, in the order given; a list stays one value."""
    flat: dict[str, JSON] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
