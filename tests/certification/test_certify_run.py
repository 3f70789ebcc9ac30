"""`phalanx certify`: a folder of its own, made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.cli import main
from phalanx.runs import RunFolder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certify") / "run"
    settings = ["training.epochs=1", "data.train_limit=200", "validation.n=20", "threat.eps=1/32"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        sets = [word for setting in settings for word in ("--set", setting)]
        patch.setattr(sys, "argv", ["phalanx", "train", "digits-at", "--out", str(folder), *sets])
        main()
    return folder


def test_certificates_are_written_and_printed(phalanx: Run, run: Path) -> None:
    code, out, err = phalanx("certify", run, "--norm", "linf", "--method", "lipschitz", "--n", 30)
    assert code == 0, err
    folder = run / "certificates" / "Linf-lipschitz-best-30"
    assert "certified accuracy, Linf, method lipschitz, 30 images" in out and "8/255" in out and str(folder) in out
    record = json.loads((folder / "certificates.json").read_text())
    assert record["schema"] == 1 and record["sound"] is True and record["norm"] == "Linf"
    assert len(record["radii"]) == len(record["reasons"]) == len(record["limits"]) == len(record["ids"]) == 30
    assert sum(record["counts"].values()) == 30 and len(record["model_sha256"]) == 64
    shares = [at["certified"] for at in record["grid"]]
    assert shares == sorted(shares, reverse=True) and shares[0] == record["counts"]["certified"]
    pairs = list(zip(record["radii"], record["reasons"], strict=True))
    for at in record["grid"]:
        assert at["low"] <= at["certified"] / 30 <= at["high"]
        held = sum(radius >= at["radius"] and why == "certified" for radius, why in pairs)
        assert at["certified"] == held
    assert RunFolder(folder).status() == "finished"


def test_what_is_made_is_read(phalanx: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("certify", run, "--method", "lipschitz", "--n", 10)
    _, first, _ = phalanx(*asked)
    monkeypatch.setattr("phalanx.workflow.certifying.certify", lambda *_, **__: pytest.fail("made again"))
    code, second, _ = phalanx(*asked)
    assert code == 0 and first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--norm", "L7"), "norm must be one of"),
        (("--method", "power"), "method must be one of"),
        (("--weights", "first"), "must be best or last"),
    ],
)
def test_mistakes_are_told(phalanx: Run, run: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = phalanx("certify", run, *arguments)
    assert code == 2 and message in err
    assert not any("L7" in path.name or "power" in path.name for path in run.rglob("*"))


def test_a_run_that_is_not_there(phalanx: Run, tmp_path: Path) -> None:
    code, _, err = phalanx("certify", tmp_path / "none")
    assert code == 2 and "does not exist" in err
