from __future__ import annotations

from phalanx.loading.problems import DEFAULT, Place
from phalanx.loading.tree import Node, place_of, without

FILE = [Place("r.yaml", line) for line in range(6)]
TREE = Node(
    {
        "a": Node({"b": Node(1, FILE[2]), "c": Node(2, DEFAULT)}, FILE[1]),
        "d": Node((Node({"e": Node("x", FILE[4]), "f": Node("y", FILE[5])}, FILE[4]),), FILE[3]),
    },
    FILE[0],
)


def test_parts_are_found_by_path() -> None:
    assert TREE.plain() == {"a": {"b": 1, "c": 2}, "d": [{"e": "x", "f": "y"}]}
    found = TREE.at(("d", 0, "f"))
    assert found is not None
    assert found.value == "y"
    assert TREE.at(("d", 1)) is TREE.at(("d", -1)) is TREE.at(("a", "b", "c")) is TREE.at(("a", 0)) is None


def test_the_place_of_what_nobody_wrote_is_its_section() -> None:
    assert place_of(TREE, ("a", "b")) == FILE[2]
    assert place_of(TREE, ("a", "c")) == FILE[1]
    assert place_of(TREE, ("a", "missing", "x")) == FILE[1]
    assert place_of(TREE, ("missing",)) == FILE[0]


def test_entries_are_left_out_and_items_stay() -> None:
    assert without(TREE, {("a",)}).plain() == {"d": [{"e": "x", "f": "y"}]}
    assert without(TREE, {("a", "b"), ("d", 0, "e"), ("d", 0)}).plain() == {"a": {"c": 2}, "d": [{"f": "y"}]}
    assert without(TREE, set()) == TREE
