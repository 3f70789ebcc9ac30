from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phalanx.data.config import AugmentStep, DataConfig, parse_augment


def test_defaults_are_the_digits() -> None:
    assert DataConfig().kind == "digits"


def test_the_path_is_what_follows_the_colon() -> None:
    config = DataConfig(name="folder:/a/b:c")
    assert (config.kind, config.path) == ("folder", Path("/a/b:c"))
    assert DataConfig(name="parquet:~/x").path == Path.home() / "x"


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("name", "cifar11", "one sub-folder per class"),
        ("name", "folder:", "folder:PATH"),
        ("name", "digits:x", "'digits'"),
        ("name", "folder:a\0b", "folder:PATH"),
        ("size", 0, r"in 1\.\.4096, got 0"),
        ("size", 5000, r"in 1\.\.4096, got 5000"),
        ("size", True, "got True"),
        ("color", "gray", "'auto', got 'gray'"),
        ("train_limit", 0, "at least 1, got 0"),
        ("val_limit", -1, "at least 1, got -1"),
        ("test_limit", 1.5, "at least 1, got 1.5"),
        ("val_fraction", 0.9, r"must be in \(0, 0.5\], got 0.9"),
        ("test_fraction", 0.0, r"must be in \(0, 0.5\], got 0.0"),
        ("test_fraction", float("nan"), "got nan"),
        ("seed", -1, "got -1"),
        ("augment", ("flop",), "did you mean 'flip'"),
        ("augment", "flip", r"write \['flip'\]"),
        ("mean", (), r"one number in \[0, 1\] for each channel, got \[\]"),
        ("mean", (0.5, 125.3), r"got \[0.5, 125.3\]"),
        ("std", (0.2, 0.0), r"one number in \(0, 1\] for each channel, got \[0.2, 0.0\]"),
        ("std", (float("nan"),), r"got \[nan\]"),
        ("cache", "", "leave it out"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_the_way_out(field: str, value: Any, way_out: str) -> None:
    values = {"name": "folder:pictures", field: value}
    with pytest.raises(ValueError, match=f"^{field} .*{way_out}"):
        DataConfig(**values)


@pytest.mark.parametrize(("field", "value"), [("size", 8), ("color", "rgb")])
def test_what_digits_cannot_have_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} cannot be set for digits.*leave it out"):
        DataConfig(**{field: value})


def test_augmentations_keep_their_order() -> None:
    expected = (AugmentStep("crop", 4), AugmentStep("flip", 0), AugmentStep("cutout", 8))
    assert parse_augment(["crop:4", "flip", "cutout:8"]) == expected


@pytest.mark.parametrize("item", ["crop", "crop:", "crop:0", "crop:-1", "crop:1.5", "crop:²", "crop:99999", "flip:3"])
def test_a_wrong_number_names_the_item(item: str) -> None:
    with pytest.raises(ValueError, match=f"^augment item '{item}' (needs a whole number|takes no number)"):
        parse_augment([item])


def test_configuration_needs_no_torch() -> None:
    code = "import sys, phalanx.data.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
