"""Numbers and values as people read them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from phalanx.runs.canonical import JSON
from phalanx.runs.rate import Rate

ABSENT = "–"


def percent(share: float) -> str:
    """A share in [0, 1] in percent with one decimal, without the sign."""
    return f"{100 * share:.1f}"


def bounds(rate: Rate) -> str:
    """The 95 % interval in percent: "[56.6, 65.6]"."""
    low, high = rate.interval
    return f"[{percent(low)}, {percent(high)}]"


def rated(rate: Rate | None) -> str:
    """Share and 95 % interval in percent, "61.2 [56.6, 65.6]"; a dash for what was not measured."""
    return ABSENT if rate is None else f"{percent(rate.share)} {bounds(rate)}"


def plural(count: int, noun: str, several: str | None = None) -> str:
    """ "1 image", "2 images"."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def shown(value: JSON) -> str:
    """A value of a file: text as it is, everything else as in the file, lists without brackets."""
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def clipped(text: str, width: int) -> str:
    """The text in at most `width` characters, an ellipsis for what does not fit."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
