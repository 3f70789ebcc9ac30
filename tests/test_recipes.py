"""Every shipped recipe is one that trains."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from phalanx.config import (
    DualConfig,
    MixtureConfig,
    load_reproduction,
    load_run,
    shipped_recipes,
    shipped_reproductions,
)
from phalanx.config import is_study as describes_study
from phalanx.errors import InputError
from phalanx.evaluation import protocol
from phalanx.experts import build_expert
from phalanx.loading import RecipeErrors
from phalanx.models import load
from phalanx.report import RowSource, build_page, render_html
from phalanx.runs import RunFolder
from phalanx.runs.metrics import read_metrics
from phalanx.workflow import evaluate_run, plan, reproduction, train_run
from phalanx.workflow.reproducing import Scale

RECIPES = {name: path for name, path in shipped_recipes().items() if not describes_study(path)}
TRAINED = [name for name in RECIPES if name != "cifar10-pretrained"]
STUDIES = sorted(set(shipped_recipes()) - set(RECIPES))

ONE_STEP = (
    "training.epochs=1",
    "training.batch_size=16",
    "validation.n=4",
    "data.train_limit=16",
    "device=cpu",
    "threads=1",
)


# the recipes of what a model is made of
PARTS = {
    "jtdmoe": {"standard": "st", "robust": "rt-er"},
    "adaptive": {"standard": "st", "robust": "rt-er"},
    "sparse-weights": {"start": "sparse-mask"},
    "closed-ranks": {"start": "single-at"},
    "classifier-closed-ranks": {"start": "classifier-single"},
    "dwf": {"expert 0": "dwf-benign", "expert 1": "dwf-fgsm", "expert 2": "dwf-pgd"},
}
# what a recipe wants of its own where no other run is made before
ALONE = {"sparse-mask": ("model.start=null",)}


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


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_takes_a_step(tmp_path: Path, name: str) -> None:
    overrides = ONE_STEP
    if name.startswith(("cifar10", "svhn", "robust")):
        images = cifar10_like(tmp_path / "images")
        small = ("model.options.width=4", "data.val_fraction=0.5", "data.train_limit=10", "training.batch_size=10")
        overrides += (*small, f"data.name=parquet:{images}", f"data.cache={tmp_path / 'cache'}")
    family = name.partition("-")[0]
    parts = PARTS.get(name.removeprefix(f"{family}-"), {})
    for part in parts.values():
        train_run(load_run(f"{family}-{part}", (*overrides, *ALONE.get(part, ()))).value, tmp_path / part)
    overrides += ALONE.get(name.removeprefix(f"{family}-"), ())
    if parts and ("start" not in parts or name.endswith("closed-ranks")):
        overrides = tuple(item for item in overrides if not item.startswith("model."))
    if {"standard", "start"} & parts.keys():
        overrides += tuple(f"model.{key}={tmp_path / part}" for key, part in parts.items())
    elif parts:
        overrides += (f"model.experts=[{', '.join(str(tmp_path / part) for part in parts.values())}]",)
    config = load_run(name, overrides).value
    train_run(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.status() == "finished"
    run.verify()
    records = read_metrics(run.resolve("metrics.jsonl"))
    # sixteen images may well fall to one expert: an alarm is no mistake here
    trained, validated = (record for record in records if record["kind"] != "alarm")
    losses = [value for key, value in trained.items() if key.rpartition(".")[2] == "loss"]
    assert trained["step"] == 1 and losses and np.isfinite(losses).all()
    if isinstance(config.model, MixtureConfig):
        assert len(trained.get("load", [1.0])) == config.model.experts
    assert 0 <= validated["robust_accuracy"] <= validated["accuracy"] <= 1


def test_the_pretrained_recipe_measures_and_trains_nothing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = tmp_path / "public.safetensors"
    tensors = build_expert("timm:test_resnet", num_classes=10, image_size=32, stem="small")[1].state_dict()
    save_file(tensors, weights)
    settings = (
        "model.expert=timm:test_resnet",
        f"model.options.weights={weights}",
        f"data.name=parquet:{cifar10_like(tmp_path / 'images')}",
        f"data.cache={tmp_path / 'cache'}",
        *("data.val_fraction=0.5", "training.batch_size=10", "validation.protocol=pgd-1", "device=cpu"),
        *("evaluation.protocol=pgd-1", "evaluation.n=5"),
    )
    config = load_run("cifar10-pretrained", settings).value
    run = tmp_path / "run"
    train_run(config, run)
    train_run(config, run)
    assert [record["kind"] for record in read_metrics(run / "metrics.jsonl")] == ["validation"]
    weights.unlink()
    # what was measured and is deployed are the file's numbers, and it takes no file to load or to evaluate them
    for which in ("best", "last"):
        loaded = load(run, weights=which).experts[0][1].state_dict()
        assert timm and all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    evaluate_run(run, tmp_path / "evaluation", config.evaluation)
    page = build_page("", "", [RowSource("public", run, tmp_path / "evaluation")], "")
    assert page.rows[0].method == "none" and "not trained here" in page.summary[0] and render_html(page)


def test_a_run_is_not_continued_from_another_file(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    path = tmp_path / "public.safetensors"

    def publish() -> None:
        save_file(build_expert("timm:test_resnet", num_classes=10, image_size=8, channels=1)[1].state_dict(), path)

    model = MixtureConfig(expert="timm:test_resnet", experts=1, options={"weights": str(path)})
    config = replace(load_run("digits-st", ONE_STEP).value, model=model)
    publish()
    train_run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    publish()
    with pytest.raises(InputError, match="was begun from other weights of its network"):
        train_run(config, tmp_path / "run")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_for(name: str) -> None:
    config = load_run(name).value
    assert config.label and RECIPES[name].read_text().startswith("# ")
    for text in (config.validation.protocol, config.evaluation.protocol):
        assert protocol(text, config.threat).members


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_recipes_that_share_threat_and_data(name: str) -> None:
    work = plan(name)
    runs = list(work.runs.values())
    assert work.title and work.description
    # rows of one table must be comparable; certificates stand beside what is compared
    assert len({str((run.threat, run.data, replace(run.evaluation, certify=None))) for run in runs}) == 1
    assert len({work.label(row) for row in work.table}) == len(work.table)


def test_the_wide_network_of_a_reduced_study_is_wide_beside_its_others() -> None:
    runs = plan("dwf-reduced").runs
    widths = {
        name: run.model.options["width"] for name, run in runs.items() if "width" in getattr(run.model, "options", {})
    }
    assert widths["wide-at"] == 3 * widths["pgd-at"] == 48


def test_a_setting_of_experts_passes_by_a_model_made_of_runs() -> None:
    runs = plan("dual-reduced").runs
    assert isinstance(runs["jtdmoe-0.5"].model, DualConfig) and runs["jtdmoe-0.5"].model.alpha == 0.5
    assert isinstance(runs["rt-er-e3"].model, MixtureConfig)
    assert (runs["rt-er-e3"].model.experts, runs["rt-er-e3"].model.options["width"]) == (3, 16)
    with pytest.raises(RecipeErrors, match="hidden"):
        plan("dual-reduced", ("model.hidden=3",))


@pytest.mark.parametrize("name", shipped_reproductions())
def test_a_papers_table_names_rows_of_its_study(name: str) -> None:
    study = load_reproduction(name).value.study
    scales = [scale for scale in get_args(Scale) if f"{study}-{scale}" in shipped_recipes()]
    assert {"reduced", "full"} <= set(scales)
    for scale in scales:
        made = reproduction(name, scale)
        assert made.plan.rows and made.source and scale in made.plan.title
        assert set(made.reported) <= {made.plan.label(row) for row in made.plan.rows}
        for row in made.plan.rows:
            printed, measured = made.reported.get(made.plan.label(row), {}), made.plan.measured(row)
            attacks = {member.name for member in protocol(measured.evaluation.protocol, measured.threat).members}
            columns = {"SA", "RA", "RA-E", "RA-R", "RA-RMoE", "RA-SMoE", "smooth"}
            # the radii of digits are not the paper's
            assert scale == "digits" or set(printed) <= columns | attacks
            assert all(0 <= value <= 100 for value in printed.values())
    assert "at-top2" not in reproduction("dual/table3", "digits").plan.runs


def test_an_unknown_table_scale_or_row() -> None:
    with pytest.raises(InputError, match=r"no table is named 'dual/table99'; there are .*dual/table3"):
        reproduction("dual/table99", "digits")
    with pytest.raises(InputError, match=r"--scale must be one of digits, reduced, full, got 'tiny'"):
        reproduction("dual/table3", "tiny")
    with pytest.raises(InputError, match=r"the study has no row 'x'; it has st, at"):
        plan("quickstart").only(["x"])
