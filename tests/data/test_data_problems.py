from __future__ import annotations

import pytest

from phalanx.data.problems import MAX_PROBLEMS, DataProblems, Problems, shown


def test_all_problems_come_in_one_message() -> None:
    problems = Problems("folder:x")
    problems.raise_if_any()
    problems.add("a is wrong")
    problems.add("b is wrong")
    with pytest.raises(DataProblems, match=r"folder:x: 2 problems:\n  a is wrong\n  b is wrong$") as caught:
        problems.raise_if_any()
    assert caught.value.problems == ("a is wrong", "b is wrong") and caught.value.exit_code == 2


def test_a_full_list_stops_the_work() -> None:
    problems = Problems("x")
    for number in range(MAX_PROBLEMS - 1):
        problems.add(str(number))
    with pytest.raises(DataProblems, match=r"10 problems(.|\n)*stopped after 10; there may be more"):
        problems.add("last")


def test_odd_names_are_escaped() -> None:
    assert shown("häuser/1.png") == "häuser/1.png"
    assert shown("a\nb\udcff") == r"'a\nb\udcff'"
