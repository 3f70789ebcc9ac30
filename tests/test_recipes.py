"""Every shipped recipe is one that trains."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phalanx.config import is_study as describes_study
from phalanx.config import load_run, load_study, shipped_recipes
from phalanx.evaluation import protocol
from phalanx.runs import RunFolder
from phalanx.runs.metrics import read_metrics
from phalanx.workflow import train_run

RECIPES = {name: path for name, path in shipped_recipes().items() if not describes_study(path)}
STUDIES = sorted(set(shipped_recipes()) - set(RECIPES))

ONE_STEP = (
    "training.epochs=1",
    "training.batch_size=16",
    "validation.n=4",
    "data.train_limit=16",
    "device=cpu",
    "threads=1",
)


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cifar10_like(folder: Path) -> Path:
    """30 random pictures in CIFAR-10's Parquet layout: 20 to train on, 10 to test on."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    features = {"info": {"features": {"label": {"names": [f"class {i}" for i in range(10)], "_type": "ClassLabel"}}}}
    for split, ids in (("train", range(20)), ("test", range(20, 30))):
        table = pa.table({"img": [{"bytes": _png(i), "path": ""} for i in ids], "label": [i % 10 for i in ids]})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / f"{split}.parquet"
        )
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step(tmp_path: Path, name: str) -> None:
    overrides = ONE_STEP
    if name.startswith("cifar10"):
        images = cifar10_like(tmp_path / "images")
        small = ("model.options.width=4", "data.val_fraction=0.5", "data.train_limit=10", "training.batch_size=10")
        overrides += (*small, f"data.name=parquet:{images}", f"data.cache={tmp_path / 'cache'}")
    config = load_run(name, overrides).value
    train_run(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.status() == "finished"
    run.verify()
    trained, validated = read_metrics(run.resolve("metrics.jsonl"))
    assert trained["step"] == 1 and np.isfinite(trained["loss"])
    assert len(trained.get("load", [1.0])) == config.model.experts
    assert 0 <= validated["robust_accuracy"] <= validated["accuracy"] <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_for(name: str) -> None:
    config = load_run(name).value
    assert config.label and RECIPES[name].read_text().startswith("# ")
    for text in (config.validation.protocol, config.evaluation.protocol):
        assert protocol(text, config.threat).members


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_recipes_that_share_threat_and_data(name: str) -> None:
    study = load_study(name).value
    runs = [load_run(recipe).value for recipe in study.runs.values()]
    assert study.title and study.description
    # rows of one table must be comparable
    assert len({str((run.threat, run.data, run.evaluation)) for run in runs}) == 1
    assert len({run.label for run in runs}) == len(runs)
