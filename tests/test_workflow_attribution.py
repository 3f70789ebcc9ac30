"""attribution.json: when an evaluation writes it, what it says, and what a report makes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from phalanx.config import EvaluationConfig, RunConfig, load_run
from phalanx.report import build_page, render_html, to_json
from phalanx.report.attribution import read_attribution
from phalanx.threat import ThreatModel
from phalanx.workflow import evaluate_run, evaluation_folder, find_rows, train_run
from phalanx.workflow.evaluating import evaluation_record
from phalanx.workflow.measuring import ATTRIBUTION_NAME

TINY = (
    "data.train_limit=100",
    "data.val_limit=20",
    "data.test_limit=30",
    "model.options.hidden=[8]",
    "training.epochs=2",
    "training.batch_size=32",
    "validation.protocol=fgsm",
    "method.attack.steps=1",
    "device=cpu",
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _trained(folder: Path, experts: int) -> Path:
    config: RunConfig = load_run("digits-at", (*TINY, f"model.experts={experts}")).value
    train_run(config, folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("runs") / "mixture", 2)


@pytest.fixture
def run(mixture: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixture, tmp_path / "run"))


def _evaluated(run: Path, protocol: str, **settings: Any) -> Path:
    config = EvaluationConfig(protocol=protocol, n=12, **settings)
    folder = evaluation_folder(run, config)
    evaluate_run(run, folder, config)
    return folder


@pytest.mark.parametrize(
    ("protocol", "attribution", "written"),
    [
        ("routing-1", None, True),
        ("fgsm, routing-1", None, True),
        ("fgsm", None, False),
        ("fgsm", True, True),
        ("routing-1", False, False),
    ],
)
def test_when_it_is_written(run: Path, protocol: str, attribution: bool | None, written: bool) -> None:
    folder = _evaluated(run, protocol, attribution=attribution)
    assert (folder / ATTRIBUTION_NAME).is_file() == written


def test_a_single_network_has_no_router_to_blame(tmp_path: Path) -> None:
    folder = _evaluated(_trained(tmp_path / "single", 1), "fgsm", attribution=True)
    assert not (folder / ATTRIBUTION_NAME).exists()
    (source,) = find_rows([tmp_path / "single"])
    page = build_page("Single", "", [source], "phalanx report")
    assert page.rows[0].attribution is None and "Who is to blame" not in render_html(page)


def test_what_is_written_is_what_a_report_tells(run: Path) -> None:
    folder = _evaluated(run, "routing-1")
    record = json.loads((folder / ATTRIBUTION_NAME).read_bytes())
    found = read_attribution(folder / ATTRIBUTION_NAME)
    assert found is not None and (found.n, found.attack) == (12, "pgd-20")
    assert found.broken == record["blame"]["broken"] == sum(blame.n for blame in found.blame[:-1]) + found.lost
    (source,) = find_rows([run])
    page = build_page("Mixture", "", [source], "phalanx report")
    (row,) = page.rows
    assert row.worst is not None and found.whole.held == row.worst.held
    assert found.broken == row.clean.held - row.worst.held
    text = render_html(page)
    for title in ("Who is to blame", "Robust accuracy taken apart", "Transfer between experts", "Gates by radius"):
        assert f"<h4>{title}</h4>" in text
    assert to_json(page)["rows"][0]["attribution"]["whole"] == {"held": found.whole.held, "n": 12}


def test_folders_from_before_it_stay_what_they_are() -> None:
    threat = ThreatModel()
    assert "attribution" not in evaluation_record(EvaluationConfig(), threat, 0)
    assert evaluation_record(EvaluationConfig(attribution=True), threat, 0)["attribution"] is True
