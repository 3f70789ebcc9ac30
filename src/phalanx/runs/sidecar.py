"""A file and its sha256 beside it (`NAME.sha256`, as `sha256sum` writes it).

While a file is being replaced its sidecar lists the old and the new digest, so that a kill at any moment
leaves a pair that verifies.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import sha256_file, write_bytes

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sidecar_path(path: Path) -> Path:
    """Where the sha256 of `path` is kept."""
    return path.with_name(path.name + ".sha256")


def _render(path: Path, digests: list[str]) -> bytes:
    return "".join(f"{digest}  {path.name}\n" for digest in digests).encode()


def _read_digests(path: Path) -> list[str]:
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        raise CorruptError(f"{path} has no {sidecar.name} beside it: its content cannot be trusted; restore both")
    content = sidecar.read_bytes()
    matches = [_LINE.fullmatch(line) for line in content.decode("utf-8", "replace").split("\n")]
    digests = [match[1] for match in matches if match]
    if not digests or content != _render(path, digests):
        raise CorruptError(
            f"{sidecar} is damaged, or the file was renamed: expected lines of a sha256, two spaces and "
            f"{path.name!r}; restore it from a copy"
        )
    return digests


def _check(path: Path, found: str) -> str:
    expected = _read_digests(path)
    if found not in expected:
        raise CorruptError(
            f"{path} is damaged: expected sha256 {' or '.join(expected)}, found {found}; restore it from a copy"
        )
    return found


def write_sidecar(path: Path) -> str:
    """Record the sha256 of the file as it is, and return it."""
    digest = sha256_file(path)
    write_bytes(sidecar_path(path), _render(path, [digest]))
    return digest


def verify_sidecar(path: Path) -> str:
    """The sha256 of a file that matches its sidecar. Raises CorruptError naming expected and found sha256."""
    return _check(path, sha256_file(path))


def read_protected(path: Path) -> bytes:
    """The content of a file that matches its sidecar. Raises CorruptError, InputError if there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the name") from None
    _check(path, hashlib.sha256(data).hexdigest())
    return data


def _sound_digests(path: Path) -> list[str]:
    """The digest of the file as it is, if its sidecar vouches for it; else nothing."""
    try:
        return [verify_sidecar(path)]
    except (CorruptError, FileNotFoundError):
        return []


def write_protected(path: Path, data: bytes) -> None:
    """Replace a file and its sidecar; killed anywhere between, the old or the new content verifies."""
    new = hashlib.sha256(data).hexdigest()
    write_bytes(sidecar_path(path), _render(path, [*_sound_digests(path), new]))
    write_bytes(path, data)
    write_bytes(sidecar_path(path), _render(path, [new]))
