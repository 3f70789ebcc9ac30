"""`phalanx certify --method smoothing`: a folder of its own, made once, whatever interrupts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.certification import Smoothing
from phalanx.cli import main
from phalanx.config import EvaluationConfig
from phalanx.errors import CorruptError, InputError
from phalanx.runs import RunFolder
from phalanx.runs.atomic import InjectedFault
from phalanx.workflow import smooth_run, smoothed_folder

Run = Callable[..., tuple[int, str, str]]
N = 6
CONFIG = EvaluationConfig(n=N, batch_size=50)
SMOOTHING = Smoothing(samples=60, selection_samples=20, sigma=0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoothing") / "run"
    settings = ["training.epochs=1", "data.train_limit=200", "validation.n=20"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        sets = [word for setting in settings for word in ("--set", setting)]
        patch.setattr(sys, "argv", ["phalanx", "train", "digits-smoothing", "--out", str(folder), *sets])
        main()
    return folder


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made without interruption."""
    folder, record = smooth_run(run, CONFIG, SMOOTHING, tmp_path_factory.mktemp("whole") / "made")
    assert record is not None and RunFolder(folder).status() == "finished"
    return folder


def _same_files(one: Path, other: Path) -> None:
    for name in ("votes.jsonl", "smoothed.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_certificates_are_written_and_printed(phalanx: Run, run: Path) -> None:
    asked = ["--method", "smoothing", "--sigma", 0.3, "--samples", 200, "--selection-samples", 20, "--n", 4]
    code, out, err = phalanx("certify", run, *asked, "--confidence", 0.99)
    assert code == 0, err
    folder = run / "certificates" / "L2-smoothing-0.3-200-best-4"
    assert "of the smoothed classifier, L2, 4 images: sigma 0.3, 20 + 200 noisy copies" in out and str(folder) in out
    assert "with probability 0.99" in out and "without noise it says nothing" in out
    record = json.loads((folder / "smoothed.json").read_text())
    assert record["method"] == "smoothing" and record["norm"] == "L2" and record["confidence"] == 0.99
    assert len(record["radii"]) == len(record["predicted"]) == len(record["reasons"]) == len(record["ids"]) == 4
    assert sum(record["counts"].values()) == 4 and record["grid"][0]["certified"] == record["counts"]["certified"]
    # what the report reads as certificates of the model itself is another file
    assert not list(folder.glob("certificates.json"))
    again = phalanx("certify", run, *asked, "--confidence", 0.99)
    assert again == (0, out, "")


def test_a_stopped_run_goes_on_to_the_same_files(run: Path, whole: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for done in range(1, N):
        folder, record = smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made", seconds=1e-9, announce=told.append)
        assert record is None and RunFolder(folder).status() == "interrupted"
        assert len((folder / "votes.jsonl").read_text().splitlines()) == done
    assert told[0].startswith("5 images more take about ")
    folder, record = smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made")
    assert record is not None
    _same_files(folder, whole)


def test_a_kill_loses_one_image(run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made", seconds=1e-9)
    monkeypatch.setenv("PHALANX_FAILPOINT", "metrics.append:raise")
    with pytest.raises(InjectedFault):
        smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made")
    monkeypatch.delenv("PHALANX_FAILPOINT")
    # a line torn by the kill
    with (tmp_path / "made" / "votes.jsonl").open("a") as file:
        file.write('{"apart":[],"counts":[1,')
    folder, _ = smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made")
    _same_files(folder, whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace('"winner":', '"loser":'), *lines[1:]],
        lambda lines: [lines[0].replace('"counts":[', '"counts":[1,'), *lines[1:]],
        lambda lines: [lines[0].replace('"winner":', '"winner":9'), *lines[1:]],
    ],
)
def test_votes_that_are_not_this_images_are_refused(
    run: Path, tmp_path: Path, change: Callable[[list[str]], list[str]]
) -> None:
    for _ in range(2):
        smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made", seconds=1e-9)
    path = tmp_path / "made" / "votes.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(CorruptError, match="line 1: not the votes on image"):
        smooth_run(run, CONFIG, SMOOTHING, tmp_path / "made")


def test_other_settings_are_another_folder(run: Path, whole: Path) -> None:
    assert smoothed_folder(run, CONFIG, SMOOTHING) != smoothed_folder(run, CONFIG, Smoothing(samples=60, sigma=0.5))
    with pytest.raises(InputError, match=r"smoothing\.seed"):
        smooth_run(run, CONFIG, Smoothing(samples=60, selection_samples=20, sigma=0.3, seed=1), whole)


def test_a_model_of_someone_elses(phalanx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_model.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = ["--method", "smoothing", "--samples", 50, "--selection-samples", 10, "--n", 3, "--confidence", 0.9]
    # weights drawn at random would be another model each time
    code, out, err = phalanx("certify", "--model", "their_model:build", "--data", "digits", *asked)
    assert code == 0, err
    (folder,) = (tmp_path / "certificates").iterdir()
    assert folder.name == "their_model.build-L2-smoothing-0.25-50-best-3" and "3 images" in out
    code, _, err = phalanx("certify", "--model", "their_model:build", "--data", "digits")
    assert code == 2 and "--model is for --method smoothing" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "smoothing", "--norm", "Linf"), "use norm L2"),
        (("--method", "smoothing", "--sigma", 0), "sigma must be positive"),
        (("--method", "smoothing", "--samples", 5), "even a unanimous vote"),
        (("--method", "smoothing", "--smoothed", "robust"), "which a dual model of probabilities has"),
        (("--method", "smoothing", "--weights", "first"), "must be best or last"),
        (("--method", "smoothing", "--time-budget", "soon"), "a time is written"),
        (("--method", "smoothing", "--model", "a:b"), "and not both"),
        (("--sigma", 0.25), "--sigma is for --method smoothing"),
        (("--selection-samples", 10), "--selection-samples is for --method smoothing"),
        (("--time-budget", "10s"), "--time-budget is for --method smoothing"),
    ],
)
def test_mistakes_are_told(phalanx: Run, run: Path, arguments: tuple[object, ...], message: str) -> None:
    before = set(run.rglob("*"))
    code, _, err = phalanx("certify", run, *arguments)
    assert code == 2 and message in err
    assert set(run.rglob("*")) == before


def test_neither_a_run_nor_a_model(phalanx: Run) -> None:
    code, _, err = phalanx("certify", "--method", "smoothing")
    assert code == 2 and "give either a run's folder or --model" in err
    code, _, err = phalanx("certify")
    assert code == 2 and "give its folder" in err
