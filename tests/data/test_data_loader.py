from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import image_set
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.data.loader import Loader
from phalanx.data.splits import Batch, ImageSet
from phalanx.errors import InputError

AUGMENT = ("flip", "crop:2", "cutout:2")


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def mapped(tmp_path: Path, images: ImageSet) -> ImageSet:
    np.save(tmp_path / "pixels.npy", images.pixels)
    return dataclasses.replace(images, pixels=np.load(tmp_path / "pixels.npy", mmap_mode="r"))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_each_image_at_most_once(n: int, batch_size: int, epoch: int, drop_last: bool) -> None:
    batch_size = min(n, batch_size)
    loader = Loader(image_set(n, start=50), batch_size=batch_size, seed=1, drop_last=drop_last)
    steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
    ids = torch.cat([loader.batch(step).ids for step in steps]).tolist()
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(range(50, 50 + n))
    assert len(ids) == (n // batch_size * batch_size if drop_last else n)


@pytest.mark.parametrize("resident", [True, False])
def test_a_batch_does_not_depend_on_the_calls_before_it(resident: bool) -> None:
    def loader() -> Loader:
        return Loader(image_set(20), batch_size=6, seed=3, augment=AUGMENT, resident=resident)

    in_order = [loader().batch(step) for step in range(9)]
    sequential = loader()
    wild = loader()
    for step in [7, 8, 0, 3, 2, 8, 8, 1]:
        assert same(wild.batch(step), in_order[step])
    for step in range(9):
        assert same(sequential.batch(step), in_order[step])


def test_resident_and_streamed_batches_are_the_same_bytes(tmp_path: Path) -> None:
    images = mapped(tmp_path, image_set(20))
    resident, streamed = (
        Loader(images, batch_size=8, seed=3, augment=AUGMENT, resident=resident) for resident in (True, False)
    )
    for step in range(6):
        assert same(resident.batch(step), streamed.batch(step))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bytes(tmp_path: Path) -> None:
    images = mapped(tmp_path, image_set(20))
    host = Loader(images, batch_size=8, seed=3, augment=AUGMENT)
    for resident in (True, False):
        device = Loader(images, batch_size=8, seed=3, augment=AUGMENT, device="cuda", resident=resident)
        for step in range(6):
            assert same(host.batch(step), Batch(*(part.cpu() for part in device.batch(step))))


def test_batches_hold_the_images_they_name() -> None:
    images = image_set(12, start=30)
    batch = Loader(images, batch_size=5, seed=0).batch(1)
    assert torch.equal(batch.x, images.images(batch.ids - 30))
    assert batch.y.tolist() == images.labels[batch.ids - 30].tolist()
    assert batch.x.dtype == torch.float32 and batch.y.dtype == torch.int64


def test_seed_stream_and_epoch_change_order_and_augmentation() -> None:
    images = image_set(20)
    base = Loader(images, batch_size=20, seed=0, augment=AUGMENT).batch(0)
    others = [
        Loader(images, batch_size=20, seed=1, augment=AUGMENT).batch(0),
        Loader(images, batch_size=20, seed=0, stream="router", augment=AUGMENT).batch(0),
        Loader(images, batch_size=20, seed=0, augment=AUGMENT).batch(1),
    ]
    for other in others:
        assert not torch.equal(base.ids, other.ids)
        assert not torch.equal(base.x[base.ids.argsort()], other.x[other.ids.argsort()])


def test_the_augmentation_of_an_image_does_not_depend_on_the_batch_size() -> None:
    images = image_set(20)
    small = Loader(images, batch_size=4, seed=0, augment=AUGMENT)
    whole = Loader(images, batch_size=20, seed=0, augment=AUGMENT).batch(0)
    parts = [small.batch(step) for step in range(5)]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)


def test_the_augmentation_of_an_image_follows_its_id() -> None:
    images = image_set(20)
    whole = Loader(images, batch_size=20, seed=0, augment=AUGMENT).batch(0)
    half = Loader(images.select(range(10, 20)), batch_size=10, seed=0, augment=AUGMENT).batch(0)
    assert torch.equal(half.x[half.ids.argsort()], whole.x[whole.ids.argsort()][10:])


def test_memory_decides_between_resident_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(10)
    size = images.pixels.nbytes
    for free, resident in ((4 * size + 1, True), (4 * size, False)):
        monkeypatch.setattr("phalanx.data.memory.free_memory", lambda device, free=free: free)
        assert Loader(images, batch_size=5, seed=0).resident is resident


def test_changing_a_batch_leaves_the_set_alone() -> None:
    images = image_set(6)
    loader = Loader(images, batch_size=6, seed=0)
    first = loader.batch(0)
    kept = Batch(*(part.clone() for part in first))
    for part in first:
        part.zero_()
    assert same(loader.batch(0), kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, r"batch_size must be in 1\.\.10, the number of images, got 11; lower it"),
        ({"batch_size": 0}, r"batch_size must be in 1\.\.10.*got 0"),
        ({"batch_size": 5, "augment": ("flp",)}, "augment has no augmentation 'flp'; did you mean 'flip'"),
        ({"batch_size": 5, "augment": ("crop:6",)}, "'crop:6' is too large for 6x6 images; use at most 5"),
    ],
)
def test_mistakes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Loader(image_set(10), seed=0, **options)


def test_steps_count_from_zero() -> None:
    with pytest.raises(InputError, match="step must be at least 0, got -1"):
        Loader(image_set(4), batch_size=2, seed=0).batch(-1)


def test_class_balanced_batches_are_repeatable_and_show_a_rare_class_as_often() -> None:
    images = image_set(40)
    rare = dataclasses.replace(images, labels=(np.arange(40) < 4).astype(np.int64))

    def loader() -> Loader:
        return Loader(rare, batch_size=10, seed=3, augment=AUGMENT, sampling="class_balanced")

    in_order = loader()
    batches = [in_order.batch(step) for step in range(8)]
    assert torch.cat([batch.y for batch in batches[:4]]).sum() == 20
    assert same(loader().batch(6), batches[6]) and not same(batches[2], batches[6])
