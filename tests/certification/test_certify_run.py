"""`phalanx certify`: a folder of its own, made once."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.bounds import output_lipschitz
from phalanx.certification import write_constants
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


def test_constants_are_made_once(phalanx: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*given: Any) -> Tensor:
        made.append(1)
        return output_lipschitz(*given)

    def certified(*options: object) -> dict[str, Any]:
        made.clear()
        shutil.rmtree(run / "certificates" / "L1-ibp-best-10", ignore_errors=True)
        assert phalanx("certify", run, "--norm", "L1", "--n", 10, *options)[0] == 0
        method = options[1] if options else "auto"
        return dict(json.loads((run / "certificates" / f"L1-{method}-best-10" / "certificates.json").read_text()))

    monkeypatch.setattr("phalanx.certification.networks.output_lipschitz", counted)
    first = certified()
    kept = run / "certificates" / "constants-L1-best.json"
    # four experts and their router
    assert len(made) == 5 and kept.exists()
    other = certified("--method", "ibp")
    assert not made and other["constants"] == first["constants"]
    # what was altered is made again, and so is another model's
    sound = kept.read_bytes()
    record = json.loads(sound)
    record["constants"]["router"][0][1] = 1e-9
    kept.write_text(json.dumps(record))
    assert certified("--method", "ibp")["constants"] == first["constants"] and len(made) == 5
    assert kept.read_bytes() == sound
    write_constants(kept, "0" * 64, "L1", {"router": torch.zeros(4, 4)})
    assert certified("--method", "ibp")["constants"] == first["constants"] and len(made) == 5


def test_the_exact_rule_has_a_folder_of_its_own(phalanx: Run, run: Path) -> None:
    asked = ("certify", run, "--method", "lipschitz", "--n", 10)
    assert phalanx(*asked, "--reachable", "exact")[0] == phalanx(*asked)[0] == 0
    records = [
        json.loads((run / "certificates" / f"L2-lipschitz{rule}-best-10" / "certificates.json").read_text())
        for rule in ("-exact", "")
    ]
    assert [record["reachable"] for record in records] == ["exact", "pairwise"]
    assert all(a >= b * (1 - 1e-9) for a, b in zip(*(record["radii"] for record in records), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--norm", "L7"), "norm must be one of"),
        (("--reachable", "some"), "reachable must be one of pairwise, exact"),
        (("--reachable", "exact", "--method", "smoothing"), "is not for --method smoothing"),
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


TINY = ["--set", "training.epochs=1", "--set", "data.train_limit=200", "--set", "validation.n=20"]


def test_a_recipe_that_says_so_is_certified_and_its_headline_is_threefold(phalanx: Run, tmp_path: Path) -> None:
    asked = ["--set", "threat.eps=1/64", "--set", "evaluation.n=20", "--set", "evaluation.protocol=pgd-2"]
    told = ["run", "digits-at", "--out", tmp_path, *TINY, *asked, "--set", "evaluation.checks=0"]
    code, _, err = phalanx(*told, "--set", "evaluation.certify=ibp")
    assert code == 0, err
    record = json.loads((tmp_path / "digits-at/certificates/Linf-ibp-best-20/certificates.json").read_text())
    assert len(record["radii"]) == 20
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    parts = row["threefold"]
    assert parts["broken"] + parts["certified"] + parts["undecided"] == parts["n"] == 20
    # what is bound to certificates is not read as if there were none
    code, _, err = phalanx(*told)
    assert code == 2 and "certify" in err


def test_what_has_no_bound_is_refused_before_it_is_trained(phalanx: Run, tmp_path: Path) -> None:
    asked = ["--set", "model.router.name=cnn", "--set", "evaluation.certify=auto", "--set", "model.experts=2"]
    layered = ["train", "digits-advmoe", "--out", tmp_path / "a", *TINY, "--set", "evaluation.certify=auto"]
    code, _, err = phalanx(*layered)
    assert code == 2 and "evaluation.certify" in err and "layers are routed one by one" in err
    assert not (tmp_path / "a").exists()
    code, _, err = phalanx("train", "digits-at", "--out", tmp_path / "b", *TINY, *asked)
    assert code == 0, err
