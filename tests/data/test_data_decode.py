from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from data_samples import encoded, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phalanx.data import decode as module
from phalanx.data.decode import UnreadableImage, decode


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG header of that size with no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_grey_and_colour_pixels_come_through_unchanged() -> None:
    grey, colour = noise(0, 5, 4), noise(1, 5, 4, 3)
    assert np.array_equal(decode(encoded(grey), None, "keep").pixels, grey[None])
    assert np.array_equal(decode(encoded(colour), None, "keep").pixels, colour.transpose(2, 0, 1))
    assert decode(encoded(grey), None, "keep")[1:] == ((4, 5), "PNG", False)


def test_jpeg_is_read_and_named() -> None:
    image = decode(saved(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG", quality=95), None, "keep")
    assert image.format == "JPEG" and image.pixels.shape == (3, 8, 8)
    assert image.pixels[0].min() > 250 and image.pixels[1:].max() < 5


def test_color_sets_the_channels() -> None:
    grey, red = encoded(noise(0, 4, 4)), saved(Image.new("RGB", (2, 2), (255, 0, 0)))
    assert decode(grey, None, "rgb").pixels.shape == (3, 4, 4)
    # ITU-R 601 luma of red: 0.299 * 255 = 76.2
    assert decode(red, None, "grey").pixels.tolist() == [[[76, 76], [76, 76]]]


def test_size_scales_the_shorter_side_and_crops_the_centre() -> None:
    # black, white, white, black quarters of a 16 x 4 image: the middle 4 x 4 is white
    pixels = np.zeros((4, 16), np.uint8)
    pixels[:, 4:12] = 255
    image = decode(encoded(pixels), 4, "keep")
    assert image.pixels.tolist() == [[[255] * 4] * 4] and image.stored == (16, 4)
    assert decode(encoded(noise(0, 28, 28)), 32, "keep").pixels.shape == (1, 32, 32)


def test_an_image_of_the_wanted_size_is_not_resampled() -> None:
    pixels = noise(0, 6, 6)
    assert np.array_equal(decode(encoded(pixels), 6, "keep").pixels[0], pixels)


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8))  # 2 wide, 1 high
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    assert decode(saved(image, exif=exif), None, "keep").pixels.tolist() == [[[0], [255]]]


def test_transparency_is_laid_over_white() -> None:
    clear = saved(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))
    half = saved(Image.new("LA", (1, 1), (0, 128)))
    opaque = saved(Image.new("RGBA", (1, 1), (9, 8, 7, 255)))
    assert decode(clear, None, "keep").pixels.flatten().tolist() == [255, 255, 255]
    # 255 * (255 - 128) / 255 = 127, one channel
    assert decode(half, None, "keep").pixels.tolist() == [[[127]]]
    assert decode(opaque, None, "keep").pixels.flatten().tolist() == [9, 8, 7]
    assert [decode(data, None, "keep").flattened for data in (clear, half, opaque)] == [True, True, False]


def test_palettes_become_colour_and_bilevel_grey() -> None:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode(saved(image), None, "keep").pixels.flatten().tolist() == [10, 20, 30]
    clear = decode(saved(image, transparency=1), None, "keep")
    assert clear.pixels.flatten().tolist() == [255, 255, 255] and clear.flattened
    assert decode(saved(Image.new("1", (1, 1), 1)), None, "keep").pixels.tolist() == [[[255]]]


def test_printing_colours_need_a_choice() -> None:
    data = saved(Image.new("CMYK", (8, 8)), "JPEG")
    with pytest.raises(UnreadableImage, match=r"mode CMYK\); set color to 'rgb'"):
        decode(data, None, "keep")
    assert decode(data, None, "rgb").pixels.shape == (3, 8, 8)


def animation() -> bytes:
    return saved(Image.new("L", (2, 2)), save_all=True, append_images=[Image.new("L", (2, 2), 9)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty; copy it again"),
        (b"hello", "not a PNG or JPEG image; convert it"),
        (saved(Image.new("L", (2, 2)), "GIF"), "not a PNG or JPEG image; convert it"),
        (saved(Image.new("I;16", (2, 2))), "16 bits per channel; convert it to 8 bits"),
        (animation(), "an animation; keep one frame"),
        (encoded(noise(0, 9, 9))[:60], "not a readable PNG or JPEG image .*; copy it again"),
        (saved(Image.fromarray(noise(0, 64, 64)), "JPEG")[:900], "truncated"),
        (png_claiming(10_000, 10_000), "10000x10000 is more than 64000000 pixels; scale it down"),
        (png_claiming(100_000, 100_000), "more than 64000000 pixels; scale it down"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data, None, "keep")


def test_the_limit_on_pixels_comes_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 15)
    with pytest.raises(UnreadableImage, match="4x4 is more than 15 pixels"):
        decode(encoded(noise(0, 4, 4)), None, "keep")


@given(st.integers(0, 10_000), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_a_png_is_refused(position: int, bit: int) -> None:
    data = bytearray(encoded(noise(3, 6, 6)))
    data[position % (len(data) - 12)] ^= 1 << bit  # the last 12 bytes only say that the file ends
    with pytest.raises(UnreadableImage):
        decode(bytes(data), None, "keep")


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]))
@settings(max_examples=60, deadline=None)
def test_arbitrary_bytes_raise_nothing_else(tail: bytes, head: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(head + tail, 8, "rgb")
