"""Images made on the spot for the tests of this room."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from phalanx.data.splits import ImageSet


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    """(H, W) or (H, W, C) uint8 as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_set(n: int, channels: int = 3, side: int = 6, classes: int = 2, start: int = 0) -> ImageSet:
    """n different images with labels 0, 1, ..., and ids from `start`."""
    ids = np.arange(start, start + n, dtype=np.int64)
    return ImageSet(noise(start, n, channels, side, side), ids % classes, ids, 255)
