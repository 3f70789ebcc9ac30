"""Public data sets by name: where their files are looked for, and what each file's checksum is.

Nothing is downloaded by using one: `phalanx data get NAME` does that (`phalanx.data.fetch`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phalanx.data.binary import scan_cifar, scan_mnist, scan_svhn
from phalanx.data.config import NAMED, DataConfig
from phalanx.data.folder import scan_folder
from phalanx.data.problems import shown
from phalanx.data.source import Source
from phalanx.data.tiny_imagenet import scan_tiny_imagenet
from phalanx.errors import CorruptError, InputError


@dataclass(frozen=True)
class Upstream:
    """One file as its authors publish it."""

    name: str
    url: str
    md5: str


@dataclass(frozen=True)
class NamedSet:
    """One public data set."""

    files: tuple[Upstream, ...]
    """Empty where it cannot be fetched without an account."""
    scan: Callable[[Path], Source]
    """Examines the set's own folder."""
    page: str
    """Where it is described, and had."""


_KRIZ = "https://www.cs.toronto.edu/~kriz"
_HOUSES = "http://ufldl.stanford.edu/housenumbers"
_DIGITS = "https://ossci-datasets.s3.amazonaws.com/mnist"

# checksums: torchvision's for MNIST and SVHN, the authors' own for the binary CIFARs
SETS: Mapping[str, NamedSet] = {
    "mnist": NamedSet(
        tuple(
            Upstream(f"{name}.gz", f"{_DIGITS}/{name}.gz", md5)
            for name, md5 in (
                ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
            )
        ),
        scan_mnist,
        "http://yann.lecun.com/exdb/mnist",
    ),
    "cifar10": NamedSet(
        (Upstream("cifar-10-binary.tar.gz", f"{_KRIZ}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
        lambda root: scan_cifar(root, 10),
        f"{_KRIZ}/cifar.html",
    ),
    "cifar100": NamedSet(
        (Upstream("cifar-100-binary.tar.gz", f"{_KRIZ}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
        lambda root: scan_cifar(root, 100),
        f"{_KRIZ}/cifar.html",
    ),
    "svhn": NamedSet(
        (
            Upstream("train_32x32.mat", f"{_HOUSES}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            Upstream("test_32x32.mat", f"{_HOUSES}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
        scan_svhn,
        _HOUSES,
    ),
    "tiny-imagenet": NamedSet(
        (
            Upstream(
                "tiny-imagenet-200.zip",
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        scan_tiny_imagenet,
        "http://cs231n.stanford.edu",
    ),
    # its validation images are the test split: those of the test set have no public labels
    "imagenet": NamedSet(
        (),
        lambda root: scan_folder(root, {"train": root / "train", "test": root / "val"}, "imagenet"),
        "https://image-net.org",
    ),
}
assert tuple(SETS) == NAMED


def set_folder(name: str) -> Path:
    """The folder of a set where nothing else is said: below $PHALANX_DATA, or ~/.local/share/phalanx."""
    root = os.environ.get("PHALANX_DATA") or "~/.local/share/phalanx"
    return Path(root).expanduser().absolute() / name


def scan_named(config: DataConfig) -> Source:
    """Examine the files of a named set without decoding an image.

    Raises InputError saying where it was looked for and how to get it, CorruptError for a file that is not upstream's.
    """
    name = config.kind
    root = config.path.absolute() if ":" in config.name else set_folder(name)
    if not root.is_dir():
        raise InputError(f"{name} is not at {shown(root)}; {how_to_get(name)}")
    check_files(root, SETS[name].files)
    return SETS[name].scan(root)


def how_to_get(name: str) -> str:
    """What a user does who lacks a set."""
    elsewhere = f"name the folder that holds it with data.name={name}:PATH, or the one above it with $PHALANX_DATA"
    if SETS[name].files:
        return f"phalanx data get {name} downloads it, or {elsewhere}"
    return f"get train/ and val/ with a folder for each class from {SETS[name].page}, then {elsewhere}"


def check_files(root: Path, files: Sequence[Upstream]) -> None:
    """Raises CorruptError for an upstream file in `root` that is not byte for byte what its authors published."""
    for file in files:
        path = root / file.name
        if path.is_file() and (found := md5_of(path)) != file.md5:
            raise CorruptError(
                f"{shown(path)} has md5 {found}, upstream's has {file.md5}: it is cut short, changed, or an error "
                "page; remove it and fetch it again"
            )


def md5_of(path: Path) -> str:
    """What upstream's checksums are; files are identified by SHA-256 everywhere else."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
