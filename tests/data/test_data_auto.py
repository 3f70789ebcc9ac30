from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_samples import encoded, noise
from PIL import ExifTags, Image
from test_data_convert import options, source_of

from phalanx.data import load_data
from phalanx.data.auto import target_of
from phalanx.data.decode import Target, UnreadableImage, decode, look

AUTO = options(size="auto", color="auto")


def square(side: int, *channels: int) -> bytes:
    return encoded(noise(side, side, side, *channels))


@pytest.mark.parametrize(
    ("images", "target"),
    [
        ([square(28), square(28)], Target(None, "keep")),
        ([square(64, 3)], Target(None, "rgb")),
        ([square(65, 3)], Target(64, "rgb")),
        ([square(40), square(50)], Target(40, "keep")),
        ([square(8), square(50)], Target(32, "keep")),
        ([square(80), square(90)], Target(64, "keep")),
        ([encoded(noise(0, 40, 50))], Target(40, "keep")),
        ([square(28), square(28, 3)], Target(None, "rgb")),
        ([b"no image", square(28)], Target(None, "keep")),
    ],
)
def test_auto_keeps_small_squares_and_brings_the_rest_to_one_size(images: list[bytes], target: Target) -> None:
    assert target_of(source_of(*images), AUTO) == target


def test_what_is_set_stays() -> None:
    images = source_of(square(28), square(40, 3))
    assert target_of(images, options(size=16, color="auto")) == Target(16, "rgb")
    assert target_of(images, options(size="auto", color="grey")) == Target(32, "grey")
    assert target_of(source_of(b"no image"), options(size=16, color="grey")) == Target(16, "grey")


def test_a_look_at_the_header_says_what_decoding_says() -> None:
    turned = Image.fromarray(noise(0, 8, 6, 3))
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    for data in (buffer.getvalue(), square(5), encoded(noise(0, 4, 7, 4)), encoded(noise(0, 4, 7, 2))):
        found = decode(data, None, "keep")
        assert look(data) == (found.stored, len(found.pixels) == 1)
    for data in (b"", b"junk"):
        with pytest.raises(UnreadableImage, match="copy it again"):
            look(data)


def test_a_folder_of_mixed_sizes_loads_with_auto(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a": 4, "b": 4}, height=40, width=50)
    (root / "b/000.png").write_bytes(encoded(noise(9, 60, 45, 3)))
    data = load_data(f"folder:{root}", size="auto", color="auto")
    assert data.shape == (3, 40, 40)
    assert np.array_equal(data.train.pixels, load_data(f"folder:{root}", size=40, color="rgb").train.pixels)


def test_four_colours_become_three(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a": 4, "b": 4}, height=8, width=8)
    for path in root.rglob("*.png"):
        Image.open(path).convert("CMYK").save(path.with_suffix(".jpg"))
        path.unlink()
    assert load_data(f"folder:{root}", color="auto").shape == (3, 8, 8)


def test_digits_are_as_they_are() -> None:
    assert load_data("digits", size="auto", color="auto").fingerprint == load_data("digits").fingerprint
