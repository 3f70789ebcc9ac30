"""Plain facts about a data set, what radii look like on it, and a check that writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.data.config import DataConfig
from phalanx.data.convert import Progress, convert, discard
from phalanx.data.digits import CLASS_NAMES, load_digits
from phalanx.data.epsilon import Separation, separation
from phalanx.data.load import scan
from phalanx.data.partition import partition
from phalanx.data.problems import DataProblems
from phalanx.data.splits import ImageSet, Splits, duplicates
from phalanx.data.strip import strip
from phalanx.errors import CorruptError, DiskError, InputError


def describe(splits: Splits) -> dict[str, Any]:
    """JSON values: name, shape, classes, mean and std, duplicates, notes, fingerprint, a radius for Linf attacks with
    its reason (see `Separation`), and the splits.

    Each split states its size, its images per class (in the order of `class_names`), and its lowest and
    highest pixel value (of `levels`).
    """
    return _facts(splits, separation(splits.train))


def _facts(splits: Splits, apart: Separation) -> dict[str, Any]:
    return {
        "name": splits.name,
        "shape": list(splits.shape),
        "levels": splits.train.levels,
        "class_names": list(splits.class_names),
        "mean": list(splits.mean),
        "std": list(splits.std),
        "splits": {name: _describe_split(images, splits.num_classes) for name, images in splits.parts.items()},
        "duplicates": {
            "test in train": len(duplicates(splits.test, splits.train)),
            "test in val": len(duplicates(splits.test, splits.val)),
            "val in train": len(duplicates(splits.val, splits.train)),
        },
        "epsilon": apart.to_json(),
        "notes": list(splits.notes),
        "fingerprint": splits.fingerprint,
    }


def write_description(splits: Splits, folder: Path) -> dict[str, Any]:
    """Writes description.json and perturbed.png, some training images at several radii, into `folder`; the description.

    Raises InputError where there can be no such folder, DiskError.
    """
    apart = separation(splits.train)
    facts = _facts(splits, apart)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "description.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        strip(splits.train, apart).save(folder / "perturbed.png")
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is a file, or below one; choose another folder with --out") from None
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror or error}; choose another folder with --out") from error
    return facts


def check_source(config: DataConfig, progress: Progress | None = None) -> list[str]:
    """What is wrong with the data of `config`, one sentence each. Decodes every image and writes no cache."""
    try:
        _check(config, progress)
    except DataProblems as error:
        return list(error.problems)
    except (InputError, CorruptError) as error:
        return [str(error)]
    return []


def _check(config: DataConfig, progress: Progress | None) -> None:
    if config.kind == "digits":
        partition("digits", {"train": load_digits()[1]}, CLASS_NAMES, config)
        return
    source = scan(config)
    converted = convert(source, config, discard, progress)
    partition(source.title, converted.labels, converted.class_names, config)


def _describe_split(images: ImageSet, num_classes: int) -> dict[str, Any]:
    present = np.flatnonzero(images.histogram.sum(axis=0))
    return {
        "n": len(images),
        "per_class": np.bincount(images.labels, minlength=num_classes).tolist(),
        "pixel_min": int(present[0]),
        "pixel_max": int(present[-1]),
    }
