"""A masked network in its two phases: what it begins as, what moves, and every mistake before training."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.config import MaskedConfig
from phalanx.errors import InputError
from phalanx.models import build_masked, load, read_description
from phalanx.nn.masked import masked_convolutions
from phalanx.routing import MixtureOfExperts
from phalanx.runs.checkpoint import load_tensors
from phalanx.training import Silent
from phalanx.workflow import Plan, find_rows, make_study, pick_device, plan, prepare_run, report_on, train_run

TINY = (
    "data.train_limit=64",
    "data.val_limit=10",
    "data.test_limit=10",
    "training.epochs=2",
    "training.batch_size=32",
    "training.optimizer={name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.01}",
    "method.attack.steps=2",
    "validation.protocol=fgsm",
    "evaluation.protocol=pgd-2",
    "evaluation.analysis=null",
    "device=cpu",
)
STUDY = """\
title: Sparse
description: A mask, then weights under it.
runs:
  weights: {recipe: digits-sparse-weights, set: ["model.options.width=4", "model.start=mask"]}
  mask: {recipe: digits-sparse-mask, set: ["model.options.width=4", "model.start=dense"]}
  dense:
    recipe: digits-sparse-mask
    set: ["model={name: mixture, expert: small_cnn, experts: 1, options: {width: 4}}", "label=dense"]
rows: [dense, mask, weights]
"""
Study = tuple[Plan, Path, list[tuple[str, str]]]


def _write(folder: Path, *changes: tuple[str, str]) -> str:
    """The study, changed."""
    text = STUDY
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "sparse.yaml"
    path.write_text(text)
    return str(path)


def _quiet(name: str) -> AbstractContextManager[Silent]:
    return nullcontext(Silent())


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study") / "made"
    steps: list[tuple[str, str]] = []
    work = plan(_write(folder.parent), TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        make_study(work, folder, _quiet, progress=lambda *step: steps.append(step))
    return work, folder, steps


def _folders(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ("dense", "mask", "weights")}


def _network(model: nn.Module) -> nn.Module:
    assert isinstance(model, MixtureOfExperts) and len(model.experts) == 1
    return model.experts[0]


def _last(run: Path) -> dict[str, Tensor]:
    tensors, _ = load_tensors(run / "last.safetensors")
    return {name.removeprefix("experts.0."): tensor for name, tensor in tensors.items()}


def _part(name: str) -> str:
    """What a tensor of the small network is."""
    own = name.rpartition(".")[2]
    if own in ("scores", "kept", "mean", "std"):
        return own
    if own.startswith(("running", "num_batches")):
        return "statistics"
    # convolution and BatchNorm come in pairs such as "3.0" and "3.1"; the classifier stands alone
    return "norm" if name.split(".")[1] == "1" else "weight"


# -- the two phases ------------------------------------------------------------------------------------------------


def test_the_dense_run_comes_first_then_the_mask(study: Study) -> None:
    work, folder, steps = study
    finished = [name for name, step in steps if step == "finished"]
    assert finished.index("dense") < finished.index("mask") < finished.index("weights")
    assert [*work.only(["weights"]).runs] == ["weights", "mask", "dense"]
    assert [*read_description(folder / "mask")["made_from"]] == ["dense network"]
    assert [*read_description(folder / "weights")["made_from"]] == ["mask"]


def test_the_mask_phase_begins_as_the_dense_run_and_ranks_by_its_weights(study: Study) -> None:
    work, folder, _ = study
    network = _network(prepare_run(work.runs["mask"], pick_device("cpu"), folders=_folders(folder)).model)
    dense = _network(load(folder / "dense")).state_dict()
    begun = network.state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in dense.items())
    for name, conv in masked_convolutions(network):
        sizes = dense[f"{name}.weight"].abs().sum((1, 2, 3))
        assert sizes[conv.selected()].min() >= sizes[~conv.selected()].max()


@pytest.mark.parametrize("train_norms", [True, False])
def test_in_phase_mask_every_weight_stays_bit_for_bit(study: Study, tmp_path: Path, train_norms: bool) -> None:
    work, folder, _ = study
    run, mask = folder / "mask", work.runs["mask"]
    if not train_norms:
        run = tmp_path / "mask"
        assert isinstance(mask.model, MaskedConfig)
        still = replace(mask, model=replace(mask.model, train_norms=False))
        train_run(still, run, folders=_folders(folder))
    start = _network(prepare_run(mask, pick_device("cpu"), folders=_folders(folder)).model).state_dict()
    moved: dict[str, set[bool]] = {}
    for name, tensor in _last(run).items():
        moved.setdefault(_part(name), set()).add(not torch.equal(tensor, start[name]))
    assert moved == {
        "mean": {False},
        "std": {False},
        "weight": {False},
        "scores": {True},
        "norm": {train_norms},
        "statistics": {True},
    }


def test_in_phase_weights_the_mask_is_fixed_and_everything_else_moves(study: Study) -> None:
    work, folder, _ = study
    begun = _network(prepare_run(work.runs["weights"], pick_device("cpu"), folders=_folders(folder)).model)
    learned = _network(load(folder / "mask"))
    selected = {name: conv.selected() for name, conv in masked_convolutions(learned)}
    start, last = begun.state_dict(), _last(folder / "weights")
    assert last.keys() == start.keys() and not [name for name in last if name.endswith("scores")]
    for name, kept in selected.items():
        assert torch.equal(start[f"{name}.kept"], kept) and torch.equal(last[f"{name}.kept"], kept)
        # a zeroed filter's weights have no gradient: they only decay
        shrunk = last[f"{name}.weight"] / start[f"{name}.weight"]
        factor = float(shrunk[~kept].mean())
        assert 0.9 < factor < 1 and torch.allclose(shrunk[~kept], torch.tensor(factor), atol=1e-4)
        assert not torch.allclose(shrunk[kept], torch.tensor(factor), atol=1e-2)
    weights = learned.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in start.items() if name in weights)


def test_a_loaded_run_is_the_trained_network(study: Study) -> None:
    _, folder, _ = study
    for name in ("mask", "weights"):
        model = load(folder / name, weights="last")
        assert not model.training
        state = _network(model).state_dict()
        last = _last(folder / name)
        assert state.keys() == last.keys() and all(torch.equal(state[key], last[key]) for key in last)
        assert [conv.num_kept for _, conv in masked_convolutions(model)] == [2, 4, 4]


def test_a_report_says_what_is_masked(study: Study, tmp_path: Path) -> None:
    _, folder, _ = study
    _, files = report_on(find_rows([folder]), tmp_path, title="", description="", command="phalanx run x")
    rows = {row["label"]: row for row in json.loads(files["table.json"].read_text())["rows"]}
    paths = {label: row["counts"]["path_macs"] for label, row in rows.items()}
    assert paths["AT (Sparse)"] == paths["AT (Sparse), mask alone"] < paths["dense"]
    assert {label: row["architecture"] for label, row in rows.items()} == {
        "dense": "single small_cnn",
        "AT (Sparse), mask alone": "single small_cnn, 0.5 of the filters",
        "AT (Sparse)": "single small_cnn, 0.5 of the filters",
    }


def test_random_weights_need_no_run(study: Study, tmp_path: Path) -> None:
    work, _, _ = study
    assert isinstance(work.runs["mask"].model, MaskedConfig)
    config = replace(work.runs["mask"], model=replace(work.runs["mask"].model, start=None))
    train_run(config, tmp_path / "mask")
    assert read_description(tmp_path / "mask")["made_from"] == {}
    one, again, other = (_network(build_masked(config.model, tiny.digits(), seed)) for seed in (0, 0, 1))  # type: ignore[arg-type]
    for name, conv in masked_convolutions(one):
        assert conv.scores is not None and torch.equal(conv.scores, again.get_parameter(f"{name}.scores"))
        assert not torch.equal(conv.scores, other.get_parameter(f"{name}.scores"))


@pytest.mark.parametrize("name", ["mask", "weights"])
def test_a_stopped_run_goes_on_to_the_same_bytes(study: Study, tmp_path: Path, name: str) -> None:
    work, folder, _ = study
    folders = _folders(folder)
    stopping = replace(work.runs[name], training=replace(work.runs[name].training, checkpoint_seconds=0.0))
    with pytest.raises(tiny.Stop):
        train_run(stopping, tmp_path / "run", tiny.StopAt(3), folders=folders)
    before = {"mask": "dense", "weights": "mask"}[name]
    train_run(replace(work.runs[before], seed=3), tmp_path / "other", folders=folders)
    with pytest.raises(InputError, match=r"was begun from other weights of its (dense network|mask); restore that run"):
        train_run(stopping, tmp_path / "run", folders={**folders, before: tmp_path / "other"})
    train_run(stopping, tmp_path / "run", folders=folders)
    for file in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (folder / name / file).read_bytes()


# -- mistakes ------------------------------------------------------------------------------------------------------

MASK, WEIGHTS = '"model.start=dense"', '"model.start=mask"'
MISTAKES = [
    ("mask", MASK, "model.options.width=8", "dense is small_cnn with width=4, this model's backbone is .* width=8"),
    (
        "mask",
        MASK,
        "model={name: masked, start: dense, backbone: resnet18}",
        "small_cnn with width=4, .*is resnet18 with",
    ),
    ("mask", MASK, "data.seed=1", "the dense network is trained on other data than the model made of it"),
    ("weights", WEIGHTS, "model.scale=0.25", "the mask of mask is for scale 0.5, this model has 0.25; give both"),
    ("weights", WEIGHTS, "model.options.width=8", "the mask of mask is for options .*4.*, this model has .*8"),
    (
        "weights",
        WEIGHTS,
        "model.backbone=resnet18",
        "the mask of mask is for backbone small_cnn, this model has resnet18",
    ),
    ("weights", WEIGHTS, "model.convolutions=routed", "is for convolutions all, this model has routed"),
    ("weights", WEIGHTS, "model.start=dense", "model.start: .*dense has not learned a mask; phase weights begins from"),
    ("weights", WEIGHTS, "data.seed=1", "the mask is trained on other data than the model made of it"),
]


@pytest.mark.parametrize(("run", "after", "setting", "message"), MISTAKES, ids=[row[2] for row in MISTAKES])
def test_a_run_that_does_not_fit_is_refused_before_training(
    study: Study, tmp_path: Path, run: str, after: str, setting: str, message: str
) -> None:
    # of the runs as planned, and of the runs as made
    work = plan(_write(tmp_path, (after, f'{after}, "{setting}"')), TINY).only([run])
    with pytest.raises(InputError, match=message):
        make_study(work, tmp_path / "study", _quiet)
    assert not (tmp_path / "study/dense").exists()
    if setting.startswith("data"):
        message = "was made with other images|was made with .*"
    with pytest.raises(InputError, match=message.replace(" of mask ", " of .*mask ")):
        train_run(work.runs[run], tmp_path / "run", folders=_folders(study[1]))
    assert not (tmp_path / "run").exists()


def _changed(study: Study, name: str, **change: Any) -> Any:
    config = study[0].runs[name]
    return replace(config, model=replace(config.model, **change))


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("mask", "nowhere", "model: the dense network: .*nowhere does not exist; check the name, or train it first"),
        ("weights", "nowhere", "model: the mask: .*nowhere does not exist"),
        ("mask", "mask", "model.start: .*mask is masked already; phase mask begins from a run of the same network"),
        ("weights", "weights", "model.start: .*weights has not learned a mask; phase weights begins from"),
    ],
)
def test_the_wrong_run_is_refused(study: Study, tmp_path: Path, name: str, start: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_run(_changed(study, name, start=start), tmp_path / "run", folders=_folders(study[1]))
    assert not (tmp_path / "run").exists()


def test_a_mask_that_is_not_finished_is_refused(study: Study, tmp_path: Path) -> None:
    work, folder, _ = study
    with pytest.raises(tiny.Stop):
        train_run(work.runs["mask"], tmp_path / "half", tiny.StopAt(1), folders=_folders(folder))
    with pytest.raises(InputError, match=r"model: the mask: .*half is not finished \(status running\)"):
        train_run(_changed(study, "weights", start=str(tmp_path / "half")), tmp_path / "run")


def test_a_mixture_is_no_dense_network(study: Study, tmp_path: Path) -> None:
    changed = _write(tmp_path, ("experts: 1", "experts: 2"))
    with pytest.raises(InputError, match="the dense network, dense, has 2 experts; give runs of single networks"):
        make_study(plan(changed, TINY), tmp_path / "study", _quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"scale": 0.5}}, "model.options.scale means nothing to a masked network; .* set model.scale"),
        ({"backbone": "wrn", "options": {"scaled_stem": True}}, "options.scaled_stem means .* set model.convolutions"),
        ({"backbone": "wrn", "options": {"routed_shortcuts": True}}, "options.routed_shortcuts means nothing"),
        ({"backbone": "mlp", "options": {}}, "a backbone of routed or masked layers must be one of .*, got 'mlp'"),
        ({"options": {"height": 3}}, "expert 'small_cnn' has no option 'height'"),
    ],
)
def test_a_masked_network_that_cannot_be_built_says_why(study: Study, change: dict[str, Any], message: str) -> None:
    model = _changed(study, "mask", **change).model
    with pytest.raises(InputError, match=message):
        build_masked(model, tiny.digits(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"scale must be in \(0, 1\], got 0"),
        ({"phase": "weights", "start": None}, "start must name a run of phase mask for phase weights, got null"),
        ({"phase": "weights", "train_norms": False}, "train_norms=false is for phase mask; leave it out"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedConfig(**{"start": "run", **settings})
