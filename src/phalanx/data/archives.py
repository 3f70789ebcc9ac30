"""Files of a data set where they lie: in a folder, a tar or a zip. Nothing is ever extracted to disk.

An archive is refused as a whole if any of its names is absolute, climbs out with "..", or is a link: what holds one
such name was not made upstream.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from phalanx.data.problems import shown
from phalanx.errors import CorruptError

MAX_FILE = 1 << 28
"""Largest single file that is read, in bytes: a small archive can claim to hold far more than memory does."""


class Files(NamedTuple):
    """What a folder or an archive holds."""

    names: tuple[str, ...]
    """Paths of files from its top, with forward slashes, sorted."""
    read: Callable[[str], bytes]
    """One file's bytes. Raises CorruptError for what is damaged or too large."""


@contextmanager
def opened(path: Path) -> Iterator[Files]:
    """The files of a folder, a .zip, or a .tar.gz. Raises CorruptError naming archive and member, OSError."""
    if path.is_dir():
        yield _folder(path)
    elif zipfile.is_zipfile(path):
        with _told(path), zipfile.ZipFile(path) as archive:
            yield _zip(path, archive)
    else:
        with _told(path), tarfile.open(path) as tar:
            yield _tar(path, tar)


def check_name(archive: Path, name: str) -> None:
    """Raises CorruptError for a name that leads out of the archive."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or (pure.parts and ":" in pure.parts[0]):
        raise CorruptError(f"{shown(archive)}: {shown(name)} leads out of the archive; fetch it again from upstream")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    # RuntimeError is an encrypted zip's
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CorruptError(f"{shown(path)} is no whole archive ({error}); fetch it again from upstream") from error


def _folder(root: Path) -> Files:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    inside = root.resolve()

    def read(name: str) -> bytes:
        if not paths[name].resolve().is_relative_to(inside):
            raise CorruptError(f"{shown(paths[name])} is a link that leaves the folder; copy the file in")
        _check_size(root, name, paths[name].stat().st_size)
        return paths[name].read_bytes()

    return Files(tuple(sorted(paths)), read)


def _zip(path: Path, archive: zipfile.ZipFile) -> Files:
    members = {}
    for info in archive.infolist():
        check_name(path, info.filename)
        if (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise CorruptError(f"{shown(path)}: {shown(info.filename)} is a link; fetch it again from upstream")
        if not info.is_dir():
            members[info.filename] = info

    def read(name: str) -> bytes:
        _check_size(path, name, members[name].file_size)
        with _told(path), archive.open(members[name]) as file:
            return file.read()

    return Files(tuple(sorted(members)), read)


def _tar(path: Path, tar: tarfile.TarFile) -> Files:
    members = {}
    for member in tar:
        check_name(path, member.name)
        if not (member.isreg() or member.isdir()):
            raise CorruptError(
                f"{shown(path)}: {shown(member.name)} is a link or a device; fetch it again from upstream"
            )
        if member.isreg():
            members[PurePosixPath(member.name).as_posix()] = member

    def read(name: str) -> bytes:
        _check_size(path, name, members[name].size)
        with _told(path):
            file = tar.extractfile(members[name])
            return b"" if file is None else file.read()

    return Files(tuple(sorted(members)), read)


def _check_size(where: Path, name: str, size: int) -> None:
    if size > MAX_FILE:
        raise CorruptError(f"{shown(where)}: {shown(name)} has {size} bytes, more than {MAX_FILE}; fetch it again")


def limited(file: BinaryIO, where: Path) -> bytes:
    """All that a decompressing `file` gives. Raises CorruptError beyond the largest size."""
    data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise CorruptError(f"{shown(where)} unpacks to more than {MAX_FILE} bytes; fetch it again from upstream")
    return data
