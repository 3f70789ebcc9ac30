"""What a folder and a Parquet data set have in common: named splits of encoded, labelled images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.data.problems import Problems


class Row(NamedTuple):
    """One image as stored."""

    where: str
    """File, or file and row, for messages."""
    data: bytes | NDArray[np.uint8]
    """An encoded PNG or JPEG image, or pixels (C, H, W), C 1 or 3."""
    label: int


@dataclass(frozen=True)
class Source:
    """An examined data set whose images have not been decoded yet."""

    title: str
    """Kind and last part of the path, for reports: "folder:flowers"."""
    class_names: tuple[str, ...] | None
    """None where only the labels' numbers are known."""
    counts: Mapping[str, int]
    """Images of each split: "train", and "val" and "test" where the source has them."""
    identity: Mapping[str, Any]
    """JSON values that change whenever the source does."""
    rows: Callable[[str, Problems], Iterator[Row]]
    """The images of a split; rows that cannot be read are noted as problems and left out."""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
