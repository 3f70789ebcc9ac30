"""The command line: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx import __version__
from phalanx.cli import main
from phalanx.config import shipped_recipes

Run = Callable[..., tuple[int, str, str]]

TINY = [
    "--set", "training.epochs=1",
    "--set", "validation.n=20",
    "--set", "evaluation.protocol=pgd-2",
    "--set", "evaluation.n=40",
    "--set", "evaluation.checks=0",
]  # fmt: skip


def test_help_and_import_load_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys; sys.argv = ['phalanx', '--help']\n"
        "import phalanx\n"
        "from phalanx.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'pydantic', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for command in ("run", "train", "evaluate", "report", "recipes", "data", "Exit codes"):
        assert command in done.stdout


def test_version(phalanx: Run) -> None:
    assert phalanx("--version") == (0, f"phalanx {__version__}\n", "")


def test_recipes(phalanx: Run) -> None:
    code, listed, _ = phalanx("recipes", "list")
    assert code == 0 and {line.split()[0] for line in listed.splitlines()} == set(shipped_recipes())
    assert phalanx("recipes", "show", "digits-at")[1] == shipped_recipes()["digits-at"].read_text()
    code, shown, _ = phalanx("recipes", "show", "digits-at", "--resolved", "--set", "model.experts=8")
    assert code == 0 and "experts: 8" in shown and "momentum" not in shown and "temperature: 1.0" in shown
    code, shown, _ = phalanx("recipes", "show", "quickstart", "--resolved")
    assert code == 0 and "adversarial_share: 1.0" in shown and "eps: 3/16" in shown
    code, schema, _ = phalanx("recipes", "schema")
    assert code == 0 and "method" in json.loads(schema)["properties"]


def test_data(phalanx: Run, tmp_path: Path) -> None:
    code, text, _ = phalanx("data", "describe", "digits")
    assert code == 0 and json.loads(text)["shape"] == [1, 8, 8]
    assert phalanx("data", "check", "digits")[0] == 0
    (tmp_path / "only").mkdir()
    code, _, err = phalanx("data", "check", f"folder:{tmp_path}")
    assert code == 2 and err.startswith("error: ") and str(tmp_path) in err


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished study."""
    folder = tmp_path_factory.mktemp("cli") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["phalanx", "run", "quickstart", "--out", str(folder), *TINY])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code
    return folder


def test_run_writes_the_report_and_repeats_nothing(phalanx: Run, study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.safetensors")}
    code, out, err = phalanx("run", "quickstart", "--out", study, *TINY)
    assert code == 0 and before
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*.safetensors")} == before
    assert "st: skipped" in err and "at.evaluation: skipped" in err
    assert "n = 40" in out or "40" in out
    assert out.splitlines()[-1] == f"report: {study / 'report.html'}"
    assert (study / "report.html").is_file() and json.loads((study / "table.json").read_text())


def test_several_seeds_make_one_table_and_resume(phalanx: Run, tmp_path: Path) -> None:
    small = ["digits-at", "--out", tmp_path, *TINY]
    code, out, err = phalanx("run", *small, "--seeds", "3")
    # one seed has no deviation: its number and its interval
    assert code == 0 and "±" not in out and "95 % interval" in out
    code, out, err = phalanx("run", *small, "--seeds", "3,4")
    assert code == 0 and "seed 3\ndigits-at: skipped" in err and "seed 4\ndigits-at: running" in err
    assert "±" in out and "mean ± sample standard deviation of 2 seeds (3, 4)" in " ".join(out.split())
    table = json.loads((tmp_path / "table.json").read_text())
    own = [json.loads((tmp_path / f"seed-{seed}" / "table.json").read_text())["rows"] for seed in (3, 4)]
    held = [row["worst_case"]["held"] for (row,) in own]
    assert table["rows"][0]["columns"]["worst"]["held"] == held and table["seeds"] == [3, 4]
    assert table["command"].endswith(f"--out {tmp_path} --seeds 3,4") and (tmp_path / "report.html").is_file()


def test_a_papers_table_over_seeds_has_its_own_place(phalanx: Run, tmp_path: Path) -> None:
    some = ["dual/table1", "--out", tmp_path, *TINY, "--set", "evaluation.analysis=null"]
    code, out, err = phalanx("reproduce", *some, "--seeds", "0,1")
    assert code == 0, err
    assert out.splitlines()[-1] == f"report: {tmp_path / 'tables/dual-table1/report.html'}"
    table = json.loads((tmp_path / "tables/dual-table1/table.json").read_text())
    (row,) = table["rows"]
    assert row["reported"]["SA"] == 92.14 and len(row["columns"]["SA"]["held"]) == 2
    assert (tmp_path / "seed-1/tables/dual-table1/report.html").is_file()
    assert "reported" in out and "92.14" in out


def test_another_setting_is_refused_in_the_same_folder_and_fresh_starts_again(
    phalanx: Run, study: Path, tmp_path: Path
) -> None:
    code, _, err = phalanx("run", "quickstart", "--out", study, *TINY, "--set", "seed=1")
    assert code == 2 and "seed" in err and "--out" in err
    code, out, _ = phalanx("train", "digits-st", "--out", tmp_path / "st", *TINY)
    assert (code, out) == (0, f"run: {tmp_path / 'st'}\n")
    code, _, err = phalanx("train", "digits-st", "--out", tmp_path / "st", *TINY, "--set", "seed=1", "--fresh")
    assert code == 0, err


def test_evaluate_and_report_of_a_run(phalanx: Run, study: Path, tmp_path: Path) -> None:
    asked = ["--protocol", "fgsm,pgd-2x2-margin", "--n", "30", "--weights", "last", "--no-checks"]
    code, out, _ = phalanx("evaluate", study / "at", *asked)
    assert code == 0
    lines = out.splitlines()
    heads = ["clean", "fgsm", "pgd-2x2-margin", "worst", "threats", "the", "evaluation:"]
    assert [line.split()[0] for line in lines] == heads
    assert all("n = 30" in line and "[" in line for line in lines[:4])
    assert phalanx("evaluate", study / "at", *asked)[1] == out
    code, out, _ = phalanx("report", study, study / "at", "--out", tmp_path)
    assert code == 0 and (tmp_path / "report.html").is_file()
    asked = ["--out", tmp_path / "tables", "--format", "csv,latex", "--format", "markdown"]
    code, out, _ = phalanx("report", study / "at", *asked)
    files = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    assert code == 0 and sorted(files) == ["table.csv", "table.md", "table.tex"] and f"table.csv: {tmp_path}" in out
    assert phalanx("report", study / "at", *asked)[0] == 0
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    code, _, err = phalanx("report", study / "at", "--format", "pdf")
    assert code == 2 and "--format must be among html" in err


def test_an_attack_outside_the_threat_is_printed_and_counts_for_nothing(phalanx: Run, study: Path) -> None:
    def shares(protocol: str) -> dict[str, str]:
        code, out, _ = phalanx("evaluate", study / "at", "--protocol", protocol, "--n", "30", "--no-checks")
        assert code == 0
        rates = (line.partition("  broke ")[0] for line in out.splitlines() if "%" in line)
        return {line.split()[0]: line[line.index("%") - 5 :] for line in rates}

    alone, wider = shares("fgsm"), shares("fgsm,fgsm:0.9")
    assert wider["fgsm:0.9"] != wider["fgsm"] == alone["fgsm"] == wider["worst"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikstart"], "no recipe is named 'quikstart'; there are "),
        (["run", "missing.yaml"], "missing.yaml does not exist"),
        (["train", "digits-at", "--set", "model.exprts=3"], "model.exprts: no such key; did you mean 'experts'?"),
        (["train", "digits-at", "--set", "threat.eps=8/0"], "'8/0'"),
        (["train", "digits-at", "--set", "model.top_k=9"], "model.top_k: must be in 1..experts=4"),
        (["train", "digits-at", "--set", "model.expert=mpl"], "'timm:MODEL' or 'module:factory', got 'mpl'"),
        (["train", "digits-at", "--set", "model.options.depth=3"], "has no option 'depth'"),
        (["train", "digits-at", "--set", "training.batch_size=5000"], "lower it"),
        (["train", "digits-at", "--set", "evaluation.protocol=aa"], "protocol has no attack 'aa'"),
        (["train", "digits-at", "--set", "device=cuda:7"], "device"),
        (["run", "digits-at", "--seeds", "1,2,1"], "--seeds names 1 twice"),
        (["run", "digits-at", "--seeds", "0,a"], "--seeds must be whole numbers in 0..2**31 - 1 joined by commas"),
        (["run", "digits-at", "--seeds", "-1"], "got '-1'"),
        (["reproduce", "dual/table1", "--seeds", "2147483648"], "got '2147483648'"),
        (["run", "digits-at", "--seeds", ""], "got ''"),
        (["run", "digits-at", "--seeds", "0,1", "--set", "seed=3"], "--seeds and --set seed=N both choose the seed"),
        (["reproduce", "dwf/table3-svhn"], "dwf/table3-svhn cannot be made at --scale digits, only at reduced or full"),
        (["train", "digits-at", "--set", "data.name=folder:nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere is no folder"),
        (["data", "describe", "folder:nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    phalanx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = phalanx(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unknown_options_exit_with_2(phalanx: Run) -> None:
    assert phalanx("train", "digits-at", "--epochs", "3")[0] == 2
    assert phalanx("frobnicate")[0] == 2
