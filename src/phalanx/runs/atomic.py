"""Files that are there whole or not at all, whenever the process is killed or the disk is full.

A write goes to a temporary file in the same folder, is flushed to the disk, and takes the final name in one
rename; the folder is flushed last, so that the new name outlives a power cut too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.errors import DiskError, InputError
from phalanx.runs.canonical import JSON

FAILPOINT_VARIABLE = "PHALANX_FAILPOINT"

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})
_NO_PLACE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
)
# SQLite puts its own suffixes behind the name of a database
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}(-journal|-wal|-shm)?")


class InjectedFault(Exception):
    """What the failpoint action `raise` raises."""


def failpoint(name: str) -> None:
    """Fail here if the environment says so: the fault tests' hook, without effect when the variable is unset.

    `PHALANX_FAILPOINT` is `NAME:ACTION`; NAME is this name, or the part of it before its first slash.
    Actions: `kill` (SIGKILL to this process), `raise` (InjectedFault), `enospc` (the error of a full disk).
    """
    wanted = os.environ.get(FAILPOINT_VARIABLE)
    if not wanted:
        return
    target, _, action = wanted.rpartition(":")
    if target not in (name, name.partition("/")[0]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(name)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise InputError(f"{FAILPOINT_VARIABLE}={wanted!r}: the action must be kill, raise or enospc, got {action!r}")


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the file system that holds `path`, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a DiskError naming path, `needed` and free bytes, and a path that
    cannot be written, such as one under a file, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise InputError(f"cannot write {path}: {os.strerror(error.errno)}; choose another place") from error
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(
            f"cannot write {path}: {os.strerror(error.errno)} ({needed} bytes needed, {free_bytes(path)} "
            "free); free space or allow writing there, then start again: what was there before is intact"
        ) from error


def temporary_in(folder: Path) -> Path:
    """A fresh name in `folder` that `stray_temporaries` recognises if its owner is killed."""
    return folder / f".tmp-{secrets.token_hex(8)}"


def stray_temporaries(folder: Path) -> list[Path]:
    """The temporary files and folders directly in `folder`: a killed writer's, or a living one's."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name))


def remove_stray_temporaries(folder: Path) -> list[Path]:
    """Remove and return what killed writers left directly in `folder`. Hold the run's lock."""
    strays = stray_temporaries(folder)
    for path in strays:
        remove(path)
    return strays


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names made, replaced, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes, label: str) -> None:
    """Create `path` (it must not exist) and flush it to the disk. `label` names it in failpoints."""
    half = len(data) // 2
    with path.open("xb") as file:
        failpoint(f"write.open/{label}")
        file.write(data[:half])
        file.flush()
        failpoint(f"write.half/{label}")
        file.write(data[half:])
        file.flush()
        failpoint(f"write.fsync/{label}")
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably and at once: a reader sees the old file or the new one.

    Raises DiskError when the disk is full or writing is not allowed; the old file is then as it was.
    """
    temporary = temporary_in(path.parent)
    with disk_errors(path, len(data)):
        try:
            write_new(temporary, data, path.name)
            failpoint(f"write.rename/{path.name}")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        failpoint(f"write.after_rename/{path.name}")
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def render_json(value: JSON) -> bytes:
    """Indented, sorted, strict JSON, for people. Raises ValueError for a number that is not finite."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: JSON) -> None:
    """`write_bytes` of `render_json(value)`."""
    write_bytes(path, render_json(value))


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
