"""Folders made by recipes: made once, bound to what made them, and every damage found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from phalanx.config import DualView, EvaluationConfig, RunConfig, load_run
from phalanx.data import DataConfig
from phalanx.errors import CorruptError, InputError, Interrupted, LockedError
from phalanx.evaluation import Evaluation
from phalanx.evaluation.evaluate import model_sha256
from phalanx.models import load, load_mixtures, read_description, save_description
from phalanx.routing import DualModel
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.atomic import render_json
from phalanx.runs.checkpoint import load_latest
from phalanx.runs.sidecar import verify_sidecar, write_protected
from phalanx.training import Silent
from phalanx.workflow import (
    Plan,
    Trained,
    cpu_threads,
    data_config,
    evaluate_run,
    evaluate_view,
    evaluation_folder,
    find_rows,
    make_study,
    pick_device,
    plan,
    prepare_run,
    report_on,
    run_config,
    train_into,
    train_run,
)

TINY = (
    "data.train_limit=100",
    "data.val_limit=20",
    "data.test_limit=30",
    "model.experts=2",
    "model.options.hidden=[8]",
    "training.epochs=2",
    "training.batch_size=32",
    "training.validate_every=1",
    "validation.protocol=pgd-2",
    "evaluation.protocol=fgsm,routing-2",
    "evaluation.analysis=pgd-2",
    "evaluation.batch_size=10",
    "device=cpu",
)


def _config(*overrides: str) -> RunConfig:
    return load_run("digits-at", (*TINY, "method.attack.steps=2", *overrides)).value


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and evaluated run; copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    config = _config()
    train_run(config, run)
    evaluate_run(run, evaluation_folder(run, config.evaluation), config.evaluation)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# -- training ------------------------------------------------------------------------------------------------------


def test_the_loaded_model_is_the_trained_one_bit_for_bit(tmp_path: Path) -> None:
    config = _config("training.select=accuracy")
    jobs: list[Trained] = []

    def prepare() -> Trained:
        jobs.append(prepare_run(config, torch.device("cpu")))
        return jobs[-1]

    train_into(tmp_path / "run", {"test": 1}, prepare, device=torch.device("cpu"))
    trained = jobs[0].model.eval()
    loaded = load(tmp_path / "run", weights="last")
    mine, theirs = loaded.state_dict(), trained.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    (batch,) = jobs[0].data.test.batches(30)
    assert torch.equal(loaded(batch.x), trained(batch.x))
    # a finished folder is verified, not prepared again
    train_into(tmp_path / "run", {"test": 1}, prepare, device=torch.device("cpu"))
    assert len(jobs) == 1


def test_a_finished_run_is_not_trained_again(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    train_run(_config(), run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_the_same_recipe_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    train_run(_config(), tmp_path)
    assert tiny.result(tmp_path) == tiny.result(finished)
    other = tmp_path / "other"
    train_run(_config("seed=1"), other)
    assert tiny.result(other)["last.safetensors"] != tiny.result(finished)["last.safetensors"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.optimizer.lr=0.5", "training.optimizer.lr: 0.003 -> 0.5"),
        ("seed=7", "seed: 0 -> 7"),
        ("threat.eps=1/16", "threat.eps"),
        ("method.adversarial_share=0.5", "method.adversarial_share: 1.0 -> 0.5"),
    ],
)
def test_a_changed_recipe_in_the_same_folder_is_refused_by_key(run: Path, override: str, key: str) -> None:
    with pytest.raises(InputError, match=r"holds a run of another configuration .*remove the folder") as caught:
        train_run(_config(override), run)
    assert key in str(caught.value)


def test_a_mistake_that_building_shows_leaves_no_folder(tmp_path: Path) -> None:
    for override, message in [
        ("training.batch_size=101", "training.batch_size is 101, but digits has 100 training images; lower it"),
        ("model.options.width=3", "has no option 'width'"),
        ("evaluation.protocol=aa", "protocol has no attack 'aa'"),
        ("validation.protocol=aa", "protocol has no attack 'aa'"),
    ]:
        with pytest.raises(InputError) as caught:
            train_run(_config(override), tmp_path / "run")
        assert message in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_worked_on_is_refused(run: Path) -> None:
    with RunFolder(run).lock(), pytest.raises(LockedError, match=f"in use by .*{os.getpid()}") as caught:
        train_run(_config(), run)
    assert caught.value.exit_code == 6


def test_a_signal_marks_the_run_interrupted_and_the_same_call_goes_on(finished: Path, tmp_path: Path) -> None:
    stop = tiny.StopAt(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_run(_config(), tmp_path, stop)
    assert RunFolder(tmp_path).status() == "interrupted"
    train_run(_config(), tmp_path)
    assert RunFolder(tmp_path).status() == "finished"
    assert tiny.result(tmp_path) == tiny.result(finished)


def test_a_crash_leaves_a_run_that_goes_on(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        train_run(_config(), tmp_path, tiny.StopAt(4))
    assert RunFolder(tmp_path).status() == "running"
    train_run(_config(), tmp_path)
    assert tiny.result(tmp_path) == tiny.result(finished)


def _hand_built() -> nn.Module:
    from phalanx.routing import MixtureOfExperts

    return MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])


def test_other_images_under_the_same_name_are_refused(run: Path, tmp_path: Path) -> None:
    other = prepare_run(_config("data.seed=5"), torch.device("cpu")).data
    before = read_description(run)["data"]["fingerprint"]
    assert other.fingerprint != before
    # the run goes on with images that are not those it was begun with
    with pytest.raises(tiny.Stop):
        train_run(_config(), tmp_path / "begun", tiny.StopAt(2))
    wrong = replace(prepare_run(_config(), torch.device("cpu")), data=other)
    record = RunFolder(tmp_path / "begun").record()["config"]
    with pytest.raises(InputError, match=f"made with other images: the fingerprint of digits was {before[:12]}"):
        train_into(tmp_path / "begun", record, lambda: wrong, device=torch.device("cpu"))
    assert read_description(tmp_path / "begun")["data"]["fingerprint"] == before


def test_evaluating_on_other_images_is_refused(tmp_path: Path) -> None:
    config = _config()
    train_run(config, tmp_path / "run")
    (tmp_path / "run/model.json").unlink()
    other = prepare_run(_config("data.seed=5"), torch.device("cpu")).data
    save_description(tmp_path / "run/model.json", load_model(tmp_path), other)
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        folder.finish()
    with pytest.raises(InputError, match="made with other images"):
        evaluate_run(tmp_path / "run", tmp_path / "evaluation", config.evaluation)


def load_model(tmp_path: Path) -> nn.Module:
    return prepare_run(_config(), torch.device("cpu")).model


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_an_evaluation_is_done_once(run: Path, tmp_path: Path) -> None:
    config = replace(_config().evaluation, n=12, weights="last")
    folder = evaluation_folder(run, config)
    assert folder == run / "evaluations/fgsm+routing-2-last-12"
    found = evaluate_run(run, folder, config)
    assert isinstance(found, Evaluation) and found.n == 12 and found.robust_acc <= found.clean_acc
    assert evaluate_run(run, folder, config) is None
    RunFolder(run).verify()
    with pytest.raises(InputError, match="n: 12 -> 13"):
        evaluate_run(run, folder, replace(config, n=13))


def test_a_finished_evaluation_is_not_another_models(run: Path, tmp_path: Path) -> None:
    other, config, folder = tmp_path / "other", _config(), tmp_path / "evaluation"
    train_run(_config("training.optimizer.lr=0.01"), other)
    own = replace(config.evaluation, protocol="fgsm", analysis=None, checks=0, n=5)
    evaluate_run(run, folder, own)
    assert evaluate_run(run, folder, own) is None
    with pytest.raises(InputError, match="is finished, but of another model"):
        evaluate_run(other, folder, own)
    # as before the models were recorded: the ledger knows it
    record = json.loads((folder / "evaluation.json").read_bytes())
    del record["made_of"]
    (folder / "evaluation.json").write_bytes(render_json(record))
    RunFolder(folder).finish()
    assert evaluate_run(run, folder, own) is None
    with pytest.raises(InputError, match="is finished, but of another model"):
        evaluate_run(other, folder, own)
    assert json.loads((folder / "evaluation.json").read_bytes()) == record


def test_an_interrupted_evaluation_goes_on(finished: Path, tmp_path: Path) -> None:
    config = _config().evaluation
    whole = evaluation_folder(finished, config)
    stop = tiny.StopAt(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="verdicts of every finished batch are kept") as caught:
        evaluate_run(finished, tmp_path / "part", config, stop)
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGINT) == before
    assert RunFolder(tmp_path / "part").status() == "interrupted"
    with Ledger.read(tmp_path / "part/ledger.sqlite") as ledger:
        assert {row.sample for row in ledger.rows()} and len({row.sample for row in ledger.rows()}) == 20
    evaluate_run(finished, tmp_path / "part", config)
    tables = []
    for folder in (whole, tmp_path / "part"):
        RunFolder(folder).verify()
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            tables.append(ledger.table_sha256())
    assert tables[0] == tables[1]


def test_a_run_that_is_not_finished_is_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        train_run(_config(), tmp_path / "run", tiny.StopAt(4))
    assert (tmp_path / "run/best.safetensors").is_file()
    with pytest.raises(InputError, match=r"is not finished \(status running\); give its train command again"):
        evaluate_run(tmp_path / "run", tmp_path / "evaluation", EvaluationConfig())
    with pytest.raises(InputError, match="is no run folder"):
        evaluate_run(tmp_path / "nowhere", tmp_path / "evaluation", EvaluationConfig())
    assert not (tmp_path / "evaluation").exists()


def test_a_hand_built_models_run_is_evaluated_from_python(tmp_path: Path) -> None:
    tiny.run_training(tmp_path, _hand_built())
    with pytest.raises(InputError, match=r"was not made from a recipe; evaluate it from Python: px\.evaluate"):
        run_config(tmp_path)


def test_the_runs_recipe_comes_back(finished: Path) -> None:
    config = _config()
    assert run_config(finished) == replace(config, label="", evaluation=EvaluationConfig())


# -- damage --------------------------------------------------------------------------------------------------------


def _flips(content: bytes) -> Iterator[bytes]:
    """One bit flipped at the start, inside and at the end."""
    for place in sorted({0, len(content) // 3, len(content) // 2, len(content) - 1}):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 7)
        yield bytes(damaged)


RUN_FILES = [
    "run.json", "MANIFEST.json", "model.json", "model.json.sha256", "metrics.jsonl", "environment.json",
    "best.safetensors", "best.safetensors.sha256", "last.safetensors", "last.safetensors.sha256",
    "checkpoints/LATEST", "checkpoints/step-00000006/MANIFEST.json", "checkpoints/step-00000006/model.safetensors",
    "checkpoints/step-00000006/optimizer.safetensors", "checkpoints/step-00000006/state.json",
]  # fmt: skip
EVALUATION_FILES = [
    "run.json", "MANIFEST.json", "evaluation.json", "honesty.json", "analysis.json", "attribution.json",
    "ledger.sqlite", "ledger.sqlite.sha256", "gallery.npz",
]  # fmt: skip


def test_these_are_all_the_files(run: Path) -> None:
    made = {name for name in RunFolder(run).files() if not name.startswith("evaluations/")} | {"MANIFEST.json"}
    assert {name for name in made if "step-00000000" not in name} == set(RUN_FILES)
    evaluation = RunFolder(evaluation_folder(run, _config().evaluation))
    assert {*evaluation.files(), "MANIFEST.json"} == set(EVALUATION_FILES)


@pytest.mark.parametrize("name", RUN_FILES)
def test_one_flipped_bit_of_a_run_is_found(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    for damaged in _flips(content):
        (run / name).write_bytes(damaged)
        with pytest.raises(CorruptError) as caught:
            train_run(_config(), run)
        assert name in str(caught.value) and caught.value.exit_code == 4
        # nor is a damaged run evaluated
        with pytest.raises(CorruptError):
            evaluate_run(run, run.parent / "again", _config().evaluation)
        (run / name).write_bytes(content)
    train_run(_config(), run)


@pytest.mark.parametrize("name", EVALUATION_FILES)
def test_one_flipped_bit_of_an_evaluation_is_found(run: Path, name: str) -> None:
    config = _config().evaluation
    folder = evaluation_folder(run, config)
    content = (folder / name).read_bytes()
    for damaged in _flips(content):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CorruptError) as caught:
            evaluate_run(run, folder, config)
        assert name in str(caught.value)
        (folder / name).write_bytes(content)
    assert evaluate_run(run, folder, config) is None


def test_a_missing_file_is_found(run: Path) -> None:
    for name in ("last.safetensors", "checkpoints/step-00000006/state.json"):
        kept = (run / name).read_bytes()
        (run / name).unlink()
        with pytest.raises(CorruptError, match=name):
            train_run(_config(), run)
        (run / name).write_bytes(kept)


# -- studies -------------------------------------------------------------------------------------------------------


STUDY = """\
title: Joined
description: Two mixtures, joined.
set: [method.balance=0.2, threat.eps=1/64]
runs:
  st: {recipe: digits-st}
  at: {recipe: digits-at, set: [method.attack.steps=2]}
  joint: {recipe: digits-jtdmoe, set: [model.robust=at, method.attack.steps=2, label=joined]}
views:
  dual: {name: dual, standard: st, robust: at, alpha: 0.7}
  picked: {name: dual, standard: st, robust: at, keep: 0.9, label: as picked}
  nuts: {name: mixed_nuts, standard: st, robust: at}
  mean: {name: ensemble, runs: [st, at], mix: logits}
  uniform: {name: gate, run: at}
rows: [at, st, dual, picked, joint, nuts, mean, uniform]
"""
TRAINED = ("st", "at", "joint")
ROWS = ("at", "st", "dual", "picked", "joint", "nuts", "mean", "uniform")


def _quiet(name: str) -> AbstractContextManager[Silent]:
    return nullcontext(Silent())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, list[tuple[str, str]]]:
    """A small study, made: two mixtures, their dual model as it is and at a picked alpha, and trained jointly; and the
    steps of making it."""
    folder = tmp_path_factory.mktemp("study") / "joined"
    recipe = folder.parent / "joined.yaml"
    recipe.write_text(STUDY)
    work = plan(str(recipe), TINY)
    steps: list[tuple[str, str]] = []
    make_study(work, folder, _quiet, progress=lambda *step: steps.append(step))
    return work, folder, steps


def test_a_study_is_made_once(study: tuple[Plan, Path, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    work, folder, steps = study
    names = [*TRAINED, *(f"{row}.evaluation" for row in ROWS)]
    assert sorted(steps) == sorted((name, step) for name in names for step in ("running", "finished"))
    for name in names:
        assert steps.index((name, "running")) < steps.index((name, "finished"))
    needs = {f"{name}.evaluation": (name,) for name in TRAINED}
    needs |= {"joint": ("st", "at"), "dual.evaluation": ("st", "at"), "picked.evaluation": ("st", "at")}
    for name, needed in needs.items():
        for need in needed:
            assert steps.index((need, "finished")) < steps.index((name, "running"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    def never(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a finished study trains and evaluates nothing")

    for module, functions in (("training", ("train", "load_data")), ("measuring", ("evaluate", "load_data"))):
        for function in functions:
            monkeypatch.setattr(sys.modules[f"phalanx.workflow.{module}"], function, never)
    again: list[tuple[str, str]] = []
    rows = make_study(work, folder, _quiet, progress=lambda *step: again.append(step))
    assert sorted(again) == sorted((name, "skipped") for name in names)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    shown = [(row.label, [run.name for run in (*row.others.values(), row.run)], row.evaluation.name) for row in rows]
    assert shown == [
        ("AT", ["at"], "at.evaluation"), ("ST", ["st"], "st.evaluation"),
        ("dual, alpha 0.7", ["st", "at"], "dual.evaluation"), ("as picked", ["st", "at"], "picked.evaluation"),
        ("joined", ["joint"], "joint.evaluation"), ("MixedNUTS", ["st", "at"], "nuts.evaluation"),
        ("ensemble of 2", ["st", "at"], "mean.evaluation"), ("at, uniform gate", ["at"], "uniform.evaluation"),
    ]  # fmt: skip


def test_a_dual_model_of_the_study(study: tuple[Plan, Path, list[tuple[str, str]]]) -> None:
    _, folder, _ = study
    records = {row: json.loads((folder / f"{row}.evaluation/evaluation.json").read_text()) for row in ROWS}
    assert records["st"]["view"] is None and records["joint"]["view"] is None
    assert records["dual"]["view"] == {"kind": "dual", "alpha": 0.7, "mix": "probabilities", "picked": None}
    picked = records["picked"]["view"]
    assert 0.5 <= picked["alpha"] <= 1 and picked["picked"]["keep"] == 0.9
    # both halves run; without the gate that was trained there is no router
    for count, found in records["dual"]["counts"].items():
        assert found == sum(records[half]["counts"][count] for half in ("st", "at"))
    assert records["at"]["counts"]["router_macs"] > 0 == records["uniform"]["counts"]["router_macs"]
    # nothing but the mix of the two runs' weights
    expected = DualModel(load(folder / "st"), load(folder / "at"), 0.7)
    assert records["dual"]["model_sha256"] == model_sha256(expected)
    with Ledger.read(folder / "dual.evaluation/ledger.sqlite") as ledger:
        assert {"pgd-2@standard", "pgd-2@robust", "joint-2x9", "steer-2"} <= set(ledger.attacks())
    # the jointly trained one has moved away from both, and needs neither to be loaded
    trained = load(folder / "joint")
    assert isinstance(trained, DualModel)
    for half, began in (("standard", "st"), ("robust", "at")):
        before, after = load(folder / began).state_dict(), getattr(trained, half).state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert read_description(folder / "joint")["made_from"][half] == verify_sidecar(
            folder / began / "best.safetensors"
        )


def test_a_study_does_not_depend_on_the_number_of_processes(
    study: tuple[Plan, Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    work, folder, _ = study
    make_study(work, tmp_path / "joined", _quiet, workers=2)
    for name in TRAINED:
        assert (tmp_path / "joined" / name / "last.safetensors").read_bytes() == (
            folder / name / "last.safetensors"
        ).read_bytes()
    for row in ROWS:
        tables = []
        for made in (folder, tmp_path / "joined"):
            with Ledger.read(made / f"{row}.evaluation/ledger.sqlite") as ledger:
                tables.append(ledger.table_sha256())
        assert tables[0] == tables[1], row


def test_a_dual_model_from_the_command_line_is_the_studys(
    study: tuple[Plan, Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    _, folder, _ = study
    made = Path(shutil.copytree(folder, tmp_path / "joined"))
    view = DualView(standard=str(made / "st"), robust=str(made / "at"), alpha=0.7)
    config = load_run("digits-at", TINY).value.evaluation
    target = evaluation_folder(made / "at", config, view)
    assert target.name.endswith("-dual-st-0.7-probabilities")
    evaluate_view(view, {"standard": made / "st", "robust": made / "at"}, target, config)
    ledgers = []
    for path in (target, made / "dual.evaluation"):
        with Ledger.read(path / "ledger.sqlite") as ledger:
            ledgers.append((ledger.binding(), ledger.table_sha256()))
    assert ledgers[0] == ledgers[1]
    (row,) = find_rows([made / "at"])
    assert (row.run, row.others) == (made / "at", {"standard": made / "st"})


def test_halves_that_cannot_be_joined(
    study: tuple[Plan, Path, list[tuple[str, str]]], finished: Path, tmp_path: Path
) -> None:
    _, folder, _ = study
    with pytest.raises(InputError, match=r"the standard half, .*joint, is a DualModel; join mixtures"):
        load_mixtures({"standard half": folder / "joint", "robust half": folder / "at"})
    joint = plan(str(folder.parent / "joined.yaml"), TINY).runs["joint"]
    halves = {"st": folder / "st", "at": folder / "at"}
    with pytest.raises(InputError, match="model: the standard half: nowhere does not exist; check the name"):
        train_run(replace(joint, model=replace(joint.model, standard="nowhere")), tmp_path / "run", folders=halves)
    with pytest.raises(tiny.Stop):
        train_run(_config(), tmp_path / "half", tiny.StopAt(4))
    with pytest.raises(InputError, match=r"model: the robust half: .*half is not finished \(status running\)"):
        train_run(joint, tmp_path / "run", folders={**halves, "at": tmp_path / "half"})
    assert not (tmp_path / "run").exists()
    # other classes, by their description
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    description = json.loads((other / "model.json").read_bytes())
    for key, value in (("class_names", ["cat", "dog"]), ("mean", [0.25])):
        changed = {**description, "data": {**description["data"], key: value}}
        write_protected(other / "model.json", render_json(changed))
        with pytest.raises(
            InputError,
            match="the standard half and the robust half do not fit together: ",
        ):
            load_mixtures({"standard half": folder / "st", "robust half": other})


def test_a_joint_run_is_not_continued_from_other_halves(
    study: tuple[Plan, Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    work, folder, _ = study
    joint, halves = work.runs["joint"], {"st": folder / "st", "at": folder / "at"}
    with pytest.raises(tiny.Stop):
        train_run(joint, tmp_path / "run", tiny.StopAt(2), folders=halves)
    train_run(_config("seed=5", "model.experts=2"), tmp_path / "other")
    with pytest.raises(InputError, match="was begun from other weights of its robust half"):
        train_run(joint, tmp_path / "run", folders={**halves, "at": tmp_path / "other"})
    train_run(joint, tmp_path / "run", folders=halves)
    whole, resumed = (path / "last.safetensors" for path in (folder / "joint", tmp_path / "run"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_changed_study_in_the_same_folder_is_refused_by_key(
    study: tuple[Plan, Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(study[1], tmp_path / "study"))
    recipe = str(study[1].parent / "joined.yaml")
    for override, key in [("training.epochs=3", "training.epochs: 2 -> 3"), ("evaluation.n=5", "n: null -> 5")]:
        with pytest.raises(InputError) as caught:
            make_study(plan(recipe, (*TINY, override)), folder, _quiet)
        assert key in str(caught.value)
    make_study(plan(recipe, (*TINY, "evaluation.n=5")), folder, _quiet, fresh=True)
    assert len(find_rows([folder])) == len(ROWS)


def test_a_mistake_in_the_last_run_is_found_before_the_first_is_trained(tmp_path: Path) -> None:
    good, bad = _config(), _config("training.batch_size=101")
    with pytest.raises(InputError, match="batch_size: is 101"):
        make_study(Plan("", "", {"good": good, "bad": bad}), tmp_path / "study", _quiet)
    assert not (tmp_path / "study/good").exists()


def test_a_recipe_is_a_study_of_one() -> None:
    work = plan("digits-at", TINY)
    assert (work.title, list(work.runs)) == ("AT", ["digits-at"])
    assert plan("quickstart").table[:2] == ("st", "at")


def test_the_rows_of_folders(study: tuple[Plan, Path, list[tuple[str, str]]], finished: Path, tmp_path: Path) -> None:
    rows = find_rows([study[1], finished])
    labels = ["AT", "dual, alpha 0.7", "joined", "ensemble of 2", "MixedNUTS", "as picked", "ST", "at, uniform gate"]
    labels += ["run fgsm+routing-2-best-all"]
    assert [row.label for row in rows] == labels
    # one that did not end is a row, too
    copied = Path(shutil.copytree(study[1], tmp_path / "study"))
    (copied / "st.evaluation/evaluation.json").unlink()
    assert [row.evaluation.name for row in find_rows([copied])] == [row.evaluation.name for row in rows[:-1]]
    (copied / "st.evaluation/ledger.sqlite").unlink()
    assert "st.evaluation" not in [row.evaluation.name for row in find_rows([copied])]
    with pytest.raises(InputError, match="is no folder; give that of a study, a run"):
        find_rows([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"nothing evaluated in .*; run phalanx evaluate RUN"):
        find_rows([tmp_path])


def test_a_report_of_the_study(study: tuple[Plan, Path, list[tuple[str, str]]], tmp_path: Path) -> None:
    work, folder, _ = study
    rows = find_rows([folder])
    _, files = report_on(rows, tmp_path, title=work.title, description=work.description, command="phalanx run x")
    assert "Joined" in files["report.html"].read_text()


# -- small parts ---------------------------------------------------------------------------------------------------


def test_devices_threads_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'cuda:1' is not there: 0 GPUs were found; use device: cpu"):
        pick_device("cuda:1")
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    assert data_config("digits", ("data.train_limit=5",)) == DataConfig(train_limit=5)
    assert data_config("digits-at").name == "digits"
    assert data_config("folder:here").name == "folder:here"


def test_nothing_of_a_finished_run_is_left_out(finished: Path) -> None:
    kept = load_latest(finished / "checkpoints")
    assert kept is not None and kept.step == 6 and set(kept.tensors) == {"model", "optimizer"}
    assert set(RunFolder(finished).verify()) >= {"run.json", "model.json", "environment.json", "metrics.jsonl"}
