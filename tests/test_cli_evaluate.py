"""The commands that measure: standard evaluations, shards, other people's models, comparisons, adversarial images."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from foreign_models import Crowded, linear
from phalanx.cli import main
from phalanx.errors import HonestyError
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.sidecar import write_protected

Run = Callable[..., tuple[int, str, str]]

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    settings = ["training.epochs=1", "validation.n=20", "threat.eps=1/32"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        sets = [word for setting in settings for word in ("--set", setting)]
        patch.setattr(sys, "argv", ["phalanx", "train", "digits-at", "--out", str(folder), *sets])
        main()
    return folder


SUITE = "fgsm,pgd-3"


def evaluated(phalanx: Run, folder: Path, *arguments: object) -> tuple[str, str]:
    code, out, err = phalanx("evaluate", *arguments, "--no-checks", "--out", folder)
    assert code == 0, err
    return out, err


def test_standard_is_estimated_and_told_attack_by_attack(phalanx: Run, run: Path) -> None:
    code, out, err = phalanx("evaluate", run, "--protocol", "standard", "--n", 6, "--no-checks")
    assert code == 0 and err.startswith("about ") and "apgd-100 " in err and "square-5000 " in err
    lines = out.splitlines()
    assert lines[1].startswith("apgd-100 (Linf 1/32)") and lines[2].startswith("then apgd-t-100x9 (Linf 1/32)")
    assert lines[4].startswith("then square-5000") and lines[5].startswith("worst case per image")
    broke = [line.partition("broke ")[2].split(" of ") for line in lines[1:5]]
    for (broken, tried), (_, after) in itertools.pairwise(broke):
        assert int(tried) - int(broken) == int(after)
    code, report, _ = phalanx("report", run)
    assert code == 0 and "after apgd-t-100x9" in report


def test_a_time_budget_gives_a_partial_answer_and_the_same_command_goes_on(
    phalanx: Run, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    asked = [run, "--protocol", SUITE, "--n", 12, "--batch-size", 4]
    out, _ = evaluated(phalanx, folder, *asked, "--time-budget", "0.000001s")
    assert "not finished: 4 of 12 images begun" in out and "worst case, at most" in out
    assert RunFolder(folder).status() == "interrupted"
    code, _, err = phalanx("compare", folder, folder)
    assert code == 2 and "is not finished: 4 of 12 images begun" in err
    out, _ = evaluated(phalanx, folder, *asked)
    assert "not finished" not in out and "n = 12" in out and RunFolder(folder).status() == "finished"


def test_an_interrupted_evaluation_answers_too(
    phalanx: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from phalanx.console import ConsoleReporter

    def stop(self: ConsoleReporter, done: int, total: int, note: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ConsoleReporter, "progress", stop)
    asked = [run, "--protocol", SUITE, "--n", 12, "--batch-size", 4, "--out", tmp_path / "evaluation"]
    code, out, err = phalanx("evaluate", *asked)
    assert code == 143 and "not finished: 4 of 12 images begun" in out and "the same command goes on" in err


def test_shards_fill_one_folder(phalanx: Run, run: Path, tmp_path: Path) -> None:
    asked = [run, "--protocol", SUITE, "--n", 12]
    whole, _ = evaluated(phalanx, tmp_path / "whole", *asked)
    part, _ = evaluated(phalanx, tmp_path / "shards", *asked, "--shard", "1/2")
    assert "not finished" in part
    union, _ = evaluated(phalanx, tmp_path / "shards", *asked, "--shard", "2/2")
    assert union.splitlines()[:-1] == whole.splitlines()[:-1]


def test_two_evaluations_are_compared(phalanx: Run, run: Path, tmp_path: Path) -> None:
    one, two, other = tmp_path / "best", tmp_path / "last", tmp_path / "other"
    evaluated(phalanx, one, run, "--protocol", SUITE, "--n", 20)
    foreign = ["--model", "foreign_models:linear", "--data", "digits", "--eps", "1/32"]
    evaluated(phalanx, two, *foreign, "--protocol", SUITE, "--n", 20)
    code, out, err = phalanx("compare", one, two)
    assert code == 0, err
    assert "exact McNemar test" in out and [line.split()[0] for line in out.splitlines()[5:]] == [
        "SA", "RA", "fgsm", "pgd-3",
    ]  # fmt: skip
    code, out, _ = phalanx("compare", one, two, "--json")
    found = json.loads(out)["measures"]["RA"]
    rows = {}
    for name, folder in (("first", one), ("second", two)):
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            by_sample: dict[int, bool] = {}
            for row in ledger.rows():
                by_sample[row.sample] = by_sample.get(row.sample, True) and row.verdict == "held"
            rows[name] = by_sample
    both = [(rows["first"][sample], rows["second"][sample]) for sample in rows["first"]]
    assert found["only_first"] == both.count((True, False)) and found["only_second"] == both.count((False, True))
    evaluated(phalanx, other, run, "--protocol", "fgsm", "--n", 19)
    code, _, err = phalanx("compare", one, other)
    assert code == 2 and "do not compare: images: " in err and "attack pgd-3: only one has it" in err


def test_a_mixture_is_compared_with_a_single_network_under_one_protocol(
    phalanx: Run, run: Path, tmp_path: Path
) -> None:
    asked = ["--protocol", "quick", "--n", 20, "--no-attribution", "--no-checks"]
    evaluated(phalanx, tmp_path / "mixture", run, *asked)
    foreign = ["--model", "foreign_models:linear", "--data", "digits", "--eps", "1/32", "--protocol", "quick"]
    evaluated(phalanx, tmp_path / "single", *foreign, "--n", 20, "--no-checks")
    code, out, err = phalanx("compare", tmp_path / "mixture", tmp_path / "single")
    assert code == 0, err
    # what both have by itself, the whole of the protocol in RA
    assert [line.split()[0] for line in out.splitlines()[5:8]] == ["SA", "RA", "apgd-20"]
    assert "made for one kind of model" in out and "steer-apgd-20" in out
    code, out, _ = phalanx("compare", tmp_path / "mixture", tmp_path / "single", "--json")
    found = json.loads(out)
    assert "steer-apgd-20" in found["apart"] and "steer-apgd-20" not in found["measures"]


def test_someone_elses_model(phalanx: Run, tmp_path: Path) -> None:
    asked = ["--model", "foreign_models:linear", "--data", "digits", "--eps", "1/32", "--protocol", SUITE, "--n", 20]
    out, _ = evaluated(phalanx, tmp_path / "a", *asked)
    weights = {name: -tensor for name, tensor in linear().state_dict().items()}
    save_file(weights, tmp_path / "negative.safetensors")
    negative, _ = evaluated(phalanx, tmp_path / "b", *asked, "--weights", tmp_path / "negative.safetensors")
    assert out.splitlines()[0] != negative.splitlines()[0]
    # the folder is bound to the weights
    code, _, err = phalanx("evaluate", *asked, "--weights", tmp_path / "negative.safetensors", "--out", tmp_path / "a")
    assert code == 2 and "weights_sha256" in err
    assert evaluated(phalanx, tmp_path / "a", *asked)[0] == out


def test_a_finished_folder_is_not_believed_of_changed_code(
    phalanx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--model", "foreign_models:linear", "--data", "digits", "--protocol", "fgsm", "--n", 5]
    out, _ = evaluated(phalanx, tmp_path / "a", *asked)
    assert evaluated(phalanx, tmp_path / "a", *asked)[0] == out
    monkeypatch.setattr("foreign_models.linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    code, out, err = phalanx("evaluate", *asked, "--out", tmp_path / "a")
    assert code == 2 and "is finished, but of another model" in err and not out


@pytest.mark.parametrize("mistake", [["--model", "foreign_models:three_channels"], ["--protocol", "pdg-5"]])
def test_a_mistake_leaves_no_folder(phalanx: Run, tmp_path: Path, mistake: list[str]) -> None:
    asked = ["--model", "foreign_models:linear", "--data", "digits", "--protocol", "fgsm", "--n", 5]
    code, _, err = phalanx("evaluate", *asked, *mistake, "--out", tmp_path / "a")
    assert code == 2 and "Traceback" not in err and not (tmp_path / "a").exists()
    evaluated(phalanx, tmp_path / "a", *asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a run's folder or --model"),
        (["nowhere", "--model", "a:b"], "and not both"),
        (["--model", "foreign_models:linear"], "--model needs --data"),
        (["nowhere", "--data", "digits"], "--data is for --model: a run has its own"),
        (["nowhere", "--eps", "1/255"], "--eps is for --model"),
        (["nowhere", "--seed", "0"], "--seed is for --model"),
        (["--model", "foreign_models:linear", "--data", "digits", "--standard", "st"], "--standard is for a run"),
        (["--model", "foreign_models:linear", "--data", "digits", "--alpha", "0.5"], "--alpha is for a run"),
        (["nowhere", "--weights", "w.safetensors"], "a file goes with --model"),
        (["--model", "linear", "--data", "digits"], "must be 'module:function'"),
        (["--model", "nowhere_at_all:f", "--data", "digits"], "cannot import module 'nowhere_at_all'"),
        (["--model", "foreign_models:nothing", "--data", "digits"], "has no 'nothing'"),
        (["--model", "foreign_models:number", "--data", "digits"], "must return a torch.nn.Module, got int"),
        (["--model", "foreign_models:eleven", "--data", "digits"], "11 outputs and there are 10 classes"),
        (["--model", "foreign_models:probabilities", "--data", "digits"], "--allow probabilities"),
        (["--model", "foreign_models:three_channels", "--data", "digits"], "does not take images of shape (1, 8, 8)"),
        (["--model", "foreign_models:linear", "--data", "digits", "--weights", "w.pt"], "a .safetensors file"),
        (["--model", "foreign_models:linear", "--data", "digits", "--weights", "w.safetensors"], "there is no w.saf"),
        (["--model", "foreign_models:linear", "--data", "digits", "--eps", "8"], "is it 8/255?"),
        (["--model", "foreign_models:linear", "--data", "digits", "--norm", "L9"], "norm must be one of"),
        (["--model", "foreign_models:linear", "--data", "digits", "--shard", "3/2"], "a shard is i/k"),
        (["--model", "foreign_models:linear", "--data", "digits", "--time-budget", "soon"], "90s, 10m or 1h30m"),
        (["--model", "foreign_models:linear", "--data", "digits", "--allow", "all"], "allow can name probabilities"),
    ],
)
def test_mistakes(phalanx: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = phalanx("evaluate", *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and not out and err.startswith("error: ")


def test_a_model_with_more_outputs_than_classes_must_be_meant(phalanx: Run, tmp_path: Path) -> None:
    asked = ["--model", "foreign_models:eleven", "--data", "digits", "--protocol", "fgsm", "--n", 5, "--classes", 11]
    assert "n = 5" in evaluated(phalanx, tmp_path / "out", *asked)[0]


def test_adversarial_images_are_written_and_judged_again(phalanx: Run, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    asked = ["attack", run, "--attack", "pgd-3", "--n", 20, "--png", 5, "--out", folder]
    code, out, err = phalanx(*asked)
    assert code == 0, err
    with np.load(folder / "adversarial.npz", allow_pickle=False) as content:
        assert content["x_adv"].shape == (20, 1, 8, 8) and content["x_adv"].dtype == np.float32
        ids, predicted, labels = content["ids"], content["predicted"], content["y"]
    lines = list(csv.DictReader((folder / "verdicts.csv").open()))
    record = json.loads((folder / "verdicts.json").read_text())
    assert [int(line["sample"]) for line in lines] == ids.tolist() == [row["sample"] for row in record["verdicts"]]
    assert (predicted == labels).sum() == record["held"] and record["attack"]["name"] == "pgd-3"
    assert len(list((folder / "png").glob("*.png"))) == 5 and Image.open(next((folder / "png").glob("*"))).size == (
        8,
        8,
    )
    RunFolder(folder).verify()
    assert phalanx(*asked)[1] == out
    # the verdicts are the evaluation's
    evaluated(phalanx, tmp_path / "evaluation", run, "--protocol", "pgd-3", "--n", 20)
    with Ledger.read(tmp_path / "evaluation/ledger.sqlite") as ledger:
        judged = {row.sample: row.verdict for row in ledger.rows() if row.attack == "pgd-3"}
    assert judged == {row["sample"]: row["verdict"] for row in record["verdicts"] if row["sample"] in judged}


def test_a_verdict_that_the_file_does_not_reproduce_is_an_error(
    phalanx: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.workflow.attacking.load", lambda run, weights: Crowded())
    code, _, err = phalanx(
        "attack", run, "--attack", "fgsm", "--n", 20, "--batch-size", 20, "--out", tmp_path / "images"
    )
    assert code == HonestyError.exit_code == 7 and "depends on the batch" in err
    assert RunFolder(tmp_path / "images").status() == "running"


def test_an_answer_that_is_finite_in_one_batch_alone_is_an_error(
    phalanx: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x)
            return logits if len(x) == 20 else logits * float("nan")

    monkeypatch.setattr("phalanx.workflow.attacking.load", lambda run, weights: Overflowing())
    asked = ["attack", run, "--attack", "fgsm", "--n", 20, "--batch-size", 20, "--out", tmp_path / "images"]
    code, _, err = phalanx(*asked)
    assert code == HonestyError.exit_code and "20 of 20 images are judged otherwise" in err


def test_attacked_images_are_of_one_model_and_one_attack(phalanx: Run, run: Path, tmp_path: Path) -> None:
    own, folder = Path(shutil.copytree(run, tmp_path / "own")), tmp_path / "images"
    asked = ["attack", own, "--n", 4, "--png", 0, "--out", folder]
    code, _, err = phalanx(*asked, "--attack", "foo")
    assert code == 2 and "'foo'" in err and not folder.exists()
    assert phalanx(*asked, "--attack", "fgsm")[0] == phalanx(*asked, "--attack", "fgsm")[0] == 0
    write_protected(own / "model.json", (own / "model.json").read_bytes() + b"\n")
    RunFolder(own).finish()
    code, _, err = phalanx(*asked, "--attack", "fgsm")
    assert code == 2 and "is finished, but of another model" in err


def test_an_attack_command_takes_one_attack(phalanx: Run, run: Path, tmp_path: Path) -> None:
    code, _, err = phalanx("attack", run, "--attack", "standard", "--out", tmp_path / "images")
    assert code == 2 and "--attack must be one attack, got 'standard', which is 4" in err


def test_a_foreign_models_evaluation_is_reported(phalanx: Run, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    foreign = ["--model", "foreign_models:linear", "--data", "digits", "--eps", "1/32"]
    evaluated(phalanx, folder, *foreign, "--protocol", SUITE, "--n", 20)
    code, out, err = phalanx("report", folder)
    assert code == 0, err
    assert "foreign_models:linear" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "650 parameters, made elsewhere" in page
    # beside a run of our own
    evaluated(phalanx, run / "evaluations" / "own", run, "--protocol", SUITE, "--n", 20)
    code, out, err = phalanx("report", run, folder, "--out", tmp_path / "both")
    assert code == 0, err
    evaluated(phalanx, tmp_path / "apart", run, "--protocol", SUITE, "--n", 20)
    code, _, err = phalanx("report", tmp_path / "apart")
    assert code == 2 and "is the evaluation of a run; give the run's folder" in err


def test_quick_with_a_surrogate(phalanx: Run, run: Path, tmp_path: Path) -> None:
    arguments = (run, "--protocol", "quick", "--n", 6, "--surrogate", run, "--surrogate", "foreign_models:linear")
    folder = tmp_path / "quick"
    out, _ = evaluated(phalanx, folder, *arguments)
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        attacks = ledger.attacks()
    names = ["apgd-20", "steer-apgd-20", "apgd-20@straight-through", "transfer:run", "transfer:foreign_models:linear"]
    assert set(attacks) == set(names) and attacks[names[-1]]["after"] == names[:-1]
    assert len(attacks["transfer:run"]["surrogate_sha256"]) == 64
    assert f"then {names[-2]} (Linf 1/32)" in out or f"then {names[-2]}" in out
    # the same again is done already; another surrogate is another evaluation
    assert evaluated(phalanx, folder, *arguments)[0] == out
    code, _, err = phalanx("evaluate", *arguments[:-2], "--out", folder)
    assert code == 2 and "another configuration" in err


def test_robust_accuracies_under_different_surrogates_do_not_compare(phalanx: Run, run: Path, tmp_path: Path) -> None:
    one, two, asked = tmp_path / "one", tmp_path / "two", [run, "--protocol", "fgsm", "--n", 4]
    evaluated(phalanx, one, *asked)
    evaluated(phalanx, two, *asked, "--surrogate", "foreign_models:linear")
    code, _, err = phalanx("compare", one, two)
    assert code == 2 and "attack transfer:foreign_models:linear: only one has it" in err
    assert phalanx("compare", two, two)[0] == 0


@pytest.mark.parametrize(
    ("surrogates", "message"),
    [
        (["nowhere"], "surrogate: nowhere does not exist"),
        (["foreign_models:nothing"], "--surrogate foreign_models:nothing: module 'foreign_models' has no 'nothing'"),
        (["foreign_models:linear", "foreign_models:linear"], "two surrogates are called 'foreign_models:linear'"),
    ],
)
def test_mistakes_of_surrogates(phalanx: Run, run: Path, tmp_path: Path, surrogates: list[str], message: str) -> None:
    options = [word for name in surrogates for word in ("--surrogate", name)]
    code, _, err = phalanx("evaluate", run, "--protocol", "quick", "--n", 4, *options, "--out", tmp_path / "e")
    assert code == 2 and message in err and "Traceback" not in err


def test_thorough_reads_autoattack_beside_the_worst_case(phalanx: Run, run: Path, tmp_path: Path) -> None:
    out, _ = evaluated(phalanx, tmp_path / "e", run, "--protocol", "standard,steer-2", "--n", 6)
    *_, alone, worst = [line for line in out.splitlines() if line.startswith(("AutoAttack alone", "worst case"))]
    assert alone.startswith("AutoAttack alone") and worst.startswith("worst case per image")
    share = lambda line: float(line.partition("  ")[2].partition("%")[0])  # noqa: E731
    assert share(alone) >= share(worst)
    out, _ = evaluated(phalanx, tmp_path / "s", run, "--protocol", "standard", "--n", 6)
    assert "AutoAttack alone" not in out
