"""A step that cannot fit is refused before the first one."""

# E experts

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import tiny
from phalanx.config import RunConfig, load_run
from phalanx.errors import InputError
from phalanx.models import build_mixture, build_synergy
from phalanx.nn.memory import StepMemory
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.training import Silent
from phalanx.workflow import make_study, memory, plan, train_run
from phalanx.workflow.memory import GIB, check_memory, step_memory

CPU = torch.device("cpu")
TINY = ("data.train_limit=100", "data.val_limit=20", "data.test_limit=30", "training.batch_size=32", "device=cpu")
MLP = ("model.options.hidden=[8]", "model.experts=3")
WEIGHTS = 4 * (64 * 8 + 8 + 8 * 10 + 10)
"""Bytes of one such expert."""
SGD = "training.optimizer={name: sgd, lr: 0.1}"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _config(recipe: str, *overrides: str) -> RunConfig:
    return load_run(recipe, (*TINY, *overrides)).value


def _need(recipe: str, *overrides: str, on_gpu: bool = False) -> StepMemory:
    config = _config(recipe, *MLP, *overrides)
    model = build_mixture(config.model, tiny.digits(), 0)  # type: ignore[arg-type]
    return step_memory(model, config, tiny.digits(), on_gpu=on_gpu)


def test_a_need_by_hand() -> None:
    # SGD with momentum keeps as much again as the weights; the weights themselves are where they stay
    need = _need("digits-at", SGD, "model.top_k=1")
    assert (need.experts, need.answering, need.checkpoint) == (3, 1, False)
    assert need.state == need.gradients == need.folded == WEIGHTS
    assert need.shared == 4 * (64 * 3 + 3)
    # the image's 64 numbers and the ReLU's 8, for 32 images; for the attack the ReLU's
    assert (need.update, need.attack) == (32 * 4 * (64 + 8), 32 * 4 * 8)


def test_what_adds_to_it() -> None:
    assert _need("digits-at", SGD, on_gpu=True).state == 2 * WEIGHTS
    assert _need("digits-at", SGD, "training.ema_decay=0.9").state == 2 * WEIGHTS
    assert _need("digits-at", "training.optimizer={name: sgd, lr: 0.1, momentum: 0}").state == 0
    assert _need("digits-at", "training.optimizer={name: adam, lr: 0.1}").state == 2 * WEIGHTS
    plain = _need("digits-at")
    assert _need("digits-at", "model.top_k=all").answering == 3
    assert _need("digits-at", "training.batch_size=16").update == plain.update / 2
    assert _need("digits-at", "training.precision=bf16").update == plain.update / 2
    assert _need("digits-trades").update == 2 * plain.update
    assert _need("digits-at", "method={name: dwf}").update == 3 * plain.update
    assert _need("digits-at", "method={name: dwf}").attack == plain.attack
    assert (_need("digits-st").attack, _need("digits-st").folded) == (0, 0)


def test_frozen_and_checkpointed_experts() -> None:
    config, data = _config("digits-dwf", "model.experts=[a,b]"), tiny.digits()
    frozen = step_memory(tiny.mixture(2, "all", train_experts=False), config, data, on_gpu=False)
    assert (frozen.update, frozen.state, frozen.gradients) == (0, 0, 0) and frozen.attack > 0
    again = step_memory(tiny.mixture(2, "all", checkpoint=True), config, data, on_gpu=False)
    assert again.checkpoint and again.update > 0


def test_models_of_other_kinds() -> None:
    config, data = _config("digits-soe", "model.experts=3"), tiny.digits()
    need = step_memory(build_synergy(config.model, data, 0), config, data, on_gpu=False)  # type: ignore[arg-type]
    # every sub-model is asked
    assert (need.experts, need.answering) == (3, 3)
    dual = DualModel(tiny.mixture(2, 1), tiny.mixture(3, "all", seed=1), 0.7)
    need = step_memory(dual, config, data, on_gpu=False)
    assert (need.experts, need.answering) == (5, 4)
    single = step_memory(MixtureOfExperts(None, [tiny.mixture().experts[0]]), config, data, on_gpu=False)
    assert (single.experts, single.answering) == (1, 1)
    bare = step_memory(tiny.mixture().experts[0], config, data, on_gpu=False)
    assert (bare.experts, bare.answering, bare.shared) == (1, 1, 0)


def test_what_just_fits_is_taken_and_one_byte_less_refused() -> None:
    config, data = _config("digits-dwf", "model.experts=[a,b,c,d]"), tiny.digits()
    model = tiny.mixture(4, "all")
    total = step_memory(model, config, data, on_gpu=False).total
    check_memory(model, config, data, CPU, available=total)
    with pytest.raises(InputError) as caught:
        check_memory(model, config, data, CPU, available=total - 1)
    assert str(caught.value) == (
        f"a training step needs {total / GIB:.1f} GiB at least, cpu has {(total - 1) / GIB:.1f} GiB: 3 of 4 experts "
        "fit; set model.checkpoint=true, lower training.batch_size (32) or take narrower experts"
    )
    # what is checkpointed already, or no assembled mixture, is not told to be
    for other, settings in ((tiny.mixture(4, "all", checkpoint=True), config), (model, _config("digits-at"))):
        with pytest.raises(InputError, match=r"0 of 4 experts fit; lower training\.batch_size \(32\) or take"):
            check_memory(other, settings, data, CPU, available=1)


def test_nothing_is_refused_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_memory(tiny.mixture(), _config("digits-at"), tiny.digits(), CPU)


def test_a_run_that_does_not_fit_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="0 of 3 experts fit"):
        train_run(_config("digits-at", *MLP), tmp_path / "run")
    assert not (tmp_path / "run").exists()


STUDY = """\
title: Joined
description: Three networks, and the mixture of them.
runs:
  a: {recipe: digits-dwf-benign}
  b: {recipe: digits-dwf-benign, set: [replica=1]}
  c: {recipe: digits-dwf-benign, set: [replica=2]}
  joint: {recipe: digits-dwf, set: ["model.experts=[a, b, c]"]}
"""


def test_a_study_that_ends_in_too_many_experts_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(STUDY)
    work = plan(str(recipe), TINY)
    data = tiny.digits()
    one = build_mixture(work.runs["a"].model, data, 0)  # type: ignore[arg-type]
    have = step_memory(one, work.runs["joint"], data, on_gpu=False).total
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * have)
    with pytest.raises(InputError, match=r"of 3 experts fit; set model\.checkpoint=true"):
        make_study(work, tmp_path / "study", lambda name: nullcontext(Silent()))
    assert not (tmp_path / "study/a").exists()
