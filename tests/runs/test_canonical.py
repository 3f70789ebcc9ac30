from __future__ import annotations

import math

import pytest

from phalanx.runs.canonical import canonical_json, leaves, non_finite, sha256_json


def test_equal_values_have_one_text() -> None:
    assert canonical_json({"b": [1, 2.0], "a": "é"}) == '{"a":"é","b":[1,2.0]}'.encode()
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.0})


def test_json_is_strict() -> None:
    with pytest.raises(ValueError):
        canonical_json({"loss": math.nan})


def test_leaves_are_named_by_dotted_place() -> None:
    value = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "empty": {}, "name": "st"}
    assert dict(leaves(value)) == {
        "optimizer.lr": 0.1,
        "optimizer.betas.0": 0.9,
        "optimizer.betas.1": 0.99,
        "empty": {},
        "name": "st",
    }


def test_first_non_finite_number_is_found() -> None:
    assert non_finite({"a": [1.0, {"b": -math.inf}], "c": math.nan}) == "a.1.b"
    assert non_finite({"a": [1.0, 10**400]}) is None
