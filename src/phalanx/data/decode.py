"""One PNG or JPEG file's bytes to uint8 pixels.

What is done, in order: EXIF orientation is applied; palettes become colour; transparency is laid over white;
`color` and `size` are applied. What has no faithful 8-bit meaning is refused by name. Colour profiles are
ignored.
"""

# C channels, H height, W width

from __future__ import annotations

import io
import warnings
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded: a small file can claim to hold far more than memory does."""

Color = Literal["keep", "rgb", "grey"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH_AT = 24  # bit depth in the IHDR chunk, which always comes first


class Decoded(NamedTuple):
    """The pixels of one image and what had to be done to it."""

    pixels: NDArray[np.uint8]
    """(C, H, W), C 1 or 3."""
    stored: tuple[int, int]
    """(width, height) before resizing, upright."""
    format: str
    """"PNG" or "JPEG", or "pixels"."""
    flattened: bool
    """Whether transparency was laid over white."""


class Target(NamedTuple):
    """What every image is brought to."""

    size: int | None
    """Side in pixels; None leaves each as it is."""
    color: Color


class UnreadableImage(Exception):
    """Why one image cannot be used, in words that complete "FILE: "."""


def decode(data: bytes | NDArray[np.uint8], size: int | None, color: Color) -> Decoded:
    """Decode one image, or bring pixels (C, H, W) to size and colour.

    Raises UnreadableImage for anything that is not a whole, plain PNG or JPEG image.
    """
    if isinstance(data, np.ndarray):
        return _raw(data, size, color)
    if not data:
        raise UnreadableImage("the file is empty; copy it again or remove it")
    try:
        image, format_name = _open(data)
        stored = image.size
        image, flattened = _to_mode(image, color)
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.uint8)
    except UnreadableImage:
        raise
    except Exception as error:  # a decoder that is fed damaged or hostile bytes raises whatever it likes
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"not a readable PNG or JPEG image ({reason}); copy it again or remove it") from error
    channels_first = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Decoded(np.ascontiguousarray(channels_first), stored, format_name, flattened)


def _raw(pixels: NDArray[np.uint8], size: int | None, color: Color) -> Decoded:
    stored = pixels.shape[2], pixels.shape[1]
    same = size is None or stored == (size, size)
    if not same or (color == "grey" and len(pixels) == 3):
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        image = image if same or size is None else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        array = np.asarray(image.convert("L") if color == "grey" else image, dtype=np.uint8)
        pixels = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if color == "rgb" and len(pixels) == 1:
        pixels = pixels.repeat(3, axis=0)
    return Decoded(np.ascontiguousarray(pixels), stored, "pixels", False)


def look(data: bytes | NDArray[np.uint8]) -> tuple[tuple[int, int], bool]:
    """(width, height), upright, and whether it is grey, without decoding more than the header.

    Raises UnreadableImage as `decode` does for what is no image at all.
    """
    if isinstance(data, np.ndarray):
        return (data.shape[2], data.shape[1]), len(data) == 1
    if not data:
        raise UnreadableImage("the file is empty; copy it again or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size
            return ((height, width) if turned else (width, height)), image.mode in ("1", "L", "LA")
    except Exception as error:  # as for `decode`
        raise UnreadableImage(f"not a readable PNG or JPEG image ({error}); copy it again or remove it") from error


def _open(data: bytes) -> tuple[Image.Image, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images: refused below
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        except Image.DecompressionBombError:
            raise UnreadableImage(f"more than {MAX_PIXELS} pixels; scale it down or remove it") from None
        except UnidentifiedImageError:
            raise UnreadableImage("not a PNG or JPEG image; convert it to PNG or remove it") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(
            f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels; scale it down or remove it"
        )
    if data.startswith(_PNG):
        _check_png(image, data)
    format_name = "PNG" if data.startswith(_PNG) else "JPEG"
    return ImageOps.exif_transpose(image), format_name


def _check_png(image: Image.Image, data: bytes) -> None:
    if data[_PNG_DEPTH_AT] == 16:
        raise UnreadableImage("16 bits per channel; convert it to 8 bits")
    if getattr(image, "n_frames", 1) > 1:
        raise UnreadableImage("an animation; keep one frame or remove it")
    # decoding does not compare the chunks' checksums; this does, and leaves `image` usable
    Image.open(io.BytesIO(data), formats=("PNG",)).verify()


def _to_mode(image: Image.Image, color: Color) -> tuple[Image.Image, bool]:
    if image.mode == "CMYK" and color == "keep":
        raise UnreadableImage("four printing colours (mode CMYK); set color to 'rgb' or convert it")
    flattened = False
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA")
        layers = image.convert("RGBA")
        flattened = bool((np.asarray(layers)[..., 3] < 255).any())
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
        image = image.convert("L" if grey else "RGB")
    stays_grey = color == "grey" or (color == "keep" and image.mode in ("1", "L"))
    wanted = "L" if stays_grey else "RGB"
    return (image if image.mode == wanted else image.convert(wanted)), flattened
