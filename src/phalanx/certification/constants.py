"""The Lipschitz constants of a model's networks, kept in a file: another method or grid does not make them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import render_json
from phalanx.runs.sidecar import read_protected, write_protected
from phalanx.threat import Norm

VERSION = 1
"""Of how constants are made: files of another version are made again."""

Constants: TypeAlias = Mapping[str, Tensor]
"""By a network's path in its model: (C, C) constants of the differences of two outputs, float64."""


def read_constants(path: Path, model_sha256: str, norm: Norm) -> Constants | None:
    """What `write_constants` wrote for this model and norm; None where there is no such file, or it was altered, is
    damaged, or holds another model's constants: they are then to be made again."""
    try:
        record = json.loads(read_protected(path))
        if (record["version"], record["model_sha256"], record["norm"]) != (VERSION, model_sha256, norm):
            return None
        return {str(name): _square(rows) for name, rows in record["constants"].items()}
    except (CorruptError, InputError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_constants(path: Path, model_sha256: str, norm: Norm, constants: Constants) -> None:
    """To `path`, with its sha256 beside it. Constants that are not finite are left out: they are made again."""
    finite = {name: each.tolist() for name, each in constants.items() if bool(each.isfinite().all())}
    record: dict[str, Any] = {"version": VERSION, "model_sha256": model_sha256, "norm": norm, "constants": finite}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_protected(path, render_json(record))


def _square(rows: Any) -> Tensor:
    found = torch.tensor(rows, dtype=torch.float64)
    if found.dim() != 2 or found.shape[0] != found.shape[1] or not all(map(math.isfinite, found.flatten().tolist())):
        raise ValueError("constants must be a finite square matrix")
    return found
