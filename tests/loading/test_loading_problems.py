from __future__ import annotations

import pytest

from phalanx.errors import InputError
from phalanx.loading.problems import Place, Problem, RecipeErrors, dotted, either, printable, shown


def test_the_page() -> None:
    errors = RecipeErrors(
        [
            Problem(Place("--set", detail="p=1"), ("p",), "no such key"),
            Problem(Place("a.yaml", 9), ("model", "top_k"), "must be an integer, got 'x'"),
            Problem(Place("--set", detail="q=1"), ("q",), "no such key"),
            Problem(Place("a.yaml", 2), ("seed",), "is required; add it"),
            Problem(Place("a.yaml", 4), (), "is empty"),
        ]
    )
    assert str(errors) == (
        "5 problems in the recipe:\n"
        "  a.yaml:2  seed: is required; add it\n"
        "  a.yaml:4  is empty\n"
        "  a.yaml:9  model.top_k: must be an integer, got 'x'\n"
        "  --set p=1  p: no such key\n"
        "  --set q=1  q: no such key"
    )
    assert isinstance(errors, InputError)
    assert errors.exit_code == 2
    assert [problem.key for problem in errors.problems] == ["seed", "", "model.top_k", "p", "q"]


def test_one_problem_is_singular() -> None:
    assert str(RecipeErrors([Problem(Place("a.yaml", 1), (), "is empty")])).startswith("1 problem in")


@pytest.mark.parametrize(
    ("text", "clean"),
    [("é 猫", "é 猫"), ("a\nb\x1b[0m", "a\\nb\\x1b[0m"), ("\ud800", "\\ud800"), ("\u202e", "\\u202e")],
)
def test_nothing_shown_can_disturb_a_terminal(text: str, clean: str) -> None:
    assert printable(text) == clean


def test_long_values_and_keys_are_cut() -> None:
    # 60 characters: the quote, 56 x and the three dots
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert dotted(("a", 0, "y" * 100)) == "a.0." + "y" * 57 + "..."


def test_choices_in_words() -> None:
    assert [either(["a"]), either(["a", "b"]), either(["a", "b", "c"])] == [
        "'a'",
        "'a' or 'b'",
        "'a', 'b' or 'c'",
    ]
