from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import encoded, noise

from phalanx.data import DataConfig, load_data
from phalanx.errors import InputError

Make = Callable[..., Path]


def test_the_digits() -> None:
    splits = load_data()
    # test: round(0.25 * 1797) = 449; val: round(0.1 * 1348) = 135; train: the rest
    assert [len(part) for part in splits.parts.values()] == [1213, 135, 449]
    assert (splits.shape, splits.num_classes, splits.name, splits.notes) == ((1, 8, 8), 10, "digits", ())
    assert splits.train.images(slice(None)).max() == 1.0
    np.testing.assert_allclose(splits.mean[0], (splits.train.pixels / 16).mean(), rtol=1e-12)


def test_a_normalisation_of_ones_own_changes_no_image() -> None:
    measured, given = load_data("digits"), load_data("digits", mean=(0.25,), std=(0.5,))
    assert (given.mean, given.std) == ((0.25,), (0.5,))
    assert given.fingerprint == measured.fingerprint
    assert load_data("digits", mean=(0.25,)).std == measured.std
    for field in ("mean", "std"):
        message = f"data.{field} has 3 values, but the images of digits have 1 channel; give one value for each"
        with pytest.raises(InputError, match=message):
            load_data("digits", **{field: (0.4, 0.4, 0.4)})


def test_the_digits_splits_are_pinned() -> None:
    # a change here makes every recorded number on digits incomparable
    assert load_data("digits").fingerprint == "2cb20338c7d07245ecdb790b35eb5f5347608d29996f03faa927b6d695fabda2"


def test_the_seed_changes_the_splits() -> None:
    assert load_data("digits", seed=1).fingerprint != load_data("digits").fingerprint
    assert load_data(DataConfig(seed=1)).fingerprint == load_data("digits", seed=1).fingerprint


def test_a_flat_folder_gives_three_disjoint_splits(make_folder: Make) -> None:
    splits = load_data(f"folder:{make_folder({'a': 20, 'b': 12})}")
    assert [len(part) for part in splits.parts.values()] == [22, 2, 8]
    ids = np.concatenate([part.ids for part in splits.parts.values()])
    assert np.array_equal(np.sort(ids), np.arange(32))
    assert (splits.name, splits.class_names, splits.shape) == ("folder:pictures", ("a", "b"), (1, 5, 6))


def test_ids_count_through_a_sources_own_splits(make_folder: Make) -> None:
    counts = {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "ab"}
    splits = load_data(f"folder:{make_folder(counts)}")
    assert [part.ids.tolist() for part in splits.parts.values()] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_a_moved_folder_is_the_same_data(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder({"a": 5, "b": 5})
    before = load_data(f"folder:{root}").fingerprint
    shutil.move(root, tmp_path / "moved")
    assert load_data(f"folder:{tmp_path / 'moved'}").fingerprint == before


def test_a_changed_file_is_seen_in_spite_of_the_cache(make_folder: Make) -> None:
    root = make_folder({"a": 5, "b": 5})
    before = load_data(f"folder:{root}").fingerprint
    (root / "a/000.png").write_bytes(encoded(noise(77, 5, 6)))
    assert load_data(f"folder:{root}").fingerprint != before


def test_colour_and_size_reach_the_pixels(make_folder: Make) -> None:
    splits = load_data(f"folder:{make_folder({'a': 3, 'b': 3})}", size=4, color="rgb")
    assert splits.shape == (3, 4, 4) and len(splits.mean) == 3
    assert splits.notes == ("resized 6x5 -> 4x4 (bicubic, centre crop)", "all images brought to rgb")


def test_test_images_that_are_training_images_are_counted(make_folder: Make) -> None:
    root = make_folder({f"{split}/{name}": 3 for split in ("train", "val", "test") for name in "ab"})
    shutil.copy(root / "train/a/000.png", root / "test/b/zz.png")
    splits = load_data(f"folder:{root}")
    assert splits.notes == ("1 of 7 test images are also training images, pixel for pixel",)


def test_a_prefix_without_every_class_is_noted(make_parquet: Make) -> None:
    images = [encoded(noise(index, 4, 4)) for index in range(20)]
    make_parquet("train.parquet", images, [0, 1] * 10)
    folder = make_parquet("test.parquet", images[:6], [0, 0, 0, 1, 1, 1])
    splits = load_data(f"parquet:{folder}", test_limit=2)
    assert splits.test.ids.tolist() == [20, 21]
    assert "1 of 2 classes have no test image" in splits.notes


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("cifar11", {}, "data: name must be 'digits', 'folder:PATH', .* or one of mnist, .*, got 'cifar11'"),
        ("digits", {"sise": 8}, "data: there is no field 'sise'; there are: name, size"),
        ("digits", {"val_fraction": 0.9}, r"data: val_fraction must be in \(0, 0.5\], got 0.9"),
        ("digits", {"name": "digits"}, "named twice"),
        ("digits", {"train_limit": 5}, "train_limit=5 is fewer than.*10 classes; set it to 10"),
        ("folder:" + "x" * 300, {}, "cannot be read .File name too long.*check the path"),
        ("parquet:nowhere", {}, "does not exist; name a Parquet file"),
    ],
)
def test_mistakes_are_one_message(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(source, **options)


def test_a_class_with_too_few_images_is_named(make_folder: Make) -> None:
    with pytest.raises(InputError, match=r"each class needs 3 images or more.*but b has 2"):
        load_data(f"folder:{make_folder({'a': 9, 'b': 2})}")


@pytest.mark.skipif("PHALANX_CIFAR10" not in os.environ, reason="$PHALANX_CIFAR10 names no folder")
def test_a_real_parquet_set() -> None:
    splits = load_data(f"parquet:{os.environ['PHALANX_CIFAR10']}", train_limit=500, test_limit=100)
    assert (splits.shape, splits.num_classes, len(splits.test)) == ((3, 32, 32), 10, 100)
    assert np.bincount(splits.train.labels).tolist() == [50] * 10
    assert any("JPEG" in note for note in splits.notes)
