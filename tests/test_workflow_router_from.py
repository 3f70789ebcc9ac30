"""A mixture that begins with the router of another run of the same experts."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from phalanx.config import AssembledConfig, RunConfig
from phalanx.errors import InputError
from phalanx.models import load, read_description
from phalanx.routing import MixtureOfExperts
from phalanx.runs.checkpoint import load_tensors
from phalanx.training import Silent
from phalanx.workflow import Plan, make_study, pick_device, plan, prepare_run, train_run

TINY = (
    "data.train_limit=64",
    "data.val_limit=10",
    "data.test_limit=10",
    "model.options.hidden=[8]",
    "training.epochs=1",
    "training.batch_size=32",
    "validation.protocol=fgsm",
    "evaluation.protocol=fgsm",
    "evaluation.analysis=null",
    "device=cpu",
)
SMALL = "model.router={name: mlp, hidden: [16]}", "method.pgd_steps=[2]", "model.experts=[a, b]"
STUDY = """\
title: Gate first
description: A gate trained over frozen experts, then all together.
runs:
  joint: {recipe: digits-dwf, set: [SMALL, "label=joint", "model.router_from=gate"]}
  gate: {recipe: digits-dwf, set: [SMALL, "label=gate", "model.train_experts=false"]}
  a: {recipe: digits-dwf-benign}
  b: {recipe: digits-dwf-benign, set: [replica=1, label=b]}
  c: {recipe: digits-st, set: [model.experts=2, label=c]}
rows: [gate, joint]
""".replace("SMALL", ", ".join(f'"{setting}"' for setting in SMALL))


Made = tuple[Plan, Path, list[tuple[str, str]]]


def _write(folder: Path, old: str = "rows:", new: str = "rows:") -> str:
    """The study, with `old` replaced by `new`."""
    path = folder / "first.yaml"
    path.write_text(STUDY.replace(old, new))
    return str(path)


def _quiet(name: str) -> AbstractContextManager[Silent]:
    return nullcontext(Silent())


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The study, its folder, and the steps of making it."""
    folder = tmp_path_factory.mktemp("study")
    work = plan(_write(folder), TINY)
    steps: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        make_study(work, folder / "made", _quiet, progress=lambda *step: steps.append(step))
    return work, folder / "made", steps


def _folders(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ("a", "b", "gate")}


def _router(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    assert isinstance(model, MixtureOfExperts) and model.router is not None
    return dict(model.router.state_dict())


def test_the_router_run_comes_first(study: Made) -> None:
    work, folder, steps = study
    finished = [name for name, step in steps if step == "finished"]
    assert finished.index("a") < finished.index("gate") < finished.index("joint")
    assert work.needs("joint") == ("a", "b", "gate")
    assert [*work.only(["joint"]).runs] == ["joint", "gate", "a", "b"]
    assert [*read_description(folder / "joint")["made_from"]] == ["expert 0", "expert 1", "router"]


def test_it_begins_as_the_runs_best_router(study: Made) -> None:
    work, folder, _ = study
    begun = prepare_run(work.runs["joint"], pick_device("cpu"), folders=_folders(folder))
    gate, fresh = _router(load(folder / "gate")), _without(work.runs["joint"], folder)
    for name, tensor in _router(begun.model).items():
        assert torch.equal(tensor, gate[name])
    # not that of a mixture without it, and training moved it away again
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in gate.items())
    moved, _ = load_tensors(folder / "joint" / "last.safetensors")
    assert any(not torch.equal(tensor, moved[f"router.{name}"]) for name, tensor in gate.items())
    assert isinstance(begun.model, MixtureOfExperts) and begun.model.train_experts


def _without(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    assert isinstance(config.model, AssembledConfig)
    alone = replace(config, model=replace(config.model, router_from=None))
    return _router(prepare_run(alone, pick_device("cpu"), folders=_folders(folder)).model)


def test_a_stopped_run_goes_on_from_the_same_router_only(study: Made, tmp_path: Path) -> None:
    work, folder, _ = study
    joint, folders = work.runs["joint"], _folders(folder)
    with pytest.raises(tiny.Stop):
        train_run(joint, tmp_path / "run", tiny.StopAt(1), folders=folders)
    train_run(replace(work.runs["gate"], seed=3), tmp_path / "other", folders=folders)
    with pytest.raises(InputError, match="was begun from other weights of its router; restore that run"):
        train_run(joint, tmp_path / "run", folders={**folders, "gate": tmp_path / "other"})
    train_run(joint, tmp_path / "run", folders=folders)
    whole, resumed = (path / "last.safetensors" for path in (folder / "joint", tmp_path / "run"))
    assert whole.read_bytes() == resumed.read_bytes()


OTHER_RUN = [
    ("model.experts=[b, a]", r"weighs other experts or in another order \(expert 0 differs\)"),
    ("model.experts=[a, b, c]", "weighs 2 experts, this model has 3"),
    ("model.router={name: mlp, hidden: [8]}", r"router\.mlp .*hidden=.16., this model.s is .*hidden=.8.; give both"),
    ("model.router={name: linear, hidden: null}", r"router\.mlp .*hidden=.16., this model.s is router.linear shape"),
]


@pytest.mark.parametrize(("setting", "message"), OTHER_RUN)
def test_a_router_that_does_not_fit_is_refused_before_training(
    study: Made, tmp_path: Path, setting: str, message: str
) -> None:
    # of the runs as planned, and of the runs as made
    work = plan(_write(tmp_path, "model.router_from=gate", f'model.router_from=gate", "{setting}'), TINY)
    with pytest.raises(InputError, match=message):
        make_study(work, tmp_path / "study", _quiet)
    assert not (tmp_path / "study/a").exists()
    made = study[1]
    folders = {**_folders(made), "c": made / "c"}
    with pytest.raises(InputError, match=message):
        train_run(work.runs["joint"], tmp_path / "run", folders=folders)
    assert not (tmp_path / "run").exists()


def test_the_wrong_kind_of_run_is_refused(study: Made, tmp_path: Path) -> None:
    message = "model.router_from: .*c is no mixture assembled of runs; name an assembled run of the same experts"
    work = plan(_write(tmp_path, "model.router_from=gate", "model.router_from=c"), TINY)
    with pytest.raises(InputError, match=message):
        make_study(work, tmp_path / "study", _quiet)
    train_run(work.runs["c"], tmp_path / "c")
    folders = _folders(study[1])
    with pytest.raises(InputError, match=message):
        train_run(work.runs["joint"], tmp_path / "run", folders={**folders, "c": tmp_path / "c"})
    with pytest.raises(InputError, match=r"model: the router: .*nowhere does not exist"):
        train_run(work.runs["joint"], tmp_path / "run", folders={**folders, "c": tmp_path / "nowhere"})


def test_a_router_of_other_data_is_refused(study: Made, tmp_path: Path) -> None:
    changed = _write(tmp_path, "model.train_experts=false", 'model.train_experts=false", "data.seed=1')
    with pytest.raises(InputError, match=r"the .* is trained on other data than the model made of it; give both"):
        make_study(plan(changed, TINY), tmp_path / "study", _quiet)
    joint = study[0].runs["joint"]
    other = replace(joint, data=replace(joint.data, mean=(0.3,)))
    with pytest.raises(InputError, match="a was made with another normalisation"):
        train_run(other, tmp_path / "run", folders=_folders(study[1]))


def test_an_expert_is_no_router() -> None:
    with pytest.raises(ValueError, match="router_from must be a run of its own, got a, which is an expert"):
        AssembledConfig(experts=("a", "b"), router_from="a")
