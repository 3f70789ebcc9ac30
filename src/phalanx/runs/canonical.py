"""One text for one value: the JSON that is hashed, compared and stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"


def canonical_json(value: JSON) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. Raises ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def parse_json(content: bytes | str) -> Any:
    """What JSON from a file says. Raises ValueError for what is no JSON, or is nested beyond all sense."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_json(value: JSON) -> str:
    """Hexadecimal sha256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def leaves(value: JSON, where: str = "") -> Iterator[tuple[str, JSON]]:
    """Each leaf with its dotted place (`optimizer.lr`, `milestones.0`); an empty container is a leaf."""
    if isinstance(value, Mapping) and value:
        items: Iterator[tuple[object, JSON]] = iter(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        items = iter(enumerate(value))
    else:
        yield where, value
        return
    for key, child in items:
        yield from leaves(child, f"{where}.{key}" if where else str(key))


def non_finite(value: JSON) -> str | None:
    """The dotted place of the first number that is not finite, or None."""
    for where, leaf in leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return where
    return None
