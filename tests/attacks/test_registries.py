from __future__ import annotations

import re

import pytest

from phalanx.attacks import OBJECTIVES, SURFACES
from phalanx.attacks.registry import Registry


def registry() -> Registry:
    colours: Registry = Registry("colour")
    colours.register("red")(lambda: 1)
    colours.register("blue", clean_pass=True)(lambda: 2)
    return colours


def test_a_name_gives_its_function() -> None:
    colours = registry()
    assert colours["red"]() == 1 and colours["blue"]() == 2

    @colours.register("green")
    def green() -> int:
        return 3

    assert colours["green"] is green


def test_a_name_is_taken_once() -> None:
    colours = registry()
    with pytest.raises(ValueError, match=re.escape("colour 'red' is registered already")):
        colours.register("red")(lambda: 3)
    assert colours["red"]() == 1


@pytest.mark.parametrize("name", ["pink", "", "Red"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    message = re.escape(f"colour must be one of red, blue, got {name!r}")
    with pytest.raises(ValueError, match=message):
        registry().check(name)
    with pytest.raises(ValueError, match=message):
        registry()[name]


def test_only_those_that_say_so_need_the_clean_pass() -> None:
    colours = registry()
    assert colours.needs_clean_pass("blue") and not colours.needs_clean_pass("red")


def test_only_those_that_say_so_serve_one_aim() -> None:
    colours = registry()
    colours.register("green", only="targeted")(lambda: 3)
    for targeted in (True, False):
        colours.check_aim("red", targeted=targeted)
    colours.check_aim("green", targeted=True)
    with pytest.raises(ValueError, match=re.escape("colour 'green' is for targeted attacks alone, got targeted=False")):
        colours.check_aim("green", targeted=False)


def test_registries_do_not_share_their_names() -> None:
    registry()
    with pytest.raises(ValueError, match="got 'red'"):
        Registry("colour").check("red")


def test_ours_refuse_duplicates() -> None:
    for shelf, name in ((OBJECTIVES, "cross_entropy"), (OBJECTIVES, "margin"), (SURFACES, "whole")):
        shelf.check(name)
        with pytest.raises(ValueError, match=f"{name!r} is registered already"):
            shelf.register(name)(lambda: None)


def test_a_family_of_temperatures() -> None:
    colours = registry()
    colours.register_temperatures("red")(lambda temperature: lambda: temperature)
    # beside a function of the same name
    assert colours["red"]() == 1
    assert [colours[name]() for name in ("red-t0.1", "red-t2", "red-t0.03", "red-t12.5")] == [0.1, 2, 0.03, 12.5]
    assert colours.names() == ["red", "blue", "red-tT"]
    for name in ("red-t0", "red-t0.0", "red-t.1", "red-t-1", "red-t", "red-t1e3", "red-0.1", "blue-t1"):
        with pytest.raises(ValueError, match=re.escape(f"colour must be one of red, blue, red-tT, got {name!r}")):
            colours[name]
    with pytest.raises(ValueError, match="colour 'red-tT' is registered already"):
        colours.register_temperatures("red")(lambda temperature: lambda: temperature)
