"""Which models a folder's numbers are of: a finished folder says nothing about any other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from phalanx.errors import InputError
from phalanx.models import MODEL_NAME, Weights
from phalanx.runs.canonical import sha256_json
from phalanx.runs.manifest import read_manifest


def made_of(runs: Iterable[Path], weights: Weights) -> list[str]:
    """Of each finished run the sha256 of its model: of how it is built, and of its weights. Nothing is loaded."""
    return [_of_run(run, weights) for run in runs]


def _of_run(run: Path, weights: Weights) -> str:
    files = read_manifest(run)
    names = (MODEL_NAME, f"{weights}.safetensors")
    return sha256_json([files[name].sha256 if name in files else None for name in names])


def refuse_other_model(folder: Path, same: bool) -> None:
    """Raises InputError unless the folder's finished numbers are of the `same` model as is asked for."""
    if not same:
        raise InputError(
            f"{folder} is finished, but of another model: what is asked for has other weights or is built otherwise; "
            f"choose another --out, or remove {folder} to begin anew"
        )
