from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phalanx.data import load_data
from phalanx.data.describe import write_description
from phalanx.data.epsilon import Separation, separation, written
from phalanx.data.splits import ImageSet
from phalanx.data.strip import strip
from phalanx.errors import InputError


def images_of(values: list[int], labels: list[int], levels: int = 255) -> ImageSet:
    """Flat images: their Linf distances are differences of one number."""
    pixels = np.repeat(np.array(values, np.uint8), 12).reshape(-1, 3, 2, 2)
    return ImageSet(pixels, np.array(labels), np.arange(len(values)), levels)


def found_of(*distances: int, levels: int = 255) -> Separation:
    rows = np.arange(len(distances))
    return Separation(levels, np.array(distances), rows, rows, len(distances))


def test_distances_are_to_the_nearest_image_of_another_class() -> None:
    found = separation(images_of([0, 10, 100, 107, 250], [0, 0, 1, 0, 1]))
    by_row = dict(zip(found.asked.tolist(), zip(found.distances, found.nearest, strict=True), strict=True))
    assert by_row == {0: (100, 2), 1: (90, 2), 2: (7, 3), 3: (7, 2), 4: (143, 3)}
    assert found.limit == Fraction(90, 510)
    assert found.crowded(Fraction(3, 255)) == 0 and found.crowded(Fraction(4, 255)) == 0.4


def test_distances_do_not_wrap_around_eight_bits() -> None:
    assert separation(images_of([255, 0], [0, 1])).distances.tolist() == [255, 255]


@pytest.mark.parametrize(
    ("found", "suggested", "why"),
    [
        (found_of(100, 120, 140), "8/255", "the usual radius for photographs"),
        (found_of(11, 120, 140), "4/255", "the classes run into one another"),
        (found_of(3, 3, 140), "2/255", "already 67 % of the images"),
        (found_of(10, 12, 14, levels=16), "3/16", "three of 16 grey levels"),
        (found_of(4, 12, 14, levels=16), "1/16", "the classes run into one another"),
    ],
)
def test_the_suggestion_leaves_the_classes_apart(found: Separation, suggested: str, why: str) -> None:
    assert written(found.suggested, found.levels) == suggested and why in found.reason()
    assert found.to_json()["suggested"] == suggested


def test_a_large_set_is_drawn_from_and_no_class_is_forgotten() -> None:
    labels = [0] * 500 + [1]
    found = separation(images_of([0] * 500 + [200], labels))
    assert len(found.asked) == 200 and set(found.distances.tolist()) == {200} and 500 in found.asked


def test_the_strip_shows_what_its_columns_say() -> None:
    images = load_data("digits").train
    found = separation(images)
    picture = np.asarray(strip(images, found)).astype(int)
    # 1 + 4 columns and 2 x 4 rows of images, 8 pixels enlarged 12 times to 96
    side, step = 96, 102
    assert picture.shape == (18 + 8 * step, 6 + 5 * step, 3)
    clean = picture[18 : 18 + side, 6 : 6 + side]
    original = np.rint(images.pixels[found.asked[0], 0] * (255 / 16)).astype(int)
    assert np.array_equal(clean[::12, ::12, 0], original)
    for column, eps in enumerate(found.radii, start=1):
        for line in (0, 1):
            corner = 18 + line * step, 6 + column * step
            moved = picture[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
            assert 0 < np.abs(moved - clean).max() <= round(float(eps) * 255) + 1


def test_the_description_is_written_with_its_picture(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    data = load_data(f"folder:{make_folder({'a': 5, 'b': 5, 'c': 5})}")
    facts = write_description(data, tmp_path / "out")
    assert json.loads((tmp_path / "out/description.json").read_text()) == facts
    with Image.open(tmp_path / "out/perturbed.png") as picture:
        assert picture.format == "PNG"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder with --out"):
        write_description(data, tmp_path / "file")
