"""Data: named sets and the user's own images, as uint8 splits that become float images in [0, 1].

`phalanx.data.config` is free of torch, so the names are looked up when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.data.config import DataConfig
    from phalanx.data.load import load_data
    from phalanx.data.loader import Loader
    from phalanx.data.splits import Batch, ImageSet, Splits

__all__ = ["Batch", "DataConfig", "ImageSet", "Loader", "Splits", "load_data"]

_HOMES = {
    "Batch": "splits",
    "DataConfig": "config",
    "ImageSet": "splits",
    "Loader": "loader",
    "Splits": "splits",
    "load_data": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phalanx.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"phalanx.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
