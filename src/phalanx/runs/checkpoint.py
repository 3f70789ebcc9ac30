"""Checkpoints: folders of safetensors and JSON that appear whole, verify, and always leave one to go back to.

    FOLDER/step-00000123/{model,ema,optimizer,...}.safetensors, state.json, MANIFEST.json
    FOLDER/LATEST                the newest folder's name and its manifest's sha256

A save writes a temporary folder, flushes every file and the folder itself, renames it, flushes the parent,
replaces `LATEST`, and only then removes older checkpoints.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as render_safetensors
from torch import Tensor

from phalanx.errors import CorruptError, DiskError, DivergedError, InputError
from phalanx.runs.atomic import (
    disk_errors,
    failpoint,
    free_bytes,
    remove,
    remove_stray_temporaries,
    render_json,
    sha256_file,
    sync_folder,
    temporary_in,
    write_new,
    write_text,
)
from phalanx.runs.canonical import JSON, canonical_json, non_finite, parse_json
from phalanx.runs.manifest import MANIFEST_NAME, FileRecord, render_manifest, verify_manifest
from phalanx.runs.sidecar import read_protected, write_protected

CHECKPOINT_SCHEMA = 1
LATEST_NAME = "LATEST"
STATE_NAME = "state.json"

_SUFFIX = ".safetensors"
_METADATA = "phalanx"
_GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# ".old" is a checkpoint that one of the same step is about to replace
_STEP_NAME = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; all tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    notes: tuple[str, ...]
    """What was wrong with newer checkpoints that were passed over; empty when all is well."""


def _check_finite(group: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # one-byte floats have no isfinite of their own
        finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)
        if not bool(finite.all()):
            raise DivergedError(
                f"{group} tensor {name!r} of shape {tuple(tensor.shape)} holds {int((~finite).sum())} "
                "non-finite numbers; nothing was written, the last finite checkpoint is kept"
            )


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors demands (tied weights are copied)."""
    seen: set[int] = set()
    independent = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        independent[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return independent


def _render_group(group: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    _check_finite(group, tensors)
    # one key: the format writes several in random order, and equal files must have equal bytes
    described = canonical_json({**metadata, "schema": str(CHECKPOINT_SCHEMA)}).decode()
    rendered: bytes = render_safetensors(_independent(tensors), metadata={_METADATA: described})
    return rendered


def _parse_group(path: Path, content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors: dict[str, Tensor] = parse_safetensors(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: dict[str, str] = parse_json(header.get("__metadata__", {}).get(_METADATA, "{}"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CorruptError(f"{path} is no safetensors file: {error}; restore it from a copy") from error
    _check_schema(path, metadata.pop("schema", str(CHECKPOINT_SCHEMA)))
    return tensors, metadata


def _check_schema(path: Path, schema: object) -> None:
    if str(schema) != str(CHECKPOINT_SCHEMA):
        raise InputError(f"{path} has schema {schema}, this version reads {CHECKPOINT_SCHEMA}; use a newer phalanx")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file and its `.sha256`. The metadata key `schema` is ours.

    Raises DivergedError naming a tensor that is not finite (nothing is written), and DiskError.
    """
    write_protected(path, _render_group(path.stem, tensors, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU) and metadata of a file that `save_tensors` wrote.

    Raises CorruptError if the file does not match its sha256, InputError if there is no such file.
    """
    return _parse_group(path, read_protected(path))


def _render_files(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]
) -> dict[str, bytes]:
    """Every file of a checkpoint but its manifest. Raises DivergedError for what is not finite."""
    where = non_finite(state)
    if where is not None:
        raise DivergedError(f"state {where!r} is not finite at step {step}; nothing was written")
    files = {}
    for group, members in tensors.items():
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"a checkpoint's tensor groups are named by letters, digits and ._-, got {group!r}")
        files[group + _SUFFIX] = _render_group(group, members, {})
    files[STATE_NAME] = render_json({"schema": CHECKPOINT_SCHEMA, "step": step, "state": state})
    return files


def _require_space(folder: Path, size: int) -> None:
    free = free_bytes(folder)
    if free < 2 * size:
        raise DiskError(
            f"cannot save a checkpoint in {folder}: {2 * size} bytes needed (twice its size), {free} free; "
            "free space, then start again: the last checkpoint is intact"
        )


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint, newest first; of one step, the one being replaced comes second."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, key=lambda entry: (-entry[0], entry[1].name))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int = 2,
) -> Path:
    """Write `folder/step-<step>` and return it; `keep` checkpoints stay, those of later steps are removed.

    `tensors` has one file per key: model, ema, optimizer, ... Call it while holding the run's lock.
    Raises DivergedError naming the first tensor or state number that is not finite (nothing is written), and
    DiskError when less than twice the size is free or a write fails (the last checkpoint is intact).
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, got keep={keep}, step={step}")
    files = _render_files(step, tensors, state)
    size = sum(map(len, files.values()))
    with disk_errors(folder, 2 * size):
        folder.mkdir(parents=True, exist_ok=True)
        remove_stray_temporaries(folder)
        _require_space(folder, size)
        path = folder / f"step-{step:08d}"
        _write_folder(path, files)
        failpoint("save.latest")
        write_text(folder / LATEST_NAME, f"{path.name} {sha256_file(path / MANIFEST_NAME)}\n")
        failpoint("save.prune")
        _prune(folder, step, keep)
        failpoint("save.end")
    return path


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    temporary = temporary_in(path.parent)
    try:
        failpoint("save.open")
        temporary.mkdir()
        for name, content in {**files, MANIFEST_NAME: _manifest_of(files)}.items():
            write_new(temporary / name, content, name)
        failpoint("save.sync")
        sync_folder(temporary)
        _make_way(path)
        failpoint("save.rename")
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        raise
    failpoint("save.after_rename")
    sync_folder(path.parent)


def _manifest_of(files: Mapping[str, bytes]) -> bytes:
    # from the bytes in memory, not from the disk: what the disk changed on the way must not verify
    return render_manifest(
        {name: FileRecord(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    )


def _make_way(path: Path) -> None:
    """Move a checkpoint of the same step aside, where `load_latest` still finds it."""
    if path.exists():
        old = path.with_name(path.name + ".old")
        _remove_checkpoint(old)
        path.rename(old)


def _prune(folder: Path, step: int, keep: int) -> None:
    older = [path for other, path in _step_folders(folder) if other < step]
    # a later step belongs to a future that was abandoned by going back
    abandoned = [path for other, path in _step_folders(folder) if other > step or path.name.endswith(".old")]
    for path in dict.fromkeys([*older[keep - 1 :], *abandoned]):
        _remove_checkpoint(path)


def _remove_checkpoint(path: Path) -> None:
    if path.exists():
        # renamed first: a kill half-way must not leave half a checkpoint under a checkpoint's name
        doomed = temporary_in(path.parent)
        path.rename(doomed)
        failpoint("save.remove")
        remove(doomed)


def _load(step: int, path: Path, notes: tuple[str, ...]) -> Checkpoint:
    """Raises CorruptError unless every file verifies."""
    files = verify_manifest(path)
    tensors = {
        name.removesuffix(_SUFFIX): _parse_group(path / name, (path / name).read_bytes())[0]
        for name in files
        if name.endswith(_SUFFIX)
    }
    if STATE_NAME not in files:
        raise CorruptError(f"{path / MANIFEST_NAME} does not record {STATE_NAME}")
    try:
        record = parse_json((path / STATE_NAME).read_bytes())
        schema, state = record["schema"], dict(record["state"])
    except (ValueError, KeyError, TypeError):
        raise CorruptError(f"{path / STATE_NAME} is damaged: it is no state of a run; restore it from a copy") from None
    _check_schema(path / STATE_NAME, schema)
    return Checkpoint(step, tensors, state, notes)


def _latest_first(folder: Path) -> tuple[list[tuple[int, Path]], tuple[str, ...]]:
    """The checkpoints in the order to try them, and a note if `LATEST` is of no use."""
    candidates = _step_folders(folder)
    pointer = folder / LATEST_NAME
    if not pointer.exists():
        return candidates, ()
    name, _, digest = pointer.read_text(errors="replace").rstrip("\n").partition(" ")
    for entry in candidates:
        manifest = entry[1] / MANIFEST_NAME
        # by content, not by name: it may have been moved aside by a save that was killed
        if manifest.is_file() and sha256_file(manifest) == digest:
            return [entry, *(other for other in candidates if other != entry)], ()
    return candidates, (f"{pointer} names no sound checkpoint ({name!r}); took the newest that verifies",)


def load_latest(folder: Path) -> Checkpoint | None:
    """The checkpoint that `LATEST` names, else the newest that verifies; None if none was ever written.

    A damaged one is passed over and said so in `notes`. Raises CorruptError naming file and sha256 when no
    checkpoint verifies. Changes nothing on the disk.
    """
    candidates, notes = _latest_first(folder)
    for step, path in candidates:
        try:
            return _load(step, path, notes)
        except CorruptError as error:
            notes = (*notes, str(error))
    if notes:
        raise CorruptError(f"no checkpoint in {folder} verifies: " + "; ".join(notes))
    return None
