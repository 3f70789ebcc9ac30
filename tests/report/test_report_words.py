from __future__ import annotations

import pytest

from phalanx.report.words import clipped, listed, percent, plural, rated, shown
from phalanx.runs.rate import Rate


def test_numbers() -> None:
    assert percent(0.6123) == "61.2"
    assert percent(1.0) == "100.0"
    assert rated(Rate(0, 4)) == "0.0 [0.0, 49.0]"  # high = z^2 / (n + z^2) = 3.8415 / 7.8415
    assert plural(1, "image") == "1 image"
    assert plural(1200, "image") == "1,200 images"


@pytest.mark.parametrize(("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ("abc", "a, b and c")])
def test_lists(words: list[str], text: str) -> None:
    assert listed(words) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("8/255", "8/255"),
        (True, "true"),
        (3, "3"),
        (0.1 + 0.2, "0.3"),
        ([], "none"),
        (["a", 1], "a, 1"),
        ({}, "{}"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert shown(value) == text  # type: ignore[arg-type]


def test_clipping() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abc def", 5) == "abc…"
