"""Tiny-ImageNet-200 from its zip, or unpacked: the labels of its validation images are those of val_annotations.txt.

That folder is flat upstream; read as a folder of classes it is one class, and accuracy 0.5 %. The test images have no
public labels, so the validation images are the test split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from phalanx.data.archives import Files, opened
from phalanx.data.folder import interleave
from phalanx.data.problems import Problems, shown
from phalanx.data.source import Row, Source
from phalanx.errors import InputError

ZIP, FOLDER = "tiny-imagenet-200.zip", "tiny-imagenet-200"
_IMAGES = (".jpeg", ".jpg", ".png")


class _Image(NamedTuple):
    name: str
    label: int


def scan_tiny_imagenet(root: Path) -> Source:
    """Examine the set in `root`. Raises InputError, DataProblems naming what is at fault, CorruptError."""
    path = next((p for p in (root / FOLDER, root / ZIP, root) if p.is_file() or (p / "wnids.txt").is_file()), None)
    if path is None:
        raise InputError(f"tiny-imagenet: {shown(root)} holds no {ZIP}; phalanx data get tiny-imagenet downloads it")
    problems = Problems("tiny-imagenet")
    with opened(path) as files:
        top = next((name.removesuffix("wnids.txt") for name in files.names if name.endswith("wnids.txt")), None)
        if top is None:
            raise InputError(f"{shown(path)} has no wnids.txt, the list of classes; fetch it again from upstream")
        classes = _text(files, f"{top}wnids.txt").split()
        splits = {"train": _train(files, top, classes, problems), "test": _validation(files, top, classes, problems)}
        titles = _titles(files, top, classes)
    problems.raise_if_any()
    return Source(
        title="tiny-imagenet",
        class_names=titles,
        counts={name: len(images) for name, images in splits.items()},
        identity={"kind": "tiny-imagenet", "files": _identity(path, splits), "classes": classes},
        rows=partial(_rows, path, splits),
        notes=("the test images are Tiny-ImageNet's validation images: its test labels are not public",),
    )


def _text(files: Files, name: str) -> str:
    return files.read(name).decode("utf-8", "replace")


def _train(files: Files, top: str, classes: list[str], problems: Problems) -> list[_Image]:
    by_class: dict[str, list[Path]] = {name: [] for name in classes}
    for name in files.names:
        part = name.removeprefix(f"{top}train/")
        if part != name and part.lower().endswith(_IMAGES):
            by_class.setdefault(part.partition("/")[0], []).append(Path(name))
    for unknown in sorted(set(by_class) - set(classes)):
        problems.add(f"train/{shown(unknown)} is no class of wnids.txt; fetch the set again")
    for name in classes:
        if not by_class[name]:
            problems.add(f"class {shown(name)} of wnids.txt has no training image; fetch the set again")
    return [_Image(path.as_posix(), label) for path, label in interleave([by_class[name] for name in classes])]


def _validation(files: Files, top: str, classes: list[str], problems: Problems) -> list[_Image]:
    """In the order of val_annotations.txt, each line an image, its class and a box."""
    listing = f"{top}val/val_annotations.txt"
    there = {name for name in files.names if name.startswith(f"{top}val/") and name.lower().endswith(_IMAGES)}
    if listing not in files.names:
        problems.add("val/val_annotations.txt is missing, without which its images have no labels; fetch the set again")
        return []
    label_of = {name: label for label, name in enumerate(classes)}
    # some tools sort the images into class folders and leave the list as it was
    by_name = {name.rpartition("/")[2]: name for name in there}
    found: list[_Image] = []
    for number, line in enumerate(_text(files, listing).splitlines(), start=1):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if image not in by_name or wnid not in label_of:
            problems.add(f"val_annotations.txt:{number}: {shown(line[:60])} names no image or no class; fetch it again")
            continue
        found.append(_Image(by_name[image], label_of[wnid]))
    if twice := [name for name, count in Counter(image.name for image in found).items() if count > 1]:
        problems.add(f"val_annotations.txt names {shown(twice[0])} twice; fetch the set again")
    if left := sorted(there - {image.name for image in found}):
        problems.add(f"{len(left)} validation images have no label, such as {shown(left[0])}; fetch the set again")
    return found


def _titles(files: Files, top: str, classes: list[str]) -> tuple[str, ...]:
    """What words.txt calls the classes, the first word of each, where these tell them apart."""
    if f"{top}words.txt" not in files.names:
        return tuple(classes)
    words: dict[str, str] = {}
    for line in _text(files, f"{top}words.txt").splitlines():
        wnid, _, title = line.partition("\t")
        words[wnid] = title.partition(",")[0].strip()
    titles = [words.get(name) or name for name in classes]
    count = Counter(titles)
    return tuple(
        title if count[title] == 1 else f"{title} ({name})" for title, name in zip(titles, classes, strict=True)
    )


def _identity(path: Path, splits: Mapping[str, list[_Image]]) -> object:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    stamps: dict[str, list[list[object]]] = {}
    for split, images in splits.items():
        states = [(image, (path / image.name).stat()) for image in images]
        stamps[split] = [[image.name, image.label, state.st_size, state.st_mtime_ns] for image, state in states]
    return {"path": str(path), "stamps": stamps}


def _rows(path: Path, splits: Mapping[str, list[_Image]], split: str, problems: Problems) -> Iterator[Row]:
    del problems
    with opened(path) as files:
        for image in splits[split]:
            yield Row(image.name, files.read(image.name), image.label)
