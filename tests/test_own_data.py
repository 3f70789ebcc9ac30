"""A stranger's folder: from images to page with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.config import load_run
from phalanx.data import Loader
from phalanx.training import loop
from phalanx.workflow import train_run

QUICKLY = (
    "training.epochs=2",
    "training.batch_size=8",
    "method.attack.steps=1",
    "model.options.width=4",
    "evaluation.protocol=pgd-2",
    "evaluation.analysis=null",
    "evaluation.checks=0",
    "device=cpu",
    "threads=1",
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def settings(root: Path, tmp_path: Path) -> list[str]:
    own = (f"data.name=folder:{root}", f"data.cache={tmp_path / 'cache'}")
    return [part for item in (*QUICKLY, *own) for part in ("--set", item)]


def shapes_folder(root: Path, counts: dict[str, int]) -> Path:
    """Colour and grey images of mixed sizes, PNG and JPEG: bright on the left, right, or in the middle."""
    rng = np.random.default_rng(0)
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            height, width = rng.integers(33, 50, 2)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            pixels[:, place * width // 3 : (place + 1) * width // 3] += 150
            image = Image.fromarray(pixels).convert("L" if index == 0 else "RGB")
            image.save(root / name / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return root


def test_a_folder_of_mixed_sizes_becomes_a_page_with_one_command(tmp_path: Path) -> None:
    root = shapes_folder(tmp_path / "shapes", {"left": 14, "middle": 12, "right": 6})
    done = invoke(
        "run", "robust-classifier", *settings(root, tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"
    )
    assert done.exit_code == 0, done.output
    assert "Closed Ranks, 2 experts" in done.output and "AT, single network" in done.output
    page = (tmp_path / "out/report.html").read_text()
    assert "folder:shapes" in page and "A robust classifier of your images" in page


def test_a_recipe_without_auto_names_the_way_out(tmp_path: Path) -> None:
    root = shapes_folder(tmp_path / "shapes", {"left": 4, "middle": 4})
    with pytest.raises(ValueError, match=r"set data\.size, to a number or to auto"):
        invoke("data", "describe", f"folder:{root}", "--set", f"data.cache={tmp_path / 'cache'}")


def test_describing_shows_images_at_several_radii(tmp_path: Path) -> None:
    root = shapes_folder(tmp_path / "shapes", {"left": 5, "middle": 5})
    arguments = ["--set", "data.size=auto", "--set", "data.color=auto", "--set", f"data.cache={tmp_path / 'cache'}"]
    done = invoke("data", "describe", f"folder:{root}", *arguments, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0 and '"suggested": "8/255"' in done.output
    assert (tmp_path / "out/perturbed.png").is_file() and (tmp_path / "out/description.json").is_file()


@pytest.mark.parametrize(("sampling", "rare"), [("class_balanced", 12), ("shuffled", 3)])
def test_training_shows_rare_classes_as_often_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str, rare: int
) -> None:
    root = shapes_folder(tmp_path / "shapes", {"left": 32, "middle": 5})
    seen: list[torch.Tensor] = []

    class Heard(Loader):
        def batch(self, step: int) -> Any:
            batch = super().batch(step)
            seen.append(batch.y)
            return batch

    monkeypatch.setattr(loop, "Loader", Heard)
    overrides = [*QUICKLY, "training.epochs=1", f"training.sampling={sampling}", f"data.name=folder:{root}"]
    overrides.append(f"data.cache={tmp_path / 'cache'}")
    config = load_run("robust-classifier-single", tuple(overrides)).value
    train_run(config, tmp_path / "run")
    shown = torch.cat(seen)
    assert len(shown) == 24 and abs(int(shown.sum()) - rare) <= 1
