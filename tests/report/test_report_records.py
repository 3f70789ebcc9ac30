from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.errors import CorruptError, InputError
from phalanx.report.records import Fields, flatten, read_object, read_record


def test_flatten_keeps_lists_and_empty_objects() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": {}}) == {"a.b": 1, "a.c": [1, 2], "d": {}}


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda fields: fields.integer("text"), r'f: text should be a whole number, got "x"'),
        (lambda fields: fields.integer("yes"), r"f: yes should be a whole number, got true"),
        (lambda fields: fields.integer("below"), r"f: below should be a number of at least 0, got -1"),
        (lambda fields: fields.share("two"), r"f: two should be a number in \[0, 1\], got 2"),
        (lambda fields: fields.share("absent"), r"f: absent should be a number, got null"),
        (lambda fields: fields.number("text"), r"f: text should be a number"),
        (lambda fields: fields.shares("text"), r"f: text should be a list of numbers"),
        (lambda fields: fields.text("two"), r"f: two should be a text, got 2"),
        (lambda fields: fields.fields("two"), r"f: two should be an object"),
        (lambda fields: fields.fields("inner").text("a"), r"f: inner\.a should be a text, got 1"),
    ],
)
def test_a_value_of_another_kind_is_named(read: object, says: str) -> None:
    fields = Fields("f", {"text": "x", "yes": True, "below": -1, "two": 2, "inner": {"a": 1}})
    with pytest.raises(CorruptError, match=says):
        read(fields)  # type: ignore[operator]


def test_what_may_be_absent() -> None:
    fields = Fields("f", {"loss": None})
    assert (fields.number("loss"), fields.number("other"), fields.shares("load")) == (None, None, None)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*a\.json: train first"):
        read_object(tmp_path / "a.json", missing="train first")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(CorruptError, match=r"b\.json is damaged"):
        read_object(tmp_path / "b.json", missing="")
    (tmp_path / "c.json").write_text('{"schema": "1"}')
    with pytest.raises(CorruptError, match=r"c\.json: schema should be a whole number"):
        read_record(tmp_path / "c.json", missing="")
