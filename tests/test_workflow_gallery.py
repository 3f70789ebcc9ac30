"""gallery.npz: a few images of an evaluation, which must be what the ledger says they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from phalanx.config import EvaluationConfig, load_run
from phalanx.models import load
from phalanx.report.gallery import Gallery, read_gallery
from phalanx.routing import leaves, routed
from phalanx.runs import Ledger
from phalanx.workflow import evaluate_run, evaluation_folder, train_run
from phalanx.workflow.gallery import BROKEN, GALLERY_NAME, HELD

TINY = (
    "data.train_limit=400",
    "data.val_limit=20",
    "data.test_limit=120",
    "model.options.hidden=[8]",
    "training.epochs=8",
    "training.batch_size=32",
    "validation.protocol=fgsm",
    "method.attack.steps=1",
    "device=cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mixture"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        train_run(load_run("digits-at", (*TINY, "model.experts=4", "method.balance=1.0")).value, folder)
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def evaluated(run: Path, protocol: str, folder: Path, n: int = 120) -> Path:
    evaluate_run(run, folder, EvaluationConfig(protocol=protocol, n=n, checks=0))
    return folder


def kept(folder: Path) -> Gallery:
    found = read_gallery(folder / GALLERY_NAME)
    assert found is not None
    return found


def test_the_images_are_those_that_the_ledger_tells_of(run: Path, tmp_path: Path) -> None:
    protocol = "fgsm:1/64, pgd-3, pgd-3@experts"
    folder = evaluated(run, protocol, tmp_path / "e")
    found = kept(folder)
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        rows = {(row.sample, row.attack): row for row in ledger.rows()}
        eps = ledger.binding().eps
    names = [name.strip() for name in protocol.split(",")]
    broken = [one for one in found.images if not one.held]
    assert 0 < len(broken) <= BROKEN and 0 < len(found.images) - len(broken) <= HELD
    assert len({one.attack for one in broken}) > 1
    numerator, _, denominator = eps.partition("/")
    model = load(run)
    assert any(one.before != one.after for one in found.images)
    for one in found.images:
        row = rows[one.sample, one.attack]
        assert (row.verdict, row.label, row.predicted) == ("held" if one.held else "broken", one.label, one.predicted)
        before = names[: names.index(one.attack)]
        others = [rows[one.sample, name].verdict for name in (names if one.held else before)]
        assert set(others) <= {"held"}
        assert np.abs(one.x_adv - one.x).max() <= int(numerator) / int(denominator or 1) + 1e-6
        clean, attacked = routed(model, torch.from_numpy(one.x)[None]), routed(model, torch.from_numpy(one.x_adv)[None])
        assert int(clean.logits.argmax()) == one.label and int(attacked.logits.argmax()) == one.predicted
        told = tuple(int(leaf.experts[0, 0]) for answer in (clean, attacked) for leaf in leaves(answer.route))
        assert told == (*one.before, *one.after)


def test_every_class_that_was_broken_is_shown(run: Path, tmp_path: Path) -> None:
    folder = evaluated(run, "pgd-3", tmp_path / "e")
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        broken = [row for row in ledger.rows() if row.verdict == "broken" and row.attack == "pgd-3"]
    labels = {row.label for row in broken}
    # the first images alone would not show them all
    assert 1 < len(labels) <= BROKEN < len(broken)
    shown = [one for one in kept(folder).images if not one.held]
    assert {one.label for one in shown} == labels and len(shown) == BROKEN


def test_neither_batch_size_nor_the_time_changes_a_byte(run: Path, tmp_path: Path) -> None:
    files = []
    for name, size in (("a", 64), ("b", 7)):
        evaluate_run(run, tmp_path / name, EvaluationConfig(protocol="fgsm", n=20, checks=0, batch_size=size))
        files.append((tmp_path / name / GALLERY_NAME).read_bytes())
    first, second = (kept(tmp_path / name) for name in "ab")
    assert [one.sample for one in first.images] == [one.sample for one in second.images]
    evaluate_run(run, tmp_path / "c", EvaluationConfig(protocol="fgsm", n=20, checks=0))
    assert (tmp_path / "c" / GALLERY_NAME).read_bytes() == files[0]


def test_released_attacks_are_not_shown(run: Path, tmp_path: Path) -> None:
    found = kept(evaluated(run, "fgsm, pgd-released-2", tmp_path / "e"))
    assert {one.attack for one in found.images} == {"fgsm"}


def test_the_manifest_vouches_for_the_images(run: Path) -> None:
    config = EvaluationConfig(protocol="fgsm", n=120, checks=0)
    folder = evaluation_folder(run, config)
    evaluate_run(run, folder, config)
    assert GALLERY_NAME in (folder / "MANIFEST.json").read_text()
