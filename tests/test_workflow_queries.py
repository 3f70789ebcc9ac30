"""What an evaluation writes about query attacks and targeted success, and that its report reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import children

from phalanx.config import EvaluationConfig
from phalanx.evaluation import protocol
from phalanx.evaluation.targeted import Targeted
from phalanx.report import RowSource, build_page, render_html
from phalanx.workflow import evaluate_run, measuring


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    children.train(folder)
    return folder


def test_the_curves_of_an_evaluation(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    found = evaluate_run(run, folder, EvaluationConfig(protocol="rays-200,hsj-100", n=20, checks=0))
    assert found is not None
    record = json.loads((folder / measuring.QUERIES_NAME).read_text())
    assert [curve["attack"] for curve in record["curves"]] == ["hsj-100", "rays-200"] and not record["left_out"]
    assert all(curve["n"] == 20 for curve in record["curves"])
    last = {curve["attack"]: curve["points"][-1]["held"] for curve in record["curves"]}
    assert last == {attack.attack: attack.held for attack in found.summary.attacks}
    assert not (folder / measuring.TARGETED_NAME).exists()
    page = build_page("A", "", [RowSource("A", run, folder)], "phalanx report")
    assert "Robust accuracy against queries" in render_html(page)


def test_an_evaluation_without_query_attacks_has_none(run: Path, tmp_path: Path) -> None:
    evaluate_run(run, tmp_path / "evaluation", EvaluationConfig(protocol="fgsm", n=5, checks=0))
    assert not (tmp_path / "evaluation" / measuring.QUERIES_NAME).exists()


def test_targeted_success_belongs_to_thorough(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(model: object, images: object, threat: object, **settings: object) -> Targeted:
        asked.append(settings["num_classes"])
        return Targeted("targeted apgd-100", 1, 0, 0, 0, ((0, 1, 1, 0),))

    monkeypatch.setattr(measuring, "targeted_success", measured)
    # the suite itself is tested elsewhere
    monkeypatch.setattr(measuring, "protocol_for", lambda name, threat, *rest: protocol("fgsm", threat))
    config = EvaluationConfig(protocol="fgsm,thorough", n=5, checks=0, attribution=False)
    evaluate_run(run, tmp_path / "evaluation", config)
    assert asked == [10] and json.loads((tmp_path / "evaluation" / "targeted.json").read_text())["n"] == 1
