"""What a YAML scalar means: the core schema of YAML 1.2.2 (section 10.3.2)."""

from __future__ import annotations

import re

from phalanx.loading.problems import shown
from phalanx.loading.tree import Scalar

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_INTEGER = 20
"""Characters: enough for any signed 64-bit integer in base 10 or 16."""


def scalar(text: str, *, plain: bool) -> Scalar:
    """What `text` means in the YAML 1.2 core schema: `plain` (unquoted), perhaps null or a number.

    Raises ValueError for integers beyond 64 bits and for text that UTF-8 cannot hold.
    """
    if not encodable(text):
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff); write the character itself")
    if not plain:
        return text
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    # float() knows inf and nan without YAML's leading dot
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    number = int(text, bases.get(text[:2], 10)) if len(text) <= _LONGEST_INTEGER else 2**64
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"must be an integer of at most 64 bits, got {shown(text)}; write a smaller one")
    return number


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold `text`: it has no half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
