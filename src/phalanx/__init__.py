"""Phalanx: train, attack, certify and report on image classifiers that are mixtures of experts.

`import phalanx as px` is cheap: names are looked up in `phalanx.api` when first used, so neither the import nor
`phalanx --help` loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
    api = importlib.import_module("phalanx.api")
    try:
        return getattr(api, name)
    except AttributeError:
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*importlib.import_module("phalanx.api").__all__, "__version__"])
