from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import image_set, noise

from phalanx.data import splits as module
from phalanx.data.splits import ImageSet, Splits, duplicates, to_unit
from phalanx.errors import InputError


def tiny() -> ImageSet:
    pixels = np.array([0, 4, 8, 16], dtype=np.uint8).reshape(4, 1, 1, 1)
    return ImageSet(pixels, np.array([0, 1, 0, 1]), np.array([10, 11, 12, 13]), levels=16)


def test_a_pixel_is_its_value_over_the_levels() -> None:
    # 0/16, 4/16, 8/16, 16/16
    assert tiny().images([0, 1, 2, 3]).flatten().tolist() == [0.0, 0.25, 0.5, 1.0]


def test_conversion_is_the_correctly_rounded_quotient() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    exact = (np.arange(256, dtype=np.float64) / 255).astype(np.float32)
    assert np.array_equal(to_unit(values, 255).numpy(), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_conversion_is_the_same_on_a_gpu() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(values.cuda(), 255).cpu(), to_unit(values, 255))


@pytest.mark.parametrize("index", [[2, 0], np.array([2, 0]), torch.tensor([2, 0])])
def test_select_keeps_order_labels_and_ids(index: list[int]) -> None:
    chosen = tiny().select(index)
    assert chosen.images(slice(None)).flatten().tolist() == [0.5, 0.0]
    assert (chosen.labels.tolist(), chosen.ids.tolist()) == ([0, 0], [12, 10])


def test_first_is_a_prefix_and_at_most_everything() -> None:
    assert tiny().first(2).ids.tolist() == [10, 11]
    assert len(tiny().first(99)) == 4
    with pytest.raises(InputError, match="at least 1, got 0"):
        tiny().first(0)


def test_batches_cover_the_set_in_order_with_a_short_last_one() -> None:
    batches = list(tiny().batches(3))
    assert [len(batch.y) for batch in batches] == [3, 1]
    assert torch.cat([batch.ids for batch in batches]).tolist() == [10, 11, 12, 13]
    assert batches[1].x.shape == (1, 1, 1, 1) and batches[1].x.item() == 1.0
    assert batches[0].xy == (batches[0].x, batches[0].y)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        tiny().batches(0)


def test_changing_a_batch_leaves_the_set_alone() -> None:
    images = tiny()
    for batch in images.batches(4):
        batch.x.zero_(), batch.y.zero_(), batch.ids.zero_()
    assert images.labels.tolist() == [0, 1, 0, 1] and images.ids.tolist() == [10, 11, 12, 13]
    assert images.images([3]).item() == 1.0


@pytest.mark.parametrize("field", ["pixels", "labels", "ids", "levels"])
def test_the_fingerprint_follows_every_part(field: str) -> None:
    images = tiny()
    old = getattr(images, field)
    new = 17 if field == "levels" else np.concatenate([old[:-1], old[-1:] - 1])
    assert dataclasses.replace(images, **{field: new}).fingerprint != images.fingerprint
    assert tiny().fingerprint == images.fingerprint


def test_the_fingerprint_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = image_set(20).fingerprint
    monkeypatch.setattr(module, "_CHUNK_BYTES", 300)
    assert image_set(20).fingerprint == whole


def test_mean_and_std_match_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 300)
    images = image_set(20)
    x = images.pixels / 255
    mean, std = images.mean_std()
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, x.std((0, 2, 3)), rtol=1e-12)


def test_mean_and_std_are_those_of_the_unit_range() -> None:
    # mean (0 + 1/4 + 1/2 + 1) / 4 = 7/16; variance (0 + 1/16 + 1/4 + 1) / 4 - 49/256 = 35/256
    mean, std = tiny().mean_std()
    assert mean == (7 / 16,) and std == pytest.approx((35**0.5 / 16,))


def test_the_std_of_a_constant_channel_has_a_floor() -> None:
    constant = ImageSet(np.full((3, 1, 2, 2), 51, np.uint8), np.zeros(3, np.int64), np.arange(3), 255)
    assert constant.mean_std() == ((0.2,), (1e-3,))  # 51/255 = 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((4, 1, 1), np.uint8)}, r"shape \(N, C, H, W\), got uint8 of shape \(4, 1, 1\)"),
        ({"pixels": np.full((4, 1, 1, 1), np.nan)}, "must be uint8.*got float64"),
        (
            {"labels": np.zeros(3, np.int64)},
            r"labels must be int64 of shape \(4,\).*got int64 of shape \(3,\)",
        ),
        ({"ids": np.zeros(4, np.int32)}, "ids must be int64.*got int32"),
        ({"levels": 15}, r"pixels must be in 0\.\.levels=15, got 16"),
        ({"levels": 0}, r"levels must be in 1\.\.255, got 0"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny(), **change)


def make_splits(train: ImageSet, val: ImageSet, test: ImageSet) -> Splits:
    return Splits(train, val, test, "made", ("a", "b"), (0.5,) * 3, (0.2,) * 3)


def test_splits_know_their_shape_and_fingerprint() -> None:
    parts = image_set(4), image_set(2, start=4), image_set(2, start=6)
    splits = make_splits(*parts)
    assert (splits.shape, splits.num_classes) == ((3, 6, 6), 2)
    assert splits.fingerprint == make_splits(*parts).fingerprint
    assert splits.fingerprint != make_splits(parts[0], parts[2], parts[1]).fingerprint


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (image_set(2, start=3), "an image id appears twice"),
        (image_set(2, side=5, start=4), r"val images have shape \(3, 5, 5\).*train images \(3, 6, 6\)"),
        (image_set(3, classes=3, start=4), r"val row 1: label must be in 0\.\.1, got 2 \(1 such rows\)"),
    ],
)
def test_splits_that_do_not_fit_are_refused(val: ImageSet, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_splits(image_set(4), val, image_set(2, start=8))


def test_duplicates_are_equal_pixel_for_pixel() -> None:
    train = image_set(5)
    pixels = np.concatenate([train.pixels[3:4], noise(99, 1, 3, 6, 6), train.pixels[:1]])
    pixels[2, 0, 0, 0] ^= 1  # one bit of one pixel: no longer the same image
    test = ImageSet(pixels, np.zeros(3, np.int64), np.arange(3), 255)
    assert duplicates(test, train).tolist() == [0]


def test_a_selection_too_large_for_memory_goes_to_an_unnamed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pixels.npy"
    np.save(path, noise(0, 50, 3, 6, 6))
    mapped = np.load(path, mmap_mode="r")
    images = ImageSet(mapped, np.arange(50), np.arange(50), 255)
    rows = [40, 3, 3, 17, 49]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 200)
    monkeypatch.setattr(module, "fits", lambda size, device: False)
    chosen = images.select(rows)
    assert isinstance(chosen.pixels, np.memmap)
    assert np.array_equal(chosen.pixels, np.load(path)[rows])
    assert [entry.name for entry in tmp_path.iterdir()] == ["pixels.npy"]
    assert np.array_equal(chosen.select([4, 0]).pixels, np.load(path)[[49, 40]])
