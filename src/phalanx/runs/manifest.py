"""`MANIFEST.json`: the sha256 and size of every file of a finished folder, and of the manifest itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import render_json, sha256_file, write_bytes
from phalanx.runs.canonical import JSON, parse_json, sha256_json
from phalanx.runs.paths import inside

MANIFEST_NAME = "MANIFEST.json"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    bytes: int


def render_manifest(files: Mapping[str, FileRecord]) -> bytes:
    """The one text of a manifest; its own sha256 is over the canonical JSON of schema and files."""
    content: dict[str, JSON] = {
        "schema": MANIFEST_SCHEMA,
        "files": {name: asdict(record) for name, record in files.items()},
    }
    return render_json({**content, "sha256": sha256_json(content)})


def write_manifest(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Record the named files (relative, inside `folder`) as they are now, and return the records."""
    files = {}
    for name in names:
        path = inside(folder, name)
        files[name] = FileRecord(sha256_file(path), path.stat().st_size)
    write_bytes(folder / MANIFEST_NAME, render_manifest(files))
    return files


def read_manifest(folder: Path, name: str = MANIFEST_NAME) -> dict[str, FileRecord]:
    """The records of a manifest that is itself whole. Raises CorruptError naming the manifest, and its
    sha256s.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing: {folder} was not finished, or is damaged") from None
    return _parse(path, content)


def _parse(path: Path, content: bytes) -> dict[str, FileRecord]:
    found = hashlib.sha256(content).hexdigest()
    try:
        parsed = parse_json(content)
        schema, recorded = parsed["schema"], parsed["sha256"]
        files = {name: FileRecord(str(entry["sha256"]), int(entry["bytes"])) for name, entry in parsed["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CorruptError(f"{path} is damaged: it is no manifest (sha256 of the file: {found})") from None
    if (
        isinstance(schema, int)
        and schema > MANIFEST_SCHEMA
        and recorded == sha256_json({"schema": schema, "files": parsed["files"]})
    ):
        raise InputError(f"{path} has schema {schema}, this version reads up to {MANIFEST_SCHEMA}; use a newer phalanx")
    # comparing the whole text, not only the digest, leaves no byte that could change unnoticed
    expected = render_manifest(files)
    if content != expected:
        raise CorruptError(f"{path} is damaged: expected sha256 {hashlib.sha256(expected).hexdigest()}, found {found}")
    return files


def verify_manifest(folder: Path) -> dict[str, FileRecord]:
    """Check every recorded file, and return the records.

    Raises CorruptError naming the first file that is missing, cut or changed, with the expected and found
    sha256.
    """
    files = read_manifest(folder)
    verify_files(folder, files)
    return files


def verify_files(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Check these files. Raises CorruptError as `verify_manifest`."""
    for name, record in sorted(files.items()):
        _verify_file(inside(folder, name), record)


def _verify_file(path: Path, record: FileRecord) -> None:
    expected = f"expected sha256 {record.sha256} ({record.bytes} bytes)"
    if not path.is_file():
        raise CorruptError(f"{path} is missing: {expected}")
    found, size = sha256_file(path), path.stat().st_size
    if (found, size) != (record.sha256, record.bytes):
        raise CorruptError(f"{path} is damaged: {expected}, found {found} ({size} bytes)")
