"""Mistakes that only data or model show are placed like those found while reading."""

from __future__ import annotations

import pytest

from phalanx.errors import InputError, about
from phalanx.loading import Place, Problem, RecipeErrors, placed

SOURCES = {"model.experts": "r.yaml:3", "model.options.hidden": "r.yaml:4", "seed": "--set"}


def _message(key: str, text: str) -> str:
    with pytest.raises(InputError) as caught, placed(SOURCES), about(key):
        raise InputError(text)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_the_line_of_the_key_or_of_the_first_one_under_it() -> None:
    assert _message("model.experts", "too many") == "r.yaml:3  model.experts: too many"
    assert _message("model", "too large") == "r.yaml:3  model: too large"
    assert _message("model.options", "no option x") == "r.yaml:4  model.options: no option x"
    assert _message("seed", "odd") == "--set  seed: odd"
    # nobody wrote it
    assert _message("training.epochs", "too few") == "training.epochs: too few"


def test_a_key_is_said_once() -> None:
    assert _message("seed", "seed: odd") == "--set  seed: odd"
    assert _message("seed", "seed must be even") == "--set  seed: must be even"


def test_keys_nest_and_the_innermost_stays() -> None:
    with pytest.raises(InputError) as caught, about("model"), about("options"):
        raise InputError("odd", key="hidden")
    assert (caught.value.key, str(caught.value)) == ("model.options.hidden", "odd")


def test_other_errors_pass() -> None:
    with pytest.raises(InputError, match=r"^about nothing$"), placed(SOURCES):
        raise InputError("about nothing")
    page = RecipeErrors([Problem(Place("r.yaml", 1), ("seed",), "odd")])
    with pytest.raises(RecipeErrors) as caught, placed(SOURCES), about("seed"):
        raise page
    assert caught.value is page
    with pytest.raises(KeyError), placed(SOURCES), about("seed"):
        raise KeyError("seed")
