"""The images that an evaluation kept to be looked at: what gallery.npz says, and its pictures."""

# K images, C channels, H height, W width, G gates

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from phalanx.errors import CorruptError

_MOST_BYTES = 1 << 28
"""A file that unpacks to more is none of ours."""
_FEW_ROWS = 3
_SHOWN, _SHOWN_OF_MANY = {False: 6, True: 2}, {False: 3, True: 1}
"""So many broken images, and so many that held, a row shows on a page of few rows, and of more."""
_PAGE_BYTES = 400_000
"""What all pictures of a page may take, about: noise does not compress."""
_LARGEST, _SMALLEST = 96, 24
"""Pixels along a side."""
_COLUMNS = {"x": 4, "x_adv": 4, "y": 1, "ids": 1, "predicted": 1, "held": 1, "attack": 1, "before": 2, "after": 2}
"""Dimensions of each array, the first of them K."""


@dataclass(frozen=True)
class Kept:
    """One image, clean and as an attack left it."""

    sample: int
    label: int
    predicted: int
    """After the attack."""
    held: bool
    attack: str
    before: tuple[int, ...]
    """(G,) the first expert of each gate for the clean image."""
    after: tuple[int, ...]
    """(G,) and for the attacked one."""
    x: NDArray[np.float32]
    """(C, H, W) in [0, 1]."""
    x_adv: NDArray[np.float32]


@dataclass(frozen=True)
class Gallery:
    """What gallery.npz says."""

    gates: tuple[str, ...]
    """Names of the gates that have a choice; "" for the only one."""
    images: tuple[Kept, ...]
    """The broken ones first."""

    def to_json(self) -> list[dict[str, Any]]:
        """Everything but the pixels."""
        names = ("sample", "label", "predicted", "held", "attack", "before", "after")
        return [{name: getattr(kept, name) for name in names} for kept in self.images]


def read_gallery(path: Path) -> Gallery | None:
    """The images in a file, None if there is none. Raises CorruptError if it is not what an evaluation writes."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(part.file_size for part in packed.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as content:
            columns = {name: content[name] for name in (*_COLUMNS, "gates")}
        return _gallery(columns)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path} cannot be read: {error}; restore it from a copy, or evaluate again") from None


def _gallery(columns: dict[str, NDArray[Any]]) -> Gallery:
    count, gates = len(columns["x"]), len(columns["gates"])
    for name, dimensions in _COLUMNS.items():
        found = columns[name]
        if found.ndim != dimensions or len(found) != count or (dimensions == 2 and found.shape[1] != gates):
            raise ValueError(f"{name} is of shape {found.shape}, which does not fit the rest")
    for name in ("x", "x_adv"):
        pixels = columns[name]
        if pixels.dtype != np.float32 or pixels.shape != columns["x"].shape or pixels.size == 0:
            raise ValueError(f"{name} holds {pixels.dtype} of shape {pixels.shape}, no images of float32")
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(f"{name} has pixels outside [0, 1]")
    kept = [
        Kept(
            sample=int(columns["ids"][place]),
            label=int(columns["y"][place]),
            predicted=int(columns["predicted"][place]),
            held=bool(columns["held"][place]),
            attack=str(columns["attack"][place]),
            before=tuple(map(int, columns["before"][place])),
            after=tuple(map(int, columns["after"][place])),
            x=columns["x"][place],
            x_adv=columns["x_adv"][place],
        )
        for place in range(count)
    ]
    return Gallery(tuple(map(str, columns["gates"])), tuple(sorted(kept, key=lambda one: one.held)))


# -- drawn ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One image as the page shows it."""

    sample: int
    held: bool
    attack: str
    became: str
    """ "3 → 5", the label and the answer under attack."""
    experts: str
    """ "expert 0 → 2", of each gate; empty without any."""
    enlarged: str
    """By how much the perturbation is: "×2.7"; empty where there is none."""
    pictures: tuple[tuple[str, str], ...]
    """Clean, perturbation, attacked: what a reader who cannot see it is told, and a data: address."""


def side(rows: int, galleries: Sequence[Gallery]) -> int:
    """Of the pictures in pixels, so that the page stays small however many `rows` it has."""
    shown = sum(len(chosen(gallery, rows)) for gallery in galleries)
    channels = max((len(gallery.images[0].x) for gallery in galleries if gallery.images), default=1)
    fits = math.isqrt(round(_PAGE_BYTES / (4 * max(shown, 1) * channels)))
    return max(_SMALLEST, min(_LARGEST, fits))


def chosen(gallery: Gallery, rows: int) -> list[Kept]:
    """The images of a row that a page of so many rows shows."""
    most = _SHOWN if rows <= _FEW_ROWS else _SHOWN_OF_MANY
    return [
        kept for held, count in most.items() for kept in [one for one in gallery.images if one.held is held][:count]
    ]


def card(gallery: Gallery, kept: Kept, names: Sequence[str], size: int) -> Card:
    """The three pictures of an image; `names` of the classes, `size` of the pictures at most."""
    difference = kept.x_adv - kept.x
    largest = float(np.abs(difference).max())
    enlarged = 0.5 / largest if largest else 1.0
    label, predicted = (names[at] if 0 <= at < len(names) else str(at) for at in (kept.label, kept.predicted))
    about = f"image {kept.sample}"
    times = f"×{enlarged:.3g}" if largest else ""
    says = f"the perturbation of {about}, enlarged {times}" if times else f"no perturbation of {about}"
    pictures = (
        (f"{about}, clean: {label}", kept.x),
        (says, 0.5 + enlarged * difference),
        (f"{about} after {kept.attack}: answered {predicted}", kept.x_adv),
    )
    moves = zip(gallery.gates, kept.before, kept.after, strict=True)
    return Card(
        sample=kept.sample,
        held=kept.held,
        attack=kept.attack,
        became=f"{label} → {predicted}",
        experts=", ".join(f"{name + ': ' if name else ''}expert {old} → {new}" for name, old, new in moves),
        enlarged=times,
        pictures=tuple((told, _address(pixels, size)) for told, pixels in pictures),
    )


def _address(pixels: NDArray[np.float32], size: int) -> str:
    """A PNG as a data: address; images of neither 1 nor 3 channels show their first."""
    whole = _smaller(pixels, size)
    levels = np.rint(255 * whole.clip(0, 1)).astype(np.uint8)
    drawn = Image.fromarray(levels.transpose(1, 2, 0) if len(levels) == 3 else levels[0])
    content = io.BytesIO()
    drawn.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _smaller(pixels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(C, h, w) means over squares of pixels, the least that fit into `size`; the rest at the edges is cut off."""
    channels, height, width = pixels.shape
    step = -(-max(height, width) // size)
    step = min(step, height, width)
    rows, columns = height // step, width // step
    squares = pixels[:, : rows * step, : columns * step].reshape(channels, rows, step, columns, step)
    means: NDArray[np.float32] = squares.mean((2, 4))
    return means
