"""Images that somebody else made, read from a file that need not be trusted, and checked image by image."""

# n images of the file, C channels, H height, W width

from __future__ import annotations

import hashlib
import io
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.threat import ThreatModel

_SPARE = 1 << 20
"""Bytes that a file may be larger than its images."""
_PER_IMAGE = 64
"""Bytes of ids, labels and predictions of one image."""
_DTYPES = ("uint8", "float16", "float32", "float64")
_UNSOUND: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    OverflowError,
)
"""What zipfile and numpy raise over bytes that somebody made up."""
_VERSION = (1, 0)
"""Of the .npy format. Later ones are for headers of more than 65,535 bytes, which no array of plain numbers has: they
may declare 4 GiB, and all of it is read before numpy looks at its size."""


@dataclass(frozen=True, eq=False)
class Submission:
    """The images of a file, each inside the ball around the clean one."""

    sha256: str
    """Of the file, in hexadecimal."""
    ids: Tensor
    """(n,) int64 the samples, each once."""
    x_adv: Tensor
    """(n, C, H, W) float32 in [0, 1]."""


def read_submission(path: Path, images: ImageSet, threat: ThreatModel) -> Submission:
    """The images of an .npz file: `x_adv` (n, C, H, W), float in [0, 1] or uint8 (over 255), and `ids` (n,); `labels`
    or `y` (n,) if it has them. `phalanx attack` writes such files. Nothing in the file is run.

    Raises InputError naming the row of whatever is wrong: a file that is too large or no .npz, another shape or kind,
    pixels that are not finite or outside [0, 1], samples that `images` does not have or that come twice, labels that
    are not those of `images`, and images outside `threat`.
    """
    arrays, sha256 = _arrays(path, _most_bytes(images))
    for name in ("x_adv", "ids"):
        if name not in arrays:
            raise InputError(
                f"{path} has no {name}; give x_adv (n, C, H, W) and ids (n,), as phalanx attack writes them"
            )
    pixels, ids = arrays["x_adv"], arrays["ids"]
    _check_shapes(path, pixels, images)
    places = _places(path, _integers(path, "ids", ids, len(pixels)), images)
    for name in ("labels", "y"):
        if name in arrays:
            _check_labels(path, name, _integers(path, name, arrays[name], len(pixels)), places, images)
    x_adv = _unit(path, pixels)
    _check_ball(path, x_adv, places, images, threat)
    return Submission(sha256, torch.from_numpy(images.ids[places]), torch.from_numpy(x_adv))


# -- the file ------------------------------------------------------------------------------------------------------


def _most_bytes(images: ImageSet) -> int:
    return _SPARE + len(images) * (math.prod(images.shape) * 8 + _PER_IMAGE)


def _arrays(path: Path, most: int) -> tuple[dict[str, NDArray[Any]], str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the name")
    if path.stat().st_size > most:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {most:,} that all images of the evaluation "
            "take; check the name"
        )
    with path.open("rb") as file:
        content = file.read(most + 1)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names: dict[str, zipfile.ZipInfo] = {
                info.filename.removesuffix(".npy"): info for info in archive.infolist()
            }
            arrays = {
                name: _array(path, name, archive, info, most)
                for name, info in names.items()
                if name in ("x_adv", "ids", "labels", "y")
            }
    except _UNSOUND as error:
        raise InputError(f"{path} is no sound .npz file ({error}); write it with numpy.savez_compressed") from None
    return arrays, hashlib.sha256(content).hexdigest()


def _array(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> NDArray[Any]:
    """An array whose header was read before anything was set aside for it; no object is ever unpickled."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != _VERSION:
            raise ValueError(f"{name} has version {version} of the .npy format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject or dtype.names is not None:
            raise InputError(f"{path}: {name} holds Python objects, which are never unpickled; give plain numbers")
        if any(side < 0 for side in shape):
            raise ValueError(f"{name} has the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        if size > most:
            raise InputError(
                f"{path}: {name} has the shape {shape}, more than all images of the evaluation; give at most those"
            )
        data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{name} ends early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


# -- what it holds -------------------------------------------------------------------------------------------------


def _check_shapes(path: Path, pixels: NDArray[Any], images: ImageSet) -> None:
    if pixels.ndim != 4 or pixels.shape[1:] != images.shape or not len(pixels):
        raise InputError(
            f"{path}: x_adv must have the shape (n, {', '.join(map(str, images.shape))}) of at least one image, got "
            f"{pixels.shape}"
        )
    if pixels.dtype.name not in _DTYPES:
        raise InputError(f"{path}: x_adv must be float in [0, 1] or uint8, got {pixels.dtype}")


def _integers(path: Path, name: str, values: NDArray[Any], n: int) -> NDArray[np.int64]:
    if values.shape != (n,) or values.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {name} must be {n} whole numbers, one for each image, got {values.dtype} of shape {values.shape}"
        )
    if len(values) and int(values.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{path}: {name}[{int(values.argmax())}] is {int(values.max())}, which is too large")
    return values.astype(np.int64)


def _places(path: Path, ids: NDArray[np.int64], images: ImageSet) -> NDArray[np.int64]:
    """Of each row the place of its sample in `images`."""
    place = {sample: place for place, sample in enumerate(images.ids.tolist())}
    first: dict[int, int] = {}
    for row, sample in enumerate(ids.tolist()):
        if sample not in place:
            raise InputError(
                f"{path}: ids[{row}] is {sample}, but the evaluation has no such sample; its {len(images):,} ids go "
                f"from {images.ids.min()} to {images.ids.max()}"
            )
        if sample in first:
            raise InputError(f"{path}: ids[{row}] is {sample}, as ids[{first[sample]}] is; give each sample once")
        first[sample] = row
    return np.array([place[sample] for sample in ids.tolist()], dtype=np.int64)


def _check_labels(
    path: Path, name: str, labels: NDArray[np.int64], places: NDArray[np.int64], images: ImageSet
) -> None:
    expected = images.labels[places]
    wrong = np.flatnonzero(labels != expected)
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{path}: {name}[{row}] is {labels[row]}, but sample {images.ids[places[row]]} has the label "
            f"{expected[row]}; these images belong to other data"
        )


def _unit(path: Path, pixels: NDArray[Any]) -> NDArray[np.float32]:
    """(n, C, H, W) float32 in [0, 1]."""
    if pixels.dtype == np.uint8:
        return (pixels.astype(np.float32)) / np.float32(255)
    flat = pixels.reshape(len(pixels), -1)
    # a NaN fails both comparisons
    outside = np.flatnonzero(~((flat >= 0) & (flat <= 1)).all(1))
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"{path}: x_adv[{row}] has pixels that are not finite or not in [0, 1]; clip them, and divide by 255 where "
            "they are up to 255"
        )
    return np.array(pixels, dtype=np.float32, order="C")


def _check_ball(
    path: Path, x_adv: NDArray[np.float32], places: NDArray[np.int64], images: ImageSet, threat: ThreatModel
) -> None:
    for start in range(0, len(x_adv), 1024):
        part, x = torch.from_numpy(x_adv[start : start + 1024]), images.images(places[start : start + 1024])
        outside = (~threat.contains(part, x)).nonzero().flatten()
        if len(outside):
            row = int(outside[0])
            far = float(threat.distance(part[row : row + 1], x[row : row + 1]))
            sample = images.ids[places[start + row]]
            raise InputError(
                f"{path}: x_adv[{start + row}] is {far:.6g} away from sample {sample} in {threat.norm}, more than "
                f"{threat.eps}; give images inside the ball"
            )
