"""Parquet files in the Hugging Face layout.

PATH is one file, or a folder of train.parquet, test.parquet and validation.parquet, each possibly in shards
(train-00000-of-00002.parquet). Columns: `img` or `image`, a struct with the encoded file in `bytes`; `label`
or `fine_label`, whole numbers. Class names come from the schema's `huggingface` metadata where it has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from phalanx.data.problems import Problems, shown
from phalanx.data.source import Row, Source
from phalanx.errors import InputError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
SPLIT_FILES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
MAX_CLASSES = 100_000
"""Largest number of classes where no names are given: one stray label must not make a vast model."""

_BATCH_ROWS = 256


class _File(NamedTuple):
    """One examined Parquet file."""

    path: Path
    image: str
    label: str
    class_names: tuple[str, ...] | None
    size: int
    """Rows."""


def scan_parquet(path: Path) -> Source:
    """Examine Parquet files without decoding an image.

    Raises InputError if there are none or pyarrow is missing, DataProblems naming each file and column that
    is at fault.
    """
    _pyarrow()
    path = path.resolve()
    title = f"parquet:{shown(path.stem if path.is_file() else path.name)}"
    problems = Problems(f"parquet:{shown(path)}")
    splits = {
        name: [file for item in paths if (file := _examine(item, problems)) is not None]
        for name, paths in _layout(path).items()
    }
    problems.raise_if_any()
    class_names = _class_names([file for files in splits.values() for file in files], problems)
    problems.raise_if_any()
    return Source(
        title=title,
        class_names=class_names,
        counts={name: sum(file.size for file in files) for name, files in splits.items()},
        identity={
            "kind": "parquet",
            "files": {name: [_sha256(file.path) for file in files] for name, files in splits.items()},
        },
        rows=partial(_rows, splits, class_names),
    )


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("reading Parquet files needs pyarrow; install it with: pip install phalanx[table]") from None
    return pyarrow


def _layout(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        raise InputError(f"parquet:{shown(path)} does not exist; name a Parquet file or a folder of them")
    layout: dict[str, list[Path]] = {}
    for split, stems in SPLIT_FILES.items():
        for stem in stems:
            found = [*path.glob(f"{stem}.parquet"), *sorted(path.glob(f"{stem}-*.parquet"))]
            if found and split in layout:
                raise InputError(
                    f"parquet:{shown(path)} has {layout[split][0].name} and {found[0].name}, the same split; keep one"
                )
            if found:
                layout[split] = found
    if "train" not in layout:
        there = ", ".join(shown(file.name) for file in sorted(path.glob("*.parquet"))[:5])
        raise InputError(
            f"parquet:{shown(path)} has no train.parquet or train-*.parquet"
            f" (there is: {there or 'no Parquet file'}); rename the file, or name the file itself"
        )
    return layout


def _examine(path: Path, problems: Problems) -> _File | None:
    pyarrow = _pyarrow()
    where = shown(path.name)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{where}: not a readable Parquet file ({_first_line(error)}); fetch it again")
        return None
    image = _column(schema, IMAGE_COLUMNS, "image", where, problems)
    label = _column(schema, LABEL_COLUMNS, "label", where, problems)
    if image is None or label is None:
        return None
    kind = schema.field(image).type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        problems.add(f"{where}: column {image} must be a struct with a field 'bytes', got {kind}")
        return None
    if not pyarrow.types.is_integer(schema.field(label).type):
        problems.add(f"{where}: column {label} must hold whole numbers, got {schema.field(label).type}")
        return None
    if count == 0:
        problems.add(f"{where}: holds no rows; remove it")
        return None
    return _File(path, image, label, _names(schema, label, where, problems), count)


def _column(schema: Any, names: Sequence[str], what: str, where: str, problems: Problems) -> str | None:
    found = [name for name in names if name in schema.names]
    if not found:
        problems.add(f"{where}: no {what} column ({' or '.join(names)}); there are: {', '.join(schema.names)}")
        return None
    return found[0]


def _names(schema: Any, label: str, where: str, problems: Problems) -> tuple[str, ...] | None:
    """Class names from the `huggingface` metadata, a JSON text; None where it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if len(names) < 2 or len(set(names)) < len(names):
        problems.add(f"{where}: the class names of column {label} must be 2 or more and differ, got {names[:10]}")
    return tuple(names)


def _class_names(files: Sequence[_File], problems: Problems) -> tuple[str, ...] | None:
    first = files[0]
    for file in files[1:]:
        if file.class_names != first.class_names:
            problems.add(f"{shown(file.path.name)}: its class names differ from those of {shown(first.path.name)}")
    return first.class_names


def _rows(
    splits: Mapping[str, Sequence[_File]], names: tuple[str, ...] | None, split: str, problems: Problems
) -> Iterator[Row]:
    for file in splits[split]:
        for row, (data, label) in enumerate(_read(file, problems)):
            where = f"{shown(file.path.name)} row {row} (from 0)"
            highest = (MAX_CLASSES if names is None else len(names)) - 1
            if label is None:
                problems.add(f"{where}: column {file.label} is null; give it a label or remove the row")
            elif not 0 <= label <= highest:
                problems.add(f"{where}: column {file.label} must be in 0..{highest}, got {label}; mend the label")
            elif data is None:
                problems.add(f"{where}: column {file.image} holds no bytes; store the image itself, not its path")
            else:
                yield Row(where, data, label)


def _read(file: _File, problems: Problems) -> Iterator[tuple[bytes | None, int | None]]:
    """Encoded image and label of each row; only these two columns are read, a few rows at a time."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            columns = [f"{file.image}.bytes", file.label]
            for batch in opened.iter_batches(_BATCH_ROWS, columns=columns):
                images = batch.column(file.image).to_pylist()
                labels = batch.column(file.label).to_pylist()
                for image, label in zip(images, labels, strict=True):
                    yield None if image is None else image["bytes"], label
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{shown(file.path.name)}: damaged ({_first_line(error)}); fetch it again")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
