"""The 1797 handwritten digits of scikit-learn: 1 x 8 x 8, pixel values 0..16 (Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import CorruptError

LEVELS = 16
CLASS_NAMES = tuple("0123456789")
SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
"""Of the pixels as uint8 followed by the labels as little-endian int64."""


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(1797, 1, 8, 8) uint8 pixels and (1797,) int64 labels; CorruptError if they are not the pinned ones."""
    from sklearn import datasets  # type: ignore[import-untyped]

    images, targets = datasets.load_digits(return_X_y=True)
    pixels = images.reshape(-1, 1, 8, 8).astype(np.uint8)
    labels = targets.astype(np.int64)
    found = hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    if found != SHA256:
        raise CorruptError(
            f"digits: the copy installed with scikit-learn has sha256 {found}, expected {SHA256};"
            " install scikit-learn again"
        )
    return pixels, labels
