from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from data_samples import encoded, noise
from PIL import Image

from phalanx.data.config import DataConfig
from phalanx.data.convert import convert, discard
from phalanx.data.problems import DataProblems, Problems
from phalanx.data.source import Row, Source


def source_of(*images: bytes, announced: int | None = None, names: tuple[str, ...] | None = ("a", "b")) -> Source:
    def rows(split: str, problems: Problems) -> Iterator[Row]:
        return (Row(f"{index}.png", data, index % 2) for index, data in enumerate(images))

    return Source("folder:x", names, {"train": len(images) if announced is None else announced}, {}, rows, ("kept",))


def options(**values: Any) -> DataConfig:
    return DataConfig(name="folder:x", **values)


def test_images_reach_the_sink_in_order() -> None:
    pixels = [noise(seed, 4, 4) for seed in range(3)]
    received: list[tuple[str, np.ndarray]] = []
    converted = convert(source_of(*map(encoded, pixels)), options(), lambda *item: received.append(item))
    assert [split for split, _ in received] == ["train"] * 3
    assert np.array_equal([image for _, image in received], np.stack(pixels)[:, None])
    assert converted.labels["train"].tolist() == [0, 1, 0]
    assert (converted.class_names, converted.notes) == (("a", "b"), ("kept",))


def test_classes_without_names_are_numbered() -> None:
    images = encoded(noise(0, 4, 4)), encoded(noise(1, 4, 4))
    assert convert(source_of(*images, names=None), options(), discard).class_names == ("0", "1")


def test_what_was_done_is_noted() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 8, 6, 3)).save(buffer, "JPEG")
    clear = encoded(np.zeros((4, 4, 4), np.uint8))
    notes = convert(source_of(buffer.getvalue(), clear), options(size=4, color="grey"), discard).notes
    assert notes[1].startswith("1 of 2 images are stored as JPEG (lossy)")
    assert notes[2:] == (
        "resized 4x4 to 6x8 -> 4x4 (bicubic, centre crop)",
        "all images brought to grey",
        "1 of 2 images have transparency, laid over white",
    )


def test_mixed_sizes_and_colours_name_two_files() -> None:
    images = (
        encoded(noise(0, 4, 4)),
        encoded(noise(1, 4, 5)),
        encoded(noise(1, 4, 4, 3)),
        encoded(noise(2, 9, 9)),
    )
    with pytest.raises(DataProblems) as caught:
        convert(source_of(*images), options(), discard)
    assert caught.value.problems == (
        "1.png is 5x4 pixels but 0.png is 4x4; set data.size, to a number or to auto, for one side length",
        "2.png is colour but 0.png is grey; set data.color to rgb, grey or auto",
    )
    converted = convert(source_of(*images), options(size=4, color="rgb"), discard)
    assert len(converted.labels["train"]) == 4


def test_unreadable_images_are_collected() -> None:
    with pytest.raises(DataProblems) as caught:
        convert(source_of(b"", encoded(noise(0, 4, 4)), b"junk"), options(), discard)
    assert [problem[:6] for problem in caught.value.problems] == ["0.png:", "2.png:"]


def test_missing_rows_are_noticed() -> None:
    with pytest.raises(DataProblems, match="train: 2 images announced, 1 found; fetch the data again"):
        convert(source_of(encoded(noise(0, 4, 4)), announced=2), options(), discard)
