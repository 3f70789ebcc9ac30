"""A stranger's files: nothing in them runs, nothing is written where it was not asked for, and each is one message."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest

from phalanx.cli import main

Run = Callable[..., tuple[int, str, str]]
TINY = [
    "--set", "training.epochs=1", "--set", "training.batch_size=64", "--set", "validation.n=10",
    "--set", "data.test_limit=20", "--set", "model.experts=2", "--set", "model.options.hidden=[8]",
]  # fmt: skip
INPUT, CORRUPT = 2, 4


def _command(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["phalanx", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained and evaluated."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    _command("train", "digits-st", "--out", folder, *TINY)
    _command("evaluate", folder, "--protocol", "fgsm", "--no-checks")
    return folder


class Place:
    """A folder to be harmed in, and what lies around it."""

    def __init__(self, tmp_path: Path, sound: Path) -> None:
        self.outside, self.trace = tmp_path / "outside", tmp_path / "trace"
        self.outside.mkdir()
        (self.outside / "kept").write_text("kept")
        self.inside = tmp_path / "inside"
        self.run = self.inside / "run"
        shutil.copytree(sound, self.run)
        self.evaluation = self.run / "evaluations/fgsm-best-all"

    def file(self, name: str, content: bytes) -> Path:
        path = self.inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def check(self) -> None:
        """Nothing ran, and nothing was written outside."""
        assert not self.trace.exists()
        assert {path.name: path.read_text() for path in self.outside.iterdir()} == {"kept": "kept"}
        assert {path.name for path in self.inside.parent.iterdir()} == {"inside", "outside"}


@pytest.fixture
def place(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path, sound)
    monkeypatch.chdir(made.inside)
    return made


EVALUATE = ["--protocol", "fgsm", "--no-checks", "--n", "5"]


def test_pickles_as_weights(place: Place, phalanx: Run) -> None:
    content = hostile.pickled(place.trace)
    foreign = ["evaluate", "--model", "torch.nn:Flatten", "--data", "digits", "--weights"]
    code, _, err = phalanx(*foreign, place.file("evil.pt", content))
    assert code == INPUT and "may hold code" in err
    code, _, err = phalanx(*foreign, place.file("evil.safetensors", content))
    assert code == INPUT and "no sound .safetensors" in err
    (place.run / "best.safetensors").write_bytes(content)
    hostile.signed(place.run)
    code, _, err = phalanx("evaluate", place.run, *EVALUATE)
    assert code == CORRUPT and "best.safetensors is no safetensors file" in err
    place.check()


def test_a_pickle_beside_a_checkpoint_is_never_read(place: Place, phalanx: Run) -> None:
    # what torch.distributed.checkpoint would unpickle
    step = next((place.run / "checkpoints").glob("step-*"))
    (step / ".metadata").write_bytes(hostile.pickled(place.trace))
    (place.run / "MANIFEST.json").unlink()
    code, out, _ = phalanx("train", "digits-st", "--out", place.run, *TINY)
    assert (code, out) == (0, f"run: {place.run}\n")
    place.check()


def test_objects_in_an_npz(place: Place, phalanx: Run) -> None:
    images = place.file("x_adv.npz", hostile.object_npz(place.trace))
    code, _, err = phalanx("challenge", "submit", images, "--run", place.evaluation, "--name", "me")
    assert code == INPUT and "Python objects" in err
    place.check()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [trace]", "!!python/name:os.system", "!!binary aGk="])
def test_yaml_that_would_build_objects(place: Place, phalanx: Run, tag: str) -> None:
    recipe = place.file("mine.yaml", f"extends: digits-st\nlabel: {tag}\n".replace("trace", str(place.trace)).encode())
    code, _, err = phalanx("train", recipe)
    assert code == INPUT and f"{recipe}:2  label: YAML tag" in err
    place.check()


@pytest.mark.parametrize("name", ["../../outside/x", "{outside}/x", "..\\..\\outside\\x", "C:/x"])
def test_a_zip_that_slips(place: Place, phalanx: Run, name: str) -> None:
    archive = hostile.slipping_zip(name.format(outside=place.outside))
    folder = place.file("set/tiny-imagenet-200.zip", archive).parent
    code, _, err = phalanx("data", "check", f"tiny-imagenet:{folder}")
    assert code in (INPUT, CORRUPT) and ("leads out of the archive" in err or "md5" in err)
    place.check()


def test_a_tar_with_a_link(place: Place, phalanx: Run) -> None:
    folder = place.file("set/cifar-10-binary.tar.gz", hostile.linking_tar(place.outside)).parent
    code, _, err = phalanx("data", "check", f"cifar10:{folder}")
    assert code in (INPUT, CORRUPT) and ("link" in err or "md5" in err)
    place.check()


@pytest.mark.parametrize("name", ["/etc/hostname", "../../../outside/kept", "checkpoints/../../../outside/kept"])
def test_a_manifest_that_points_elsewhere(place: Place, phalanx: Run, name: str) -> None:
    manifest = place.run / "MANIFEST.json"
    record = json.loads(manifest.read_text())
    record["files"][name] = {"sha256": "0" * 64, "size": 4}
    manifest.write_text(json.dumps(record))
    code, _, err = phalanx("evaluate", place.run, *EVALUATE)
    assert code == CORRUPT and "MANIFEST.json" in err
    place.check()


@pytest.mark.parametrize("header", hostile.HEADERS)
def test_safetensors_headers(place: Place, phalanx: Run, header: str) -> None:
    content = hostile.HEADERS[header]
    (place.run / "best.safetensors").write_bytes(content)
    hostile.signed(place.run)
    code, _, err = phalanx("evaluate", place.run, *EVALUATE)
    assert code in (INPUT, CORRUPT) and "best.safetensors" in err
    weights = place.file("w.safetensors", content)
    code, _, err = phalanx("evaluate", "--model", "torch.nn:Flatten", "--data", "digits", "--weights", weights)
    assert code == INPUT and "w.safetensors" in err
    place.check()


SHAPE = {"num_classes": 10, "image_size": 8, "channels": 1}
SPECS = {
    "unknown": {"name": "os.system", "arguments": {"command": "true"}},
    "a function of yours": {"name": "expert.os:mkdir", "arguments": {**SHAPE, "path": "TRACE"}},
    "without arguments": {"name": "expert.mlp", "arguments": {}},
    "arguments that are none": {"name": "mixture", "arguments": {"router": None, "experts": 3}},
    "half of it": {"name": "mixture"},
    "a list": [1],
    "huge": {
        "name": "expert.mlp",
        "arguments": {**SHAPE, "mean": [0.5], "std": [0.5], "hidden": [10**13]},
    },
}


@pytest.mark.parametrize("spec", SPECS)
def test_descriptions_of_models(place: Place, phalanx: Run, spec: str) -> None:
    path = place.run / "model.json"
    described = json.loads(path.read_text()) | {"spec": SPECS[spec]}
    path.write_text(json.dumps(described).replace("TRACE", str(place.trace)))
    hostile.signed(place.run)
    code, _, err = phalanx("evaluate", place.run, *EVALUATE)
    assert code in (INPUT, CORRUPT) and err.startswith("error: ")
    place.check()


@pytest.mark.parametrize("name", ["run.json", "model.json", "evaluations/fgsm-best-all/evaluation.json"])
def test_json_nested_without_end(place: Place, phalanx: Run, name: str) -> None:
    path = place.run / name
    path.write_text("[" * 100_000 + "]" * 100_000)
    hostile.signed(place.run)
    hostile.signed(place.evaluation)
    command = ["report", place.run] if "/" in name else ["evaluate", place.run, *EVALUATE]
    code, _, err = phalanx(*command)
    assert code in (INPUT, CORRUPT) and Path(name).name in err
    place.check()


def test_an_image_that_would_fill_the_memory(place: Place, phalanx: Run) -> None:
    for label in "ab":
        for number in range(3):
            place.file(f"images/{label}/{number}.png", hostile.image_bomb(60_000))
    code, _, err = phalanx("data", "check", f"folder:{place.inside / 'images'}")
    assert code == INPUT and "a/0.png" in err and "pixels" in err
    place.check()


NAMES = ["<script>alert(1)</script>", "=cmd|' /C calc'!A0", "@SUM(1)", "x\n\\input{/etc/passwd}", "a|b\n# c"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_a_page_or_a_table_would_run(place: Place, phalanx: Run, name: str) -> None:
    record = place.evaluation / "evaluation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"label": name}))
    hostile.signed(place.evaluation)
    formats, out = ["csv", "latex", "markdown", *(["html"] if name == NAMES[0] else [])], place.inside / "report"
    code, _, err = phalanx("report", place.run, "--out", out, "--title", name, "--format", ",".join(formats))
    assert code == 0, err
    with (out / "table.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert any(name in cell for cell in cells) and not any(cell.startswith(("=", "@")) for cell in cells)
    assert not any(line.startswith("\\input") for line in (out / "table.tex").read_text().splitlines())
    assert "\n# c" not in (out / "table.md").read_text()
    assert "html" not in formats or "<script>alert" not in (out / "report.html").read_text()
    place.check()


@pytest.mark.parametrize("name", ["../../outside/run", "/tmp/run", ".", "LOCK", "a/b", "x" * 300])
def test_names_of_runs_that_lead_out(place: Place, phalanx: Run, name: str) -> None:
    recipe = place.file("mine.yaml", f"title: t\nruns:\n  {json.dumps(name)}: {{recipe: digits-st}}\n".encode())
    code, _, err = phalanx("run", recipe, "--out", place.inside / "new", *TINY)
    assert code == INPUT and f"{recipe}:3" in err and "cannot name a run" in err
    assert not (place.inside / "new").exists()
    place.check()


@pytest.mark.parametrize("below", ["", "checkpoints", "metrics.jsonl", "best.safetensors"])
def test_a_run_behind_a_link(place: Place, phalanx: Run, below: str) -> None:
    target = place.run / below if below else place.run
    (shutil.rmtree if target.is_dir() else os.remove)(target)
    (place.run / "MANIFEST.json").unlink(missing_ok=True)
    target.symlink_to(place.outside if not below or below == "checkpoints" else place.outside / "kept")
    code, _, err = phalanx("train", "digits-st", "--out", place.run, *TINY)
    assert code in (INPUT, CORRUPT) and "link" in err
    place.check()


@pytest.mark.parametrize(
    ("below", "command"),
    [("evaluations", ["evaluate"]), ("certificates", ["certify", "--method", "crown", "--norm", "Linf"])],
)
def test_results_of_a_run_behind_a_link(place: Place, phalanx: Run, below: str, command: list[str]) -> None:
    shutil.rmtree(place.run / below, ignore_errors=True)
    (place.run / below).symlink_to(place.outside)
    options = EVALUATE if below == "evaluations" else ["--n", "5"]
    code, _, err = phalanx(command[0], place.run, *command[1:], *options)
    assert code == INPUT and f"'{below}/" in err and f"leads out of {place.run} through a link" in err
    place.check()


def test_a_report_replaces_a_link_and_follows_none(place: Place, phalanx: Run) -> None:
    (place.run / "table.csv").symlink_to(place.outside / "kept")
    assert phalanx("report", place.run, "--format", "csv")[0] == 0
    assert (place.run / "table.csv").is_file() and not (place.run / "table.csv").is_symlink()
    place.check()
