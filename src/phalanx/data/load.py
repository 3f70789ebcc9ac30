"""From a configuration to splits, whatever the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.cache import load_cached
from phalanx.data.config import NAMED, DataConfig
from phalanx.data.convert import Progress
from phalanx.data.digits import CLASS_NAMES, LEVELS, load_digits
from phalanx.data.folder import scan_folder
from phalanx.data.named import scan_named
from phalanx.data.parquet import scan_parquet
from phalanx.data.partition import SPLITS, partition
from phalanx.data.problems import shown
from phalanx.data.source import Source
from phalanx.data.splits import ImageSet, Splits, check_labels, duplicates
from phalanx.errors import InputError, about


@dataclass(frozen=True)
class _Raw:
    """All images of a source, in the splits it came with."""

    title: str
    splits: Mapping[str, ImageSet]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_data(config: DataConfig | str = "digits", *, progress: Progress | None = None, **overrides: Any) -> Splits:
    """The training, validation and test images that `config` (or a source's name) asks for.

    `overrides` are fields of `DataConfig`: `load_data("folder:flowers", size=32)`. `progress` hears of each image that
    is decoded for the first time.
    Raises InputError for a mistake in the configuration or in the data, CorruptError if the pinned digits are
    damaged, DiskError if the cache cannot be written.
    """
    config = resolve(config, overrides)
    with about("name"):
        raw = _read(config, progress)
        labels = {name: images.labels for name, images in raw.splits.items()}
        for name, values in labels.items():
            check_labels(f"{raw.title}: {name}", values, len(raw.class_names))
    parts = partition(raw.title, labels, raw.class_names, config)
    train, val, test = (raw.splits[parts[name].source].select(parts[name].rows) for name in SPLITS)
    mean, std = _normalisation(config, train)
    notes = (
        *raw.notes,
        *_shared_note(test, train),
        *_absent_notes({"val": val, "test": test}, raw.class_names),
    )
    return Splits(train, val, test, raw.title, raw.class_names, mean, std, notes)


def _normalisation(config: DataConfig, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel: as given, or as measured. Raises InputError unless each has a value per channel."""
    channels = train.shape[0]
    for field, given in (("mean", config.mean), ("std", config.std)):
        if given is not None and len(given) != channels:
            raise InputError(
                f"data.{field} has {len(given)} values, but the images of {config.name} have {channels} "
                f"{'channel' if channels == 1 else 'channels'}; give one value for each, or leave it out",
                key=field,
            )
    mean, std = train.mean_std()
    return config.mean or mean, config.std or std


def resolve(config: DataConfig | str, overrides: Mapping[str, Any]) -> DataConfig:
    """The configuration with `overrides` applied; InputError for an unknown field or a bad value."""
    names = [field.name for field in fields(DataConfig)]
    for key in overrides:
        if key not in names:
            raise InputError(f"data: there is no field {key!r}; there are: {', '.join(names)}")
    try:
        return replace(config, **overrides) if isinstance(config, DataConfig) else DataConfig(name=config, **overrides)
    except ValueError as error:
        raise InputError(f"data: {error}") from None
    except TypeError:
        raise InputError("data: the source is named twice, by the first argument and by name=; give it once") from None


def scan(config: DataConfig) -> Source:
    """Examine the files of `config` without decoding an image."""
    try:
        if config.kind in NAMED:
            return scan_named(config)
        return scan_folder(config.path) if config.kind == "folder" else scan_parquet(config.path)
    except OSError as error:
        raise InputError(
            f"{shown(config.name)}: cannot be read ({error.strerror}: {shown(str(error.filename))});"
            " check the path and its permissions"
        ) from None


def _read(config: DataConfig, progress: Progress | None) -> _Raw:
    if config.kind == "digits":
        pixels, labels = load_digits()
        return _Raw("digits", {"train": ImageSet(pixels, labels, _ids(0, len(labels)), LEVELS)}, CLASS_NAMES)
    source = scan(config)
    cached = load_cached(source, config, progress)
    splits, start = {}, 0
    for name, pixels in cached.pixels.items():
        splits[name] = ImageSet(pixels, cached.labels[name], _ids(start, len(pixels)), 255)
        start += len(pixels)
    return _Raw(source.title, splits, cached.class_names, cached.notes)


def _ids(start: int, count: int) -> NDArray[np.int64]:
    return np.arange(start, start + count, dtype=np.int64)


def _shared_note(test: ImageSet, train: ImageSet) -> tuple[str, ...]:
    shared = len(duplicates(test, train))
    return (f"{shared} of {len(test)} test images are also training images, pixel for pixel",) if shared else ()


def _absent_notes(splits: Mapping[str, ImageSet], class_names: tuple[str, ...]) -> tuple[str, ...]:
    absent = {name: len(class_names) - len(np.unique(images.labels)) for name, images in splits.items()}
    return tuple(
        f"{count} of {len(class_names)} classes have no {name} image" for name, count in absent.items() if count
    )
