"""A picture of what radii look like on the user's own images."""

# C channels, H height, W width

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from phalanx.data.epsilon import Separation, written
from phalanx.data.splits import ImageSet
from phalanx.rng import SampleRng

IMAGES = 4
"""So many images, of as many classes as there are."""

_SIDE = 96  # of one image as drawn, in pixels, at least
_MARGIN, _HEADER = 6, 18


def strip(images: ImageSet, found: Separation) -> Image.Image:
    """Rows: images of different classes, each under random signs, then moved towards the nearest of another class.

    Columns: unchanged, then the radii that `found` looks at. Every pixel moves by eps, or less where [0, 1] or the
    other image ends.
    """
    radii = (Fraction(0), *found.radii)
    rows: list[list[NDArray[np.uint8]]] = []
    for position in range(min(IMAGES, len(found.asked))):
        pixels = images.pixels[found.asked[position]].astype(np.float64) / images.levels
        other = images.pixels[found.nearest[position]].astype(np.float64) / images.levels
        signs = _signs(int(images.ids[found.asked[position]]), pixels.shape)
        rows.append([_shown(np.clip(pixels + float(eps) * signs, 0, 1)) for eps in radii])
        rows.append([_shown(pixels + np.clip(other - pixels, -float(eps), float(eps))) for eps in radii])
    titles = ["clean", *(f"eps {written(eps, images.levels)}" for eps in found.radii)]
    return _drawn(rows, titles)


def _signs(key: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    bits = SampleRng(0, torch.tensor([key])).integers("strip", 2, shape)[0]
    signs: NDArray[np.float64] = bits.numpy() * 2.0 - 1
    return signs


def _shown(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] to (H, W, 3), enlarged by whole factors."""
    color = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)
    factor = max(1, -(-_SIDE // min(color.shape[:2])))
    return np.rint(color * 255).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)


def _drawn(rows: Sequence[Sequence[NDArray[np.uint8]]], titles: Sequence[str]) -> Image.Image:
    height, width = rows[0][0].shape[:2]
    canvas = Image.new(
        "RGB",
        (_MARGIN + len(titles) * (width + _MARGIN), _HEADER + len(rows) * (height + _MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        left = _MARGIN + column * (width + _MARGIN)
        draw.text((left, 3), title, fill="black")
        for line, images in enumerate(rows):
            canvas.paste(Image.fromarray(images[column]), (left, _HEADER + line * (height + _MARGIN)))
    return canvas
