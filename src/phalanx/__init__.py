"""Phalanx: train, attack, certify and report on image classifiers that are mixtures of experts.

`import phalanx as px` is cheap: names are looked up in `phalanx.api` when first used, so neither the import nor
`phalanx --help` loads torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    missing = AttributeError(f"module 'phalanx' has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    if importlib.util.find_spec(f"phalanx.{name}") is not None:
        return importlib.import_module(f"phalanx.{name}")
    try:
        return getattr(importlib.import_module("phalanx.api"), name)
    except AttributeError:
        raise missing from None


def __dir__() -> list[str]:
    return sorted([*importlib.import_module("phalanx.api").__all__, "__version__"])
