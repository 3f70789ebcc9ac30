"""Options of backbones: of the kind that the builder declares, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import InputError
from phalanx.experts import build_expert

WIDTHS = "a list of whole numbers of at least 1"


@pytest.mark.parametrize(
    ("name", "option", "value", "wanted"),
    [
        ("mlp", "hidden", "abc", WIDTHS),
        ("mlp", "hidden", 5, WIDTHS),
        ("mlp", "hidden", [8, 0], WIDTHS),
        ("mlp", "hidden", [8, 2.5], WIDTHS),
        ("small_cnn", "width", 0, "a whole number of at least 1"),
        ("small_cnn", "width", 2.5, "a whole number of at least 1"),
        ("small_cnn", "width", True, "a whole number of at least 1"),
        ("small_cnn", "scale", "x", "a number"),
        ("small_cnn", "scale", float("nan"), "a number"),
        ("wrn", "scaled_stem", "yes", "true or false"),
        ("resnet18", "stem", 3, "text"),
    ],
)
def test_another_kind_is_refused(name: str, option: str, value: Any, wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        build_expert(name, num_classes=3, image_size=8, channels=1, **{option: value})
    assert str(caught.value) == f"expert {name!r}: {option} must be {wanted}, got {value!r}"
    assert caught.value.key == f"options.{option}"


def test_what_fits_is_built() -> None:
    for options in ({"hidden": (4,)}, {"hidden": []}, {"hidden": range(1, 3)}):
        build_expert("mlp", num_classes=3, image_size=4, channels=1, **options)
    build_expert("resnet18", num_classes=3, image_size=8, width=4, scaled_stem=None, scale=1)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("mpl", {}, "expert"),
        ("wrn", {"depth": 5}, "options.depth"),
        ("vgg16", {}, "expert"),
        ("mlp", {"x": 1}, "options"),
    ],
)
def test_the_key_at_fault_is_known(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        build_expert(name, num_classes=3, image_size=8, **options)
    assert caught.value.key == key
