"""Challenges: a file of images is checked, judged and merged, and a headline only falls."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.cli import main
from phalanx.config import EvaluationConfig
from phalanx.data import load_data
from phalanx.errors import CorruptError, HonestyError, InputError, LockedError
from phalanx.evaluation.claim import read_evaluation
from phalanx.report import build_page, evaluation_text, render_html, terminal_table, to_json
from phalanx.routing import Routed
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.sidecar import verify_sidecar
from phalanx.runs.threats import HOW
from phalanx.workflow import compare, evaluate_run, find_rows, run_config
from phalanx.workflow.challenge import standings, submit
from phalanx.workflow.evaluated import Evaluated, Foreign
from phalanx.workflow.submission import read_submission

Run = Callable[..., tuple[int, str, str]]
EPS = "3/16"
N = 30

sys.path.insert(0, str(Path(__file__).parent))


def command(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["phalanx", *map(str, arguments)])
        main()
    assert not exit_.value.code


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run evaluated by an attack that finds little, and the images of one that finds more."""
    folder = tmp_path_factory.mktemp("challenge")
    settings = ["training.epochs=1", "validation.n=20", f"threat.eps={EPS}", "model.experts=2", "device=cpu"]
    sets = [word for setting in settings for word in ("--set", setting)]
    command("train", "digits-at", "--out", folder / "run", *sets)
    command("evaluate", folder / "run", "--protocol", "square-2,fgsm:0.01", "--n", N, "--no-checks")
    command("attack", folder / "run", "--attack", "pgd-10", "--n", N, "--png", 0, "--out", folder / "attack")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def images(made: Path) -> Path:
    return made / "attack" / "adversarial.npz"


def evaluation_of(run: Path) -> Path:
    (folder,) = (run / "evaluations").iterdir()
    return folder


def arrays(images: Path) -> dict[str, Any]:
    with np.load(images) as content:
        return dict(content)


def written(path: Path, **content: Any) -> Path:
    np.savez(path, **content)
    return path


def part(images: Path, path: Path, rows: slice) -> Path:
    whole = arrays(images)
    return written(path, x_adv=whole["x_adv"][rows], ids=whole["ids"][rows])


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- what a submission does ----------------------------------------------------------------------------------------


def test_a_headline_falls_by_the_images_that_broke_and_by_no_others(run: Path, images: Path) -> None:
    folder = evaluation_of(run)
    before = read_evaluation(folder / "ledger.sqlite").summary
    verdicts = json.loads((images.parent / "verdicts.json").read_bytes())["verdicts"]
    broken = {row["sample"] for row in verdicts if row["verdict"] == "broken"}
    right = {row["sample"] for row in verdicts if row["clean_predicted"] == row["label"]}
    done = submit(images, run, "alice")
    evaluation = read_evaluation(folder / "ledger.sqlite")
    after = evaluation.summary
    rows = [row for row in evaluation.rows if row.attack == "external:alice"]
    assert {row.sample for row in rows} == right and {
        row.sample for row in rows if row.verdict != "held"
    } == broken & right
    assert after.robust < before.robust and done.before == before.robust and done.standing.robust == after.robust
    assert (after.clean_correct, after.incomplete, after.n) == (before.clean_correct, 0, before.n)
    assert done.challenge.broken == len(broken & right) and done.challenge.lowered == before.robust - after.robust
    RunFolder(folder).verify()
    verify_sidecar(folder / "ledger.sqlite")
    spec = evaluation.attacks["external:alice"]
    assert (spec["count"], spec["external"], len(spec["sha256"])) == (N, True, 64) and spec["when"]


def test_who_breaks_a_certified_image_has_disproved_the_certificate(run: Path, images: Path, phalanx: Run) -> None:
    folder = evaluation_of(run)
    record = {
        "schema": 1,
        "norm": "Linf",
        "method": "crown",
        "n": N,
        "ids": list(range(N)),
        "reasons": ["certified"] * N,
        "radii": [0.0] * N,
        "grid": [],
        "vacuous": None,
        "model_sha256": json.loads((folder / "evaluation.json").read_bytes())["model_sha256"],
    }
    false = run / "certificates" / "Linf-crown-best-30" / "certificates.json"
    false.parent.mkdir(parents=True)
    right = {row.sample for row in read_evaluation(folder / "ledger.sqlite").rows if row.predicted == row.label}
    kept = ["certified" if sample in right else "misclassified" for sample in range(N)]
    false.write_text(json.dumps({**record, "reasons": kept}))
    # a radius of nothing contradicts nothing
    assert submit(images, run, "alice").contradicted == ()
    assert phalanx("report", run, "--out", run.parent / "page")[0] == 0
    false.write_text(json.dumps({**record, "reasons": kept, "radii": [0.5] * N}))
    code, out, err = phalanx("challenge", "submit", images, "--run", run, "--name", "alice")
    assert code == 7 and "merged before" in out and "broke" in out
    assert "certified within 0.5 (Linf, crown), but external:alice broke it at" in err
    code, out, err = phalanx("report", run, "--out", run.parent / "page")
    assert code == 7 and "contradicted" in err and "report:" in out
    assert "contradicted" in (run.parent / "page" / "report.html").read_text()


def test_a_few_images_leave_the_evaluation_finished(run: Path, images: Path, tmp_path: Path) -> None:
    folder = evaluation_of(run)
    before = read_evaluation(folder / "ledger.sqlite").summary
    submit(part(images, tmp_path / "few.npz", slice(3, 6)), run, "bob")
    after = read_evaluation(folder / "ledger.sqlite").summary
    (own,) = (done for done in after.attacks if done.attack == "external:bob")
    assert after.incomplete == 0 and own.untried == 0 and own.tried <= 3
    assert before.robust - 3 <= after.robust <= before.robust
    assert "not finished" not in evaluation_text(folder / "ledger.sqlite")
    # images that break nothing lower nothing
    clean = load_data("digits").test.first(N)
    x = clean.images(slice(0, N)).numpy()
    same = submit(written(tmp_path / "clean.npz", x_adv=x, ids=clean.ids), run, "carol")
    assert same.before == same.standing.robust == after.robust and same.challenge.broken == 0


def test_a_comparison_leaves_submissions_out(made: Path, run: Path, images: Path) -> None:
    threats = json.loads((evaluation_of(run) / "evaluation.json").read_bytes())["threats"]
    assert [line["threat"] for line in threats] == list(HOW) and threats[2]["status"] == "measured"
    submit(images, run, "alice")
    same = compare(made / "run", run).measures
    assert list(same) == ["SA", "RA", "fgsm:0.01", "square-2"] and same["RA"].difference == 0


def test_the_order_of_submissions_does_not_matter(made: Path, images: Path, tmp_path: Path) -> None:
    one, two = part(images, tmp_path / "1.npz", slice(0, 15)), part(images, tmp_path / "2.npz", slice(10, N))
    robust = []
    for place, order in enumerate([("a", "b"), ("b", "a")]):
        run = Path(shutil.copytree(made / "run", tmp_path / f"run{place}"))
        falls = [submit({"a": one, "b": two}[name], run, name).standing.robust for name in order]
        assert falls == sorted(falls, reverse=True)
        robust.append(falls[-1])
    assert robust[0] == robust[1] == submit(images, run, "all").standing.robust


def test_the_same_file_twice_changes_nothing_and_another_of_the_name_is_refused(
    run: Path, images: Path, tmp_path: Path
) -> None:
    submit(images, run, "alice")
    before = state(evaluation_of(run))
    again = submit(images, run, "alice")
    assert not again.merged and "merged before" in again.text() and state(evaluation_of(run)) == before
    with pytest.raises(InputError, match="already has 'external:alice', of another file"):
        submit(part(images, tmp_path / "x.npz", slice(0, 2)), run, "alice")
    assert state(evaluation_of(run)) == before


def test_the_images_that_broke_are_kept_and_can_be_submitted_again(
    run: Path, made: Path, images: Path, tmp_path: Path
) -> None:
    done = submit(images, run, "alice")
    kept = evaluation_of(run) / "challenges" / "alice.npz"
    fresh = Path(shutil.copytree(made / "run", tmp_path / "fresh"))
    again = submit(kept, fresh, "kept")
    assert again.standing.robust == done.standing.robust
    assert again.challenge.submitted == again.challenge.broken == done.challenge.broken
    record = json.loads((evaluation_of(run) / "challenges" / "alice.json").read_bytes())
    old = (evaluation_of(fresh) / "challenges" / "kept.json").read_bytes()
    assert record["ledger_sha256_before"] == json.loads(old)["ledger_sha256_before"]


def test_uint8_images_are_taken(run: Path, images: Path, tmp_path: Path) -> None:
    whole = arrays(images)
    clean = load_data("digits").test.first(N).images(slice(0, N)).numpy()
    # rounded towards the clean image
    levels = np.where(whole["x_adv"] > clean, np.floor(whole["x_adv"] * 255), np.ceil(whole["x_adv"] * 255))
    file = written(tmp_path / "u.npz", x_adv=levels.astype(np.uint8), ids=whole["ids"], labels=whole["y"])
    assert submit(file, run, "u").challenge.lowered > 0


# -- what is refused -----------------------------------------------------------------------------------------------


def _nan(content: dict[str, Any]) -> None:
    content["x_adv"][4, 0, 0, 0] = np.nan


def _high(content: dict[str, Any]) -> None:
    content["x_adv"][5, 0, 0, 0] = 1.5


def _far(content: dict[str, Any]) -> None:
    content["x_adv"][6] = 1 - np.round(content["x_adv"][6])


def _twice(content: dict[str, Any]) -> None:
    content["ids"][7] = content["ids"][2]


def _unknown(content: dict[str, Any]) -> None:
    content["ids"][3] = 10**9


def _labels(content: dict[str, Any]) -> None:
    content["y"][8] = (content["y"][8] + 1) % 10


def _swapped(content: dict[str, Any]) -> None:
    content["ids"] = content["ids"][::-1].copy()
    del content["y"]


def _objects(content: dict[str, Any]) -> None:
    content["ids"] = np.array([{}] * N, dtype=object)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nan, r"x_adv\[4\] has pixels that are not finite"),
        (_high, r"x_adv\[5\] has pixels that are not finite or not in"),
        (_far, r"x_adv\[6\] is .* away from sample \d+ in Linf, more than 3/16"),
        (_twice, r"ids\[7\] is \d+, as ids\[2\] is"),
        (_unknown, r"ids\[3\] is 1000000000, but the evaluation has no such sample"),
        (_labels, r"y\[8\] is \d, but sample \d+ has the label \d"),
        (_swapped, r"x_adv\[\d+\] is .* away from sample"),
        (_objects, "ids holds Python objects"),
        (lambda content: content.pop("ids"), "has no ids"),
        (lambda content: content.pop("x_adv"), "has no x_adv"),
        (lambda content: content.update(x_adv=content["x_adv"][:, :, :4]), r"shape \(n, 1, 8, 8\)"),
        (lambda content: content.update(x_adv=content["x_adv"] > 0), "float in .* or uint8, got bool"),
        (lambda content: content.update(ids=content["ids"][:3]), "ids must be 30 whole numbers"),
        (lambda content: content.update(ids=content["ids"].astype(float)), "ids must be 30 whole numbers"),
        (lambda content: content.update(x_adv=np.zeros((10**5, 1, 8, 8), np.uint8)), "more than"),
    ],
)
def test_a_spoilt_file_is_refused_by_row_and_merges_nothing(
    run: Path, images: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = arrays(images)
    spoil(content)
    before = state(evaluation_of(run))
    with pytest.raises(InputError, match=message):
        submit(written(tmp_path / "bad.npz", **content), run, "bad")
    assert state(evaluation_of(run)) == before


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x_adv.npy": _header((10**12, 1, 8, 8))}, r"x_adv has the shape .* more than all images"),
        (
            {"x_adv.npy": _header((10**5, 1, 8, 8)) + bytes(4 * 10**5 * 64)},
            r"x_adv has the shape .* more than all images",
        ),
        ({"x_adv.npy": _header((N, 1, 8, 8)) + bytes(40)}, "ends early"),
        ({"x_adv.npy": _header((-5, 1, 8, 8))}, "no sound"),
        ({"x_adv.npy": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16}, "no sound"),
        ({"x_adv.npy": b""}, "no sound"),
        # declares a header of 300 MB, and brings it
        ({"x_adv.npy": b"\x93NUMPY\x02\x00" + (3 * 10**8).to_bytes(4, "little")}, r"version \(2, 0\) of the .npy"),
    ],
)
def test_a_file_that_lies_about_its_size_sets_nothing_aside(
    made: Path, tmp_path: Path, members: Mapping[str, bytes], message: str
) -> None:
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, "ids.npy": b""}.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=message):
        read_submission(file, load_data("digits").test.first(N), run_config(made / "run").threat)


def test_what_is_no_npz_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    for content, message in [
        (b"", "no sound .npz"),
        (b"PK\x03\x04" + b"x" * 99, "no sound .npz"),
        (b"x" * 2**21, "bytes, more"),
    ]:
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            submit(file, run, "x")
    with pytest.raises(InputError, match="there is no file"):
        submit(tmp_path / "nothing.npz", run, "x")


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "a" * 65, "a/b", "ä", "a\n"])
def test_a_name_is_plain(run: Path, images: Path, name: str) -> None:
    with pytest.raises(InputError, match="--name must be"):
        submit(images, run, name)


def test_another_model_other_data_or_a_damaged_folder_is_refused(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Evaluated.model

    def other(self: Evaluated, data: Any, device: Any) -> Any:
        found = model(self, data, device)
        next(found.parameters()).data += 1e-3
        return found

    monkeypatch.setattr(Evaluated, "model", other)
    with pytest.raises(InputError, match="no longer the one"):
        submit(images, run, "x")
    monkeypatch.undo()
    (evaluation_of(run) / "run.json").write_text("{}")
    with pytest.raises(CorruptError):
        submit(images, run, "x")


def test_a_model_that_answers_by_the_batch_merges_nothing(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(evaluation_of(run))
    for other in (lambda logits: logits.roll(1, -1), lambda logits: logits * float("nan")):
        answer = lambda model, x, other=other: Routed(other(model(x)), None)  # noqa: E731
        monkeypatch.setattr("phalanx.evaluation.again.answer", answer)
        with pytest.raises(HonestyError, match="judged otherwise in batches of"):
            submit(images, run, "x")
        assert state(evaluation_of(run)) == before


def test_a_folder_in_use_an_evaluation_in_work_and_one_of_several_are_refused(run: Path, images: Path) -> None:
    folder = evaluation_of(run)
    with RunFolder(folder).lock():
        code = os.fork()
        if not code:
            try:
                submit(images, run, "x")
            except LockedError:
                os._exit(6)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 6
    second = Path(shutil.copytree(folder, folder.with_name("second")))
    with pytest.raises(InputError, match=r"several evaluations .*--evaluation"):
        submit(images, run, "x")
    assert submit(images, run, "x", Path("second")).standing.folder == second
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        submit(images, run, "x", folder)


# -- killed --------------------------------------------------------------------------------------------------------

POINTS = ("written", "opened", "merged", "closing", "closed")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("other", [False, True], ids=["same", "other"])
def test_killed_anywhere_a_merge_is_whole_or_nothing_and_the_same_command_ends_it(
    run: Path, images: Path, tmp_path: Path, point: str, other: bool
) -> None:
    few, folder = part(images, tmp_path / "few.npz", slice(0, 9)), evaluation_of(run)
    submit(few, run, "first")
    before = read_evaluation(folder / "ledger.sqlite")
    child = os.fork()
    if not child:
        os.environ["PHALANX_FAILPOINT"] = f"challenge.{point}:kill"
        submit(images, run, "alice")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # whatever is there is sound, and says nothing higher
    left = read_evaluation(folder / "ledger.sqlite")
    assert left.summary.robust <= before.summary.robust and left.summary.incomplete == 0
    merged = "external:alice" in left.attacks
    assert merged == (point in ("merged", "closing", "closed"))
    build_page("x", "", find_rows([run]), "x")
    if other:
        submit(few, run, "third")
    else:
        assert submit(images, run, "alice").merged is not merged
    RunFolder(folder).verify()
    found = read_evaluation(folder / "ledger.sqlite")
    assert ("external:alice" in found.attacks) is (merged or not other) and "external:first" in found.attacks
    kept = {path.name for path in (folder / "challenges").iterdir()}
    names = {name.removeprefix("external:") for name in found.attacks if name.startswith("external:")}
    assert kept >= {f"{name}.json" for name in names} and not any(name.startswith(".") for name in kept)
    threats = json.loads((folder / "evaluation.json").read_bytes())["threats"]
    (external,) = (line for line in threats if line["threat"] == "external")
    assert {name.removeprefix("external:") for name in external["attacks"]} == names


def test_what_else_changed_while_a_merge_lay_killed_is_found(run: Path, images: Path) -> None:
    folder = evaluation_of(run)
    child = os.fork()
    if not child:
        os.environ["PHALANX_FAILPOINT"] = "challenge.opened:kill"
        submit(images, run, "alice")
        os._exit(0)
    os.waitpid(child, 0)
    (folder / "honesty.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"honesty\.json is damaged"):
        submit(images, run, "alice")


def test_evaluate_goes_on_from_a_killed_merge_too(run: Path, images: Path) -> None:
    folder = evaluation_of(run)
    submit(images, run, "alice")
    robust = read_evaluation(folder / "ledger.sqlite").summary.robust
    (folder / "MANIFEST.json").rename(folder / "challenges" / ".pending.json")
    config = EvaluationConfig(
        protocol="square-2,fgsm:0.01", n=N, analysis=run_config(run).evaluation.analysis, checks=8
    )
    found = evaluate_run(run, folder, config)
    assert found is not None and found.finished and found.summary.robust == robust
    checks = {check["id"]: check["status"] for check in json.loads((folder / "honesty.json").read_bytes())["checks"]}
    assert "fail" not in {checks["E1"], checks["E2"], checks["E20"]}
    assert not submit(images, run, "alice").merged
    RunFolder(folder).verify()


# -- what is shown -------------------------------------------------------------------------------------------------


def test_report_and_commands_tell_of_it(phalanx: Run, run: Path, images: Path) -> None:
    before = build_page("x", "", find_rows([run]), "x").rows[0]
    code, out, err = phalanx("challenge", "submit", images, "--run", run, "--name", "alice")
    assert code == 0 and "external:alice: 30 images" in out and " to " in out, err
    page = build_page("x", "", find_rows([run]), "x")
    (row,) = page.rows
    assert row.unchallenged == before.worst and row.worst is not None and before.worst is not None
    assert row.worst.held < before.worst.held and [a.label for a in page.attacks] == ["fgsm:0.01", "square-2"]
    assert sum(found.worst.held for found in row.classes if found.worst) == row.worst.held
    found = to_json(page)["rows"][0]
    assert found["challenges"][0]["lowered"] == before.worst.held - row.worst.held
    assert found["without_challenges"]["held"] == before.worst.held
    assert "Challenges" in terminal_table(page) and "Challenges" in render_html(page)
    code, out, _ = phalanx("challenge", "list", run)
    assert code == 0 and "external:alice" in out and "worst case per image" in out
    assert len(standings(run)[0].challenges) == 1
    assert "external:alice broke" in evaluation_text(evaluation_of(run) / "ledger.sqlite")
    code, _, err = phalanx("challenge", "submit", images, "--run", run, "--name", "../up")
    assert code == 2 and "--name must be" in err


def test_a_model_made_elsewhere_is_challenged_only_by_naming_its_code(phalanx: Run, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    code, _, err = phalanx(
        "evaluate", "--model", "foreign_models:linear", "--data", "digits", "--eps", EPS, "--protocol", "square-2",
        "--n", 20, "--no-checks", "--out", folder,
    )  # fmt: skip
    assert code == 0, err
    clean = load_data("digits").test.first(20)
    file = written(tmp_path / "x.npz", x_adv=clean.images(slice(0, 20)).numpy(), ids=clean.ids)
    with pytest.raises(InputError, match="give --model foreign_models:linear"):
        submit(file, folder, "x")
    with pytest.raises(InputError, match="give these"):
        submit(file, folder, "x", foreign=Foreign("foreign_models:eleven"))
    assert submit(file, folder, "x", foreign=Foreign("foreign_models:linear")).merged
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        assert "external:x" in ledger.attacks()


def test_an_evaluation_is_found_beside_its_run_and_by_itself(run: Path, images: Path) -> None:
    inside = evaluation_of(run)
    assert submit(images, inside, "inside").standing.folder == inside
    beside = Path(shutil.move(inside, run.with_name("run.evaluation")))
    assert submit(images, run, "beside").standing.folder == beside
    assert submit(images, beside, "itself").standing.folder == beside
    with pytest.raises(InputError, match="is not evaluated; run phalanx evaluate first"):
        submit(images, run.parent, "x")
