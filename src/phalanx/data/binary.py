"""MNIST, CIFAR-10, CIFAR-100 and SVHN from the files that their authors publish, without unpickling anything."""

# N images, C channels, H height, W width

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.data.archives import MAX_FILE, limited, opened
from phalanx.data.problems import Problems, shown
from phalanx.data.source import Row, Source
from phalanx.errors import CorruptError, InputError

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


class _Arrays(NamedTuple):
    """One file's images, held as uint8."""

    where: str
    pixels: NDArray[np.uint8]
    """(N, C, H, W)."""
    labels: NDArray[np.int64]
    """(N,)."""


def scan_mnist(root: Path) -> Source:
    """The four idx files, plain or .gz, in `root` or in MNIST/raw below it (LeCun et al. 1998)."""
    folder = root / "MNIST" / "raw" if (root / "MNIST" / "raw").is_dir() else root
    paths = {
        split: [_either(folder, f"{stem}-{what}", "mnist") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        for split, stem in (("train", "train"), ("test", "t10k"))
    }
    splits = {split: [_mnist(images, labels)] for split, (images, labels) in paths.items()}
    return _source("mnist", _DIGITS, splits, [path for pair in paths.values() for path in pair])


def scan_cifar(root: Path, classes: int) -> Source:
    """The binary version, as .tar.gz or unpacked (Krizhevsky 2009); of 100 classes the fine labels."""
    name = f"cifar{classes}"
    folder = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    path = next((p for p in (root / folder, root / f"cifar-{classes}-binary.tar.gz", root) if _has(p, ".bin")), None)
    if path is None:
        pickled = any(root.glob(f"cifar-{classes}*python*")) or (root / f"cifar-{classes}-batches-py").is_dir()
        why = "holds the Python version, which is pickled and not opened" if pickled else "holds no binary version"
        raise InputError(
            f"{name}: {shown(root)} {why}; phalanx data get {name} downloads cifar-{classes}-binary.tar.gz"
        )
    train = [f"data_batch_{number}.bin" for number in range(1, 6)] if classes == 10 else ["train.bin"]
    wanted = {"train": train, "test": ["test_batch.bin" if classes == 10 else "test.bin"]}
    with opened(path) as files:
        by_name = {file.rpartition("/")[2]: file for file in files.names}
        splits = {split: [_cifar(path, by_name, name, classes, files.read) for name in names]
                  for split, names in wanted.items()}  # fmt: skip
        names = _CIFAR10 if classes == 10 else _fine_names(path, by_name, files.read)
        used = [path] if path.is_file() else [path / by_name[name] for group in wanted.values() for name in group]
    return _source(name, names, splits, used)


def scan_svhn(root: Path) -> Source:
    """train_32x32.mat and test_32x32.mat, whose class 10 is the digit 0 (Netzer et al. 2011)."""
    paths = {split: _either(root, f"{split}_32x32.mat", "svhn") for split in ("train", "test")}
    return _source("svhn", _DIGITS, {split: [_svhn(path)] for split, path in paths.items()}, list(paths.values()))


def _source(name: str, class_names: tuple[str, ...], splits: Mapping[str, list[_Arrays]], files: list[Path]) -> Source:
    digests = {path.name: _sha256(path) for path in files}
    return Source(
        title=name,
        class_names=class_names,
        counts={split: sum(len(part.labels) for part in parts) for split, parts in splits.items()},
        identity={"kind": name, "files": digests},
        rows=partial(_rows, splits, len(class_names)),
    )


def _rows(splits: Mapping[str, list[_Arrays]], classes: int, split: str, problems: Problems) -> Iterator[Row]:
    for part in splits[split]:
        for index, (pixels, label) in enumerate(zip(part.pixels, part.labels.tolist(), strict=True)):
            where = f"{part.where} image {index} (from 0)"
            if 0 <= label < classes:
                yield Row(where, pixels, label)
            else:
                problems.add(f"{where}: label must be in 0..{classes - 1}, got {label}; fetch the data again")


def _either(folder: Path, name: str, set_name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{set_name}: {shown(folder)} has no {name}; phalanx data get {set_name} downloads it")


def _has(path: Path, suffix: str) -> bool:
    return path.is_file() or (path.is_dir() and any(path.glob(f"*{suffix}")))


def _mnist(images: Path, labels: Path) -> _Arrays:
    pixels, values = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(values):
        raise CorruptError(
            f"{shown(images)} has {len(pixels)} images, {shown(labels)} {len(values)} labels; fetch both again"
        )
    return _Arrays(images.name, pixels[:, None], values.astype(np.int64))


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: 0, 0, 8, dimensions, each size as 4 bytes, then the values."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = limited(file, path)  # type: ignore[arg-type]
        else:
            with path.open("rb") as plain:
                data = limited(plain, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptError(f"{shown(path)} is no whole gzip file ({error}); fetch it again from upstream") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise CorruptError(f"{shown(path)} is no idx file of bytes in {dimensions} dimensions; fetch it again")
    shape = [int(size) for size in np.frombuffer(data, ">u4", dimensions, 4)]
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise CorruptError(f"{shown(path)} has {len(data)} bytes, its header says {expected}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _cifar(path: Path, by_name: Mapping[str, str], name: str, classes: int, read: Any) -> _Arrays:
    """Records of one label byte, of 100 classes a coarse one before it, and 3 x 32 x 32 pixels."""
    if name not in by_name:
        raise CorruptError(f"{shown(path)} has no {name}; fetch it again from upstream")
    data = np.frombuffer(read(by_name[name]), np.uint8)
    labels = 1 if classes == 10 else 2
    if not len(data) or len(data) % (labels + 3072):
        raise CorruptError(
            f"{shown(path)}: {name} has {len(data)} bytes, no multiple of {labels + 3072}; fetch it again from upstream"
        )
    records = data.reshape(-1, labels + 3072)
    return _Arrays(name, records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1].astype(np.int64))


def _fine_names(path: Path, by_name: Mapping[str, str], read: Any) -> tuple[str, ...]:
    if "fine_label_names.txt" not in by_name:
        raise CorruptError(f"{shown(path)} has no fine_label_names.txt; fetch it again from upstream")
    names = tuple(read(by_name["fine_label_names.txt"]).decode("utf-8", "replace").split())
    if len(set(names)) != 100:
        raise CorruptError(f"{shown(path)}: fine_label_names.txt names {len(set(names))} classes, expected 100")
    return names


def _svhn(path: Path) -> _Arrays:
    from scipy.io import loadmat, whosmat  # type: ignore[import-untyped]

    try:
        # only numeric arrays are asked for: MATLAB's objects are never built
        described = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
        _check_svhn(path, described)
        found = loadmat(str(path), variable_names=["X", "y"])
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # a reader that is fed damaged or hostile bytes raises whatever it likes
        raise CorruptError(f"{shown(path)} is no readable MATLAB file ({error}); fetch it again") from error
    # upstream: (H, W, C, N), and the digit 0 is class 10
    labels = found["y"].reshape(-1).astype(np.int64) % 10
    return _Arrays(path.name, np.ascontiguousarray(found["X"].transpose(3, 2, 0, 1)), labels)


def _check_svhn(path: Path, described: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    pixels, labels = described.get("X", ((), "")), described.get("y", ((), ""))
    right = (
        (pixels[1], labels[1]) == ("uint8", "uint8")
        and pixels[0][:3] == (32, 32, 3)
        and len(pixels[0]) == 4
        and int(np.prod(labels[0])) == pixels[0][3]
        and int(np.prod(pixels[0])) <= 16 * MAX_FILE
    )
    if not right:
        raise CorruptError(
            f"{shown(path)} must hold uint8 arrays X (32, 32, 3, N) and y (N, 1), got {pixels[1] or 'no X'} "
            f"{pixels[0]} and {labels[1] or 'no y'} {labels[0]}; fetch it again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
