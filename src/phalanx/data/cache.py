"""Decoded images on disk: `<cache>/<key>/` with two .npy files for each split, and manifest.json.

A folder appears whole (written aside, flushed, renamed) or not at all. Every opening compares every byte with
its recorded SHA-256. One process builds, under a file lock that the system releases when it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray

from phalanx.data.config import DataConfig
from phalanx.data.convert import Converted, Progress, convert
from phalanx.data.source import Source
from phalanx.errors import CorruptError, DiskError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Cached:
    """An opened and verified cache folder."""

    pixels: dict[str, NDArray[np.uint8]]
    """By split: (N, C, H, W), a read-only memory map."""
    labels: dict[str, NDArray[np.int64]]
    """By split: (N,)."""
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def cache_root(config: DataConfig) -> Path:
    """The folder that holds the caches of all data sets."""
    chosen = config.cache or os.environ.get("PHALANX_CACHE") or "~/.cache/phalanx"
    return Path(chosen).expanduser().absolute()


def cache_key(source: Source, config: DataConfig) -> str:
    """The name of a cache folder: it changes with the source and with how its images are decoded."""
    parts = {"schema": SCHEMA, "source": source.digest, "size": config.size, "color": config.color}
    return _sha256_json(parts)[:32]


def load_cached(source: Source, config: DataConfig, progress: Progress | None = None) -> Cached:
    """Open the cache of `source`, building it where it is missing and rebuilding it where it is damaged.

    Raises DataProblems for images that cannot be used, DiskError if the cache cannot be written.
    """
    folder = cache_root(config) / cache_key(source, config)
    if folder.exists():
        try:
            return open_cache(folder)
        except CorruptError:
            pass  # looked at again under the lock: another process may be mending it
    try:
        with _locked(folder.with_suffix(".lock")):
            return _build_or_open(folder, source, config, progress)
    except OSError as error:
        raise DiskError(
            f"data cache {folder}: {error.strerror or error}; free some space or name another folder with"
            " cache (or $PHALANX_CACHE)"
        ) from error


def open_cache(folder: Path) -> Cached:
    """Verify and map a cache folder.

    Raises CorruptError naming the file that is missing, cut short or changed.
    """
    manifest = _read_manifest(folder / MANIFEST)
    try:
        for name, expected in manifest["files"].items():
            _verify(folder / name, expected)
        splits = manifest["splits"]
        return Cached(
            {name: np.load(folder / f"{name}.pixels.npy", mmap_mode="r", allow_pickle=False) for name in splits},
            {name: np.load(folder / f"{name}.labels.npy", allow_pickle=False) for name in splits},
            tuple(manifest["class_names"]),
            tuple(manifest["notes"]),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise _damaged(folder / MANIFEST, f"does not describe this folder ({error})") from error


def _build_or_open(folder: Path, source: Source, config: DataConfig, progress: Progress | None) -> Cached:
    damage = None
    if folder.exists():
        try:
            return open_cache(folder)
        except CorruptError as error:
            damage = f"the data cache was damaged ({error.args[0].split(';')[0]}) and was rebuilt from the source"
            shutil.rmtree(folder)
    _build(folder, source, config, progress)
    cached = open_cache(folder)
    return (
        cached if damage is None else Cached(cached.pixels, cached.labels, cached.class_names, (*cached.notes, damage))
    )


def _build(folder: Path, source: Source, config: DataConfig, progress: Progress | None) -> None:
    aside = folder.with_suffix(".building")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that died: this one holds the lock
    aside.mkdir()
    try:
        with _PixelFiles(aside, source.counts) as files:
            converted = convert(source, config, files.write, progress)
        for name, labels in converted.labels.items():
            np.save(aside / f"{name}.labels.npy", labels, allow_pickle=False)
        _write_manifest(aside, folder.name, source, config, converted)
        for path in (*aside.iterdir(), aside):
            _flush(path)
        aside.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _PixelFiles:
    """Writes the images of each split one after the other into a .npy file.

    Plain writes, not a memory map: a full disk is then an error and not a fatal signal.
    """

    def __init__(self, folder: Path, counts: Mapping[str, int]) -> None:
        self.folder = folder
        self.counts = counts
        self.files: dict[str, BinaryIO] = {}
        self.stack = ExitStack()

    def __enter__(self) -> _PixelFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def write(self, split: str, pixels: NDArray[np.uint8]) -> None:
        if split not in self.files:
            self._check_space(pixels.nbytes)
            self.files[split] = self._start(split, pixels.shape)
        self.files[split].write(pixels.tobytes())

    def _start(self, split: str, shape: tuple[int, ...]) -> BinaryIO:
        file = self.stack.enter_context((self.folder / f"{split}.pixels.npy").open("wb"))
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.counts[split], *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def _check_space(self, image_bytes: int) -> None:
        if self.files:
            return
        needed, free = image_bytes * sum(self.counts.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskError(
                f"data cache {self.folder.parent}: {needed} bytes are needed, {free} are free;"
                " free some space or name another folder with cache (or $PHALANX_CACHE)"
            )


def _write_manifest(folder: Path, key: str, source: Source, config: DataConfig, converted: Converted) -> None:
    content = {
        "schema": SCHEMA,
        "key": key,
        "source": {"title": source.title, "sha256": source.digest},
        "size": config.size,
        "color": config.color,
        "pillow": PIL.__version__,
        "splits": {name: len(labels) for name, labels in converted.labels.items()},
        "class_names": converted.class_names,
        "notes": converted.notes,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
        },
    }
    text = json.dumps({**content, "sha256": _sha256_json(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if (found := _sha256_json(manifest)) != recorded:
        raise _damaged(path, f"has sha256 {found}, expected {recorded}")
    if schema != SCHEMA:
        raise _damaged(path, f"has schema {schema}, expected {SCHEMA}")
    return dict(manifest)


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        size, found = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    if size != expected["bytes"]:
        raise _damaged(path, f"has {size} bytes, expected {expected['bytes']}")
    if found != expected["sha256"]:
        raise _damaged(path, f"has sha256 {found}, expected {expected['sha256']}")


def _damaged(path: Path, how: str) -> CorruptError:
    return CorruptError(f"data cache file {path} {how}; delete the folder {path.parent} to have it rebuilt")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
