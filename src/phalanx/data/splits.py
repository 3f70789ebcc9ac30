"""Images as they are held (uint8) and as they are used (float32 in [0, 1])."""

# N images of a split, B batch, C channels, H height, W width

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.data.memory import fits
from phalanx.errors import DiskError, InputError

_CHUNK_BYTES = 1 << 24

Index = Sequence[int] | NDArray[np.int64] | Tensor | slice
"""One-dimensional: positions within a split."""


class Batch(NamedTuple):
    """Images, their labels, and their positions in the source data set (the keys of `SampleRng`)."""

    x: Tensor
    """(B, C, H, W) float32 in [0, 1]."""
    y: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64."""

    @property
    def xy(self) -> tuple[Tensor, Tensor]:
        """Images and labels alone."""
        return self.x, self.y


def to_unit(pixels: Tensor, levels: int) -> Tensor:
    """uint8 pixels of any shape to float32 `pixels / levels`, bit for bit the same on every device."""
    # CUDA turns division by a Python scalar into multiplication by its reciprocal, which rounds differently
    return pixels.to(torch.float32).div_(torch.tensor(float(levels), device=pixels.device))


def owned(array: NDArray[np.generic]) -> Tensor:
    """The array as a tensor: shared where it is writeable, else copied (torch has no read-only tensors)."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def chunks(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Consecutive pieces of (N, C, H, W) pixels, each about 16 MiB."""
    step = max(1, _CHUNK_BYTES // max(1, pixels[:1].nbytes))
    for start in range(0, len(pixels), step):
        yield pixels[start : start + step]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split. Raises InputError if the arrays do not belong together."""

    pixels: NDArray[np.uint8]
    """(N, C, H, W), possibly a memory map."""
    labels: NDArray[np.int64]
    """(N,)."""
    ids: NDArray[np.int64]
    """(N,) positions in the source data set, unique over its splits."""
    levels: int
    """The pixel value that means 1.0: 255, or 16 for digits."""

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise InputError(
                f"pixels must be uint8 of shape (N, C, H, W), got {self.pixels.dtype} of shape {self.pixels.shape}"
            )
        for name, array in (("labels", self.labels), ("ids", self.ids)):
            if array.dtype != np.int64 or array.shape != self.pixels.shape[:1]:
                raise InputError(
                    f"{name} must be int64 of shape ({len(self.pixels)},), one per image,"
                    f" got {array.dtype} of shape {array.shape}"
                )
        if not 1 <= self.levels <= 255:
            raise InputError(f"levels must be in 1..255, got {self.levels}")
        if self.levels < 255:
            self._check_pixels()

    def _check_pixels(self) -> None:
        highest = max((int(chunk.max()) for chunk in chunks(self.pixels)), default=0)
        if highest > self.levels:
            raise InputError(f"pixels must be in 0..levels={self.levels}, got {highest}; raise levels or rescale them")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def images(self, index: Index) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] for the positions `index`."""
        return to_unit(owned(self.pixels[_plain(index)]), self.levels)

    def first(self, n: int | None) -> ImageSet:
        """The first `n` images (all of them if there are fewer, or for None), without a copy."""
        if n is None:
            return self
        if n < 1:
            raise InputError(f"the number of images must be at least 1, got {n}")
        return ImageSet(self.pixels[:n], self.labels[:n], self.ids[:n], self.levels)

    def select(self, indices: Index) -> ImageSet:
        """The images at `indices`, in that order; pixels are shared where the positions are consecutive."""
        rows = np.arange(len(self), dtype=np.int64)[_plain(indices)]
        return ImageSet(_gather(self.pixels, rows), self.labels[rows], self.ids[rows], self.levels)

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All images in order; the last batch may be short."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        return self._batches(batch_size, torch.device(device))

    def _batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            pixels, labels, ids = (
                torch.from_numpy(np.array(array[part])) for array in (self.pixels, self.labels, self.ids)
            )
            yield Batch(to_unit(pixels.to(device), self.levels), labels.to(device), ids.to(device))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape, levels, pixels, labels and ids."""
        digest = hashlib.sha256(json.dumps([self.levels, *self.pixels.shape]).encode())
        for chunk in chunks(self.pixels):
            digest.update(chunk.tobytes())
        for array in (self.labels, self.ids):
            digest.update(array.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    @cached_property
    def histogram(self) -> NDArray[np.int64]:
        """(C, 256): how often each channel takes each value."""
        counts = np.zeros((self.shape[0], 256), dtype=np.int64)
        for chunk in chunks(self.pixels):
            for channel, row in enumerate(counts):
                row += np.bincount(chunk[:, channel].ravel(), minlength=256)
        return counts

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of the pixels in [0, 1], from exact counts in float64.

        The deviation is at least 1e-3, so that dividing by it is safe for a constant channel.
        """
        values = np.arange(256, dtype=np.float64) / self.levels
        shares = self.histogram / self.histogram.sum(axis=1, keepdims=True)
        mean = shares @ values
        std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1)).clip(min=1e-3)
        return tuple(mean.tolist()), tuple(std.tolist())


def _plain(index: Index) -> NDArray[np.int64] | slice:
    if isinstance(index, slice):
        return index
    positions = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    return positions if positions.size else positions.astype(np.int64)


def _gather(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`pixels[rows]`: a view of consecutive rows, else in memory if small, else in an unnamed file."""
    if len(rows) and (np.diff(rows) == 1).all():
        return pixels[rows[0] : rows[-1] + 1]
    size = len(rows) * pixels[:1].nbytes
    if not isinstance(pixels, np.memmap) or fits(size, torch.device("cpu")):
        return pixels[rows]
    folder = Path(pixels.filename).parent if pixels.filename else None
    try:
        # written, not assigned through a map: a full disk is then an error and not a fatal signal
        with tempfile.TemporaryFile(dir=folder) as file:
            for part in np.array_split(rows, -(-size // _CHUNK_BYTES)):
                file.write(pixels[part].tobytes())
            file.flush()
            return np.memmap(file, np.uint8, "r", shape=(len(rows), *pixels.shape[1:]))
    except OSError as error:
        raise DiskError(
            f"cannot write {size} bytes of selected images beside {pixels.filename}: {error.strerror};"
            " free some space or choose another cache folder"
        ) from error


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one data set.

    Raises InputError if shapes differ, a label is outside the classes, or an id appears twice.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, what networks subtract: that of the training images in [0, 1], unless given."""
    std: tuple[float, ...]
    """Per channel, what they divide by: that of the training images, at least 1e-3, unless given."""
    notes: tuple[str, ...] = ()
    """Facts that a report of numbers on this data must state."""

    def __post_init__(self) -> None:
        for name, images in self.parts.items():
            if images.shape != self.train.shape or images.levels != self.train.levels:
                raise InputError(
                    f"{self.name}: {name} images have shape {images.shape} and {images.levels} levels,"
                    f" train images {self.train.shape} and {self.train.levels}; they must agree"
                )
            check_labels(f"{self.name}: {name}", images.labels, self.num_classes)
        ids = np.concatenate([images.ids for images in self.parts.values()])
        if len(np.unique(ids)) < len(ids):
            raise InputError(f"{self.name}: an image id appears twice; ids must be unique over all splits")

    @property
    def parts(self) -> dict[str, ImageSet]:
        """The splits by name."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.shape

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the three splits and the class names."""
        parts = [images.fingerprint for images in self.parts.values()]
        return hashlib.sha256(json.dumps([parts, self.class_names]).encode()).hexdigest()


def check_labels(where: str, labels: NDArray[np.int64], num_classes: int) -> None:
    """Raise InputError naming the first position whose label is outside 0..num_classes-1."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"{where} row {row}: label must be in 0..{num_classes - 1}, got {int(labels[row])}"
            f" ({len(outside)} such rows); mend the labels or name all classes"
        )


def duplicates(images: ImageSet, others: ImageSet) -> NDArray[np.int64]:
    """Positions in `images` of those that are equal, pixel for pixel, to some image of `others`."""
    known = {digest for _, digest in _digests(others)}
    return np.array([row for row, digest in _digests(images) if digest in known], dtype=np.int64)


def _digests(images: ImageSet) -> Iterator[tuple[int, bytes]]:
    row = 0
    for chunk in chunks(images.pixels):
        for image in chunk:
            yield row, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            row += 1
