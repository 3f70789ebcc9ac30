from __future__ import annotations

import math

import pytest

from phalanx.loading.scalars import scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.1 readers take the left column for: a string, false, true, true, 8, 45045, 1000
        ("1e-3", 0.001),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("010", 10),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("0o17", 15),
        ("0x1F", 31),
        ("-5", -5),
        ("+5", 5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2.5E+2", -250.0),
        ("8/255", "8/255"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("", None),
        ("~", None),
        ("null", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("1e", "1e"),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = scalar(text, plain=True)
    assert (type(read), read) == (type(value), value)


def test_nan_is_read() -> None:
    read = scalar(".NaN", plain=True)
    assert isinstance(read, float)
    assert math.isnan(read)


@pytest.mark.parametrize("text", ["1", "true", "null", "", ".inf"])
def test_quoted_is_text(text: str) -> None:
    assert scalar(text, plain=False) == text


@pytest.mark.parametrize("text", [str(2**63), "-" + "9" * 5000, "0xFFFFFFFFFFFFFFFF"])
def test_integers_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be an integer of at most 64 bits, got .*; write a smaller one"):
        scalar(text, plain=True)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        scalar("\ud800", plain=False)
