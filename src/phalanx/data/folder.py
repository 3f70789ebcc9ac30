"""A folder of images: PATH/CLASS/*.png, or PATH/{train,val,test}/CLASS/*.png.

Names are sorted. Within a split the classes are interleaved in proportion, so that the first n images are a
fair sample of all of them. Hidden entries are skipped; files that are neither PNG nor JPEG are counted in a
note.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from phalanx.data.problems import Problems, shown
from phalanx.data.source import Row, Source
from phalanx.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


class _File(NamedTuple):
    path: Path
    label: int


class _Classes(NamedTuple):
    """The image files of one split, by class name in sorted order."""

    files: dict[str, list[Path]]
    ignored: list[Path]


def scan_folder(root: Path, layout: Mapping[str, Path] | None = None, title: str | None = None) -> Source:
    """Examine the folder `root` without decoding an image; `layout` says where which split lies, and `title` what it is
    called, where that is not for the folder to say.

    Raises InputError if it is no folder, DataProblems naming each file or folder at fault.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"folder:{shown(root)} {what}; name a folder with one sub-folder of images per class,"
            " as in --set data.name=folder:PATH"
        )
    root = root.resolve()
    problems = Problems(f"folder:{shown(root)}")
    where = _layout(root, problems) if layout is None else {name: path.resolve() for name, path in layout.items()}
    splits = {name: _scan_classes(folder, root, problems) for name, folder in where.items()}
    problems.raise_if_any()
    class_names = _class_names(splits, problems)
    problems.raise_if_any()
    files = {name: interleave(list(classes.files.values())) for name, classes in splits.items()}
    return Source(
        title=title or f"folder:{shown(root.name)}",
        class_names=class_names,
        counts={name: len(items) for name, items in files.items()},
        identity={
            "kind": "folder",
            "path": str(root),
            "files": {name: _stamps(files[name], root) for name in files},
        },
        rows=partial(_rows, files, root),
        notes=_notes([path for classes in splits.values() for path in classes.ignored], root),
    )


def interleave(classes: list[list[Path]]) -> list[_File]:
    """The files of all classes in one order, of which every prefix holds each class in proportion."""
    keyed = [
        ((2 * rank + 1) / (2 * len(paths)), label, path)
        for label, paths in enumerate(classes)
        for rank, path in enumerate(paths)
    ]
    return [_File(path, label) for _, label, path in sorted(keyed, key=lambda item: item[:2])]


def _layout(root: Path, problems: Problems) -> dict[str, Path]:
    """The folder of each split; a root of classes is one split, "train"."""
    names = [path.name for path in _folders(root, root, problems)]
    split_names = [name for name in names if name.lower() in SPLIT_FOLDERS]
    if "train" not in map(str.lower, names):
        if names and len(split_names) == len(names):
            problems.add(f"there is {names[0]}/ but no train/; add train/ or put the class folders side by side")
        return {"train": root}
    for name in sorted(set(names) - set(split_names)):
        problems.add(f"{shown(name)}/ lies beside train/ and is no split; move it into train/ or away")
    layout: dict[str, Path] = {}
    for name in split_names:
        split = SPLIT_FOLDERS[name.lower()]
        if split in layout:
            problems.add(f"{layout[split].name}/ and {name}/ are the same split; keep one")
        layout[split] = root / name
    return {name: layout[name] for name in ("train", "val", "test") if name in layout}


def _scan_classes(folder: Path, root: Path, problems: Problems) -> _Classes:
    found = _Classes({}, [])
    for class_folder in _folders(folder, root, problems):
        images: list[Path] = []
        others: list[Path] = []
        for path in _entries(class_folder, root, problems):
            is_image = path.suffix.lower() in EXTENSIONS and path.is_file()
            (images if is_image else others).append(path)
        if not images:
            problems.add(f"{_inside(class_folder, root)}/ holds no PNG or JPEG image; add some or remove it")
        found.files[class_folder.name] = images
        found.ignored.extend(others)
    if len(found.files) < 2:
        only = f" ({shown(next(iter(found.files)))})" if found.files else ""
        problems.add(
            f"{_inside(folder, root)}/ has {len(found.files)} class folder{'' if found.files else 's'}{only};"
            " a classifier needs 2 or more, one folder of images for each class"
        )
    return found


def _class_names(splits: Mapping[str, _Classes], problems: Problems) -> tuple[str, ...]:
    names = tuple(splits["train"].files)
    for split, classes in splits.items():
        for missing in sorted(set(names) - set(classes.files)):
            problems.add(f"class {shown(missing)} is in train/ but not in the {split} folder; add it there")
        for extra in sorted(set(classes.files) - set(names)):
            problems.add(f"class {shown(extra)} is in the {split} folder but not in train/; add it there or remove it")
    return names


def _folders(parent: Path, root: Path, problems: Problems) -> list[Path]:
    return [path for path in _entries(parent, root, problems) if path.is_dir() and path.name != "__MACOSX"]


def _entries(parent: Path, root: Path, problems: Problems) -> list[Path]:
    """What a folder holds, sorted, without hidden names and without links that lead out of `root`."""
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError as error:
        problems.add(f"{_inside(parent, root)}/ cannot be listed ({error.strerror}); check its permissions")
        return []
    kept = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = parent / entry.name
        if entry.is_symlink() and not path.resolve().is_relative_to(root):
            problems.add(f"{_inside(path, root)} is a link that leaves the folder; copy the file in or remove the link")
        elif entry.is_dir() and not _is_utf8(entry.name):
            problems.add(f"{_inside(path, root)} has a name that is not UTF-8; rename it")
        else:
            kept.append(path)
    return kept


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inside(path: Path, root: Path) -> str:
    return shown(path.relative_to(root)) if path != root else shown(root.name)


def _stamps(files: list[_File], root: Path) -> list[list[str | int]]:
    stamps: list[list[str | int]] = []
    for path, label in files:
        status = path.stat()
        stamps.append([str(path.relative_to(root)), label, status.st_size, status.st_mtime_ns])
    return stamps


def _notes(ignored: list[Path], root: Path) -> tuple[str, ...]:
    if not ignored:
        return ()
    return (f"ignored {len(ignored)} entries that are not PNG or JPEG files, such as {_inside(ignored[0], root)}",)


def _rows(files: Mapping[str, list[_File]], root: Path, split: str, problems: Problems) -> Iterator[Row]:
    for path, label in files[split]:
        where = _inside(path, root)
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.add(f"{where}: cannot be read ({error.strerror}); check its permissions")
            continue
        yield Row(where, data, label)
