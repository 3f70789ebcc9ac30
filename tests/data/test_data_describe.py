from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.data import DataConfig, load_data
from phalanx.data.describe import check_source, describe

Make = Callable[..., Path]


def test_the_description_is_plain_and_complete() -> None:
    facts = describe(load_data("digits"))
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["shape"], facts["levels"], facts["class_names"][3]) == ([1, 8, 8], 16, "3")
    assert facts["splits"]["test"]["n"] == sum(facts["splits"]["test"]["per_class"]) == 449
    assert (facts["splits"]["train"]["pixel_min"], facts["splits"]["train"]["pixel_max"]) == (0, 16)


def test_duplicates_are_counted_between_all_splits(make_folder: Make) -> None:
    root = make_folder({f"{split}/{name}": 3 for split in ("train", "val", "test") for name in "ab"})
    shutil.copy(root / "val/a/000.png", root / "test/a/x.png")
    shutil.copy(root / "train/a/000.png", root / "val/a/x.png")
    shutil.copy(root / "train/a/000.png", root / "val/a/y.png")
    counts = describe(load_data(f"folder:{root}"))["duplicates"]
    assert counts == {"test in train": 0, "test in val": 1, "val in train": 2}


def test_a_sound_source_has_no_problems_and_gets_no_cache(make_folder: Make, own_cache: Path) -> None:
    assert check_source(DataConfig()) == []
    assert check_source(DataConfig(name=f"folder:{make_folder({'a': 3, 'b': 3})}")) == []
    assert list(own_cache.iterdir()) == []


def test_every_problem_is_listed(make_folder: Make) -> None:
    root = make_folder({"a": 3, "b": 3})
    (root / "a/000.png").write_bytes(b"")
    (root / "b/001.png").write_bytes(b"junk")
    problems = check_source(DataConfig(name=f"folder:{root}"))
    assert [problem.split(":")[0] for problem in problems] == ["a/000.png", "b/001.png"]


@pytest.mark.parametrize(
    ("counts", "start"),
    [({"a": 9, "b": 2}, "folder:pictures: each class needs 3"), ({"a": 1}, "pictures/ has 1 class")],
)
def test_too_few_images_are_a_problem(make_folder: Make, counts: dict[str, int], start: str) -> None:
    (problem,) = check_source(DataConfig(name=f"folder:{make_folder(counts)}"))
    assert problem.startswith(start)
