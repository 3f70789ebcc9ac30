"""`metrics.jsonl`: one strict JSON object a line, appended to, and cut back to the checkpoint on resume."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phalanx.errors import CorruptError
from phalanx.runs.atomic import disk_errors, failpoint
from phalanx.runs.canonical import JSON, canonical_json, parse_json

NON_FINITE = "nonfinite"


def encode_record(record: Mapping[str, Any]) -> dict[str, JSON]:
    """The record as plain JSON; NumPy and torch scalars become numbers.

    JSON has no NaN: such a number becomes null, and the added field `nonfinite` maps its dotted place to
    "nan", "inf" or "-inf".
    """
    if NON_FINITE in record:
        raise ValueError(f"the key {NON_FINITE!r} of a metrics record is reserved")
    found: dict[str, JSON] = {}
    encoded = {str(key): _encode(value, str(key), found) for key, value in record.items()}
    return {**encoded, NON_FINITE: found} if found else encoded


def _encode(value: Any, where: str, found: dict[str, JSON]) -> JSON:
    if isinstance(value, Mapping):
        return {str(key): _encode(child, f"{where}.{key}", found) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(child, f"{where}.{index}", found) for index, child in enumerate(value)]
    plain: JSON = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        found[where] = str(plain)
        return None
    return plain


def _sound_length(content: bytes) -> int:
    """Bytes up to the end of the last whole line: a kill or a power cut may have torn the one behind it."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        if end:
            parse_json(content[start:end])
    except ValueError:
        return start
    return end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record, without a torn last line; no file, no records.

    Raises CorruptError naming the line where anything before the last one is not a JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    records = []
    for number, line in enumerate(content[: _sound_length(content)].split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CorruptError(f"{path}, line {number}: not a JSON object; cut the file before it or restore a copy")
        records.append(record)
    return records


class MetricsLog:
    """The log open for writing; a torn last line is cut off on opening. Hold the run's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path, 0):
            self._file = path.open("ab", buffering=0)
            self._file.truncate(_sound_length(path.read_bytes()))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record (see `encode_record`) as one line; readers see it when this returns."""
        line = canonical_json(encode_record(record)) + b"\n"
        start = self.path.stat().st_size
        with disk_errors(self.path, len(line)):
            try:
                self._write(line)
            except OSError:
                # half a line would spoil the next one
                self._file.truncate(start)
                raise

    def _write(self, line: bytes) -> None:
        written = 0
        failpoint("metrics.append")
        while written < len(line):
            written += self._file.write(line[written:])

    def offset(self) -> int:
        """The length in bytes, flushed to the disk first: what a checkpoint records."""
        with disk_errors(self.path, 0):
            os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def truncate_to(self, offset: int) -> None:
        """Cut everything that came after `offset`, which must be one that `offset()` gave.

        Raises CorruptError if the log is shorter, or no line ends there.
        """
        content = self.path.read_bytes()
        if not 0 <= offset <= len(content):
            raise CorruptError(
                f"{self.path} has {len(content)} bytes, its checkpoint was made at {offset}: lines are lost"
            )
        if offset and content[offset - 1 : offset] != b"\n":
            raise CorruptError(f"{self.path}: no line ends at byte {offset}, where its checkpoint was made")
        self._file.truncate(offset)
        os.fsync(self._file.fileno())

    def digest(self, offset: int) -> str:
        """Hexadecimal sha256 of the first `offset` bytes."""
        return hashlib.sha256(self.path.read_bytes()[:offset]).hexdigest()

    def close(self) -> None:
        """Close the file; the log cannot be used afterwards."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
