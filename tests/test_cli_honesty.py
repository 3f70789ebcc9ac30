"""The honesty checks where a user meets them: after the table of an evaluation, in its folder, in the exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.cli import main
from phalanx.evaluation.honesty import CHECKS, LEFT_OUT, Honesty
from phalanx.runs import RunFolder
from phalanx.workflow import measuring

Run = Callable[..., tuple[int, str, str]]
TINY = ["training.epochs=1", "validation.n=20", "threat.eps=1/32", "evaluation.n=12", "evaluation.analysis=null"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        sets = [word for setting in TINY for word in ("--set", setting)]
        patch.setattr(sys, "argv", ["phalanx", "train", "digits-at", "--out", str(folder), *sets])
        main()
    return folder


def test_a_sound_evaluation_says_what_was_checked(phalanx: Run, run: Path, tmp_path: Path) -> None:
    asked = ["evaluate", run, "--protocol", "pgd-10,steer-5", "--n", 12, "--out", tmp_path / "out"]
    code, out, err = phalanx(*asked)
    assert code == 0, out + err
    assert "honesty checks on 12 images:" in out and "FAIL" not in out
    record = json.loads((tmp_path / "out" / "honesty.json").read_text())
    assert [check["id"] for check in record["checks"]] == [check.id for check in CHECKS]
    assert phalanx(*asked)[:2] == (0, out)


def test_a_failure_is_exit_code_7_and_the_evaluation_is_kept(phalanx: Run, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = ["evaluate", run, "--protocol", "pgd-10", "--n", 12, "--out", folder]
    code, out, err = phalanx(*asked)
    assert code == 7 and "FAIL E16 planted route" in out and "honesty checks failed (E16)" in err
    assert RunFolder(folder).status() == "finished" and "worst case per image" in out
    assert phalanx(*asked)[0] == 7


def test_certificates_that_the_run_holds_are_compared(phalanx: Run, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")

    def told(out: str) -> str:
        phalanx("evaluate", copy, "--protocol", "pgd-10,steer-5", "--n", 12, "--out", tmp_path / out)
        (found,) = (c for c in json.loads((tmp_path / out / "honesty.json").read_text())["checks"] if c["id"] == "E19")
        return str(found["status"])

    code, out, err = phalanx("certify", copy, "--norm", "linf", "--method", "lipschitz", "--n", 12)
    assert code == 0, out + err
    assert told("sound") == "pass"
    (path,) = copy.glob("certificates/*/certificates.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "radii": [1.0] * 12, "reasons": ["certified"] * 12}))
    assert told("unsound") == "fail"


def test_checks_take_no_larger_batches(
    phalanx: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def seen(*given: Any, batch_size: int, **options: Any) -> Honesty:
        sizes.append(batch_size)
        return LEFT_OUT

    monkeypatch.setattr(measuring, "run_checks", seen)
    phalanx("evaluate", run, "--protocol", "fgsm", "--n", 12, "--batch-size", 5, "--out", tmp_path / "out")
    assert sizes == [5]


def test_checks_can_be_left_out_and_that_is_said(phalanx: Run, run: Path, tmp_path: Path) -> None:
    code, out, _ = phalanx("evaluate", run, "--protocol", "pgd-10", "--n", 12, "--no-checks", "--out", tmp_path / "out")
    assert code == 0 and "the honesty checks were left out (--no-checks)" in out
    assert json.loads((tmp_path / "out" / "honesty.json").read_text())["samples"] == 0


def test_a_study_fails_as_its_rows_do(phalanx: Run, tmp_path: Path) -> None:
    sets = [word for setting in [*TINY, "evaluation.protocol=pgd-10"] for word in ("--set", setting)]
    code, out, err = phalanx("run", "digits-at", "--out", tmp_path / "study", *sets)
    assert code == 7 and "E16" in err and "FAIL" in out and (tmp_path / "study" / "report.html").is_file()
