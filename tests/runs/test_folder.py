from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import phalanx
from phalanx.errors import CorruptError, DiskError, DivergedError, InputError, Interrupted, LockedError
from phalanx.runs.folder import RunFolder

_CONFIG = {"method": "st", "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}


def test_a_run_from_new_to_finished(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "a")
    assert run.status() == "new"
    with run.lock():
        run.prepare(_CONFIG)
        assert run.status() == "running"
        run.resolve("sub").mkdir()
        run.resolve("sub/model.bin").write_bytes(b"model")
        run.finish()
    assert run.status() == "finished"
    assert sorted(run.verify()) == ["run.json", "sub/model.bin"]
    record = run.record()
    assert record["schema"] == 1
    assert record["phalanx"] == phalanx.__version__
    assert record["config"] == _CONFIG
    with run.lock():
        run.prepare(_CONFIG)
    assert run.status() == "finished"
    run.verify()


def test_tuples_are_lists_in_a_configuration(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.prepare({"betas": (0.9, 0.99)})
    run.prepare({"betas": [0.9, 0.99]})


def test_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.prepare(_CONFIG)
    with pytest.raises(
        InputError,
        match=r"\(epochs: \(absent\) -> 3; optimizer\.betas\.1: 0\.99 -> 0\.999; optimizer\.lr: 0\.1 -> \(absent\)\); "
        r"choose another --out, or remove the folder",
    ):
        run.prepare({"method": "st", "optimizer": {"betas": [0.9, 0.999]}, "epochs": 3})
    with pytest.raises(InputError, match=r"k4: \(absent\) -> 4; and 5 more\)"):
        run.prepare({**_CONFIG, **{f"k{number}": number for number in range(10)}})
    assert run.record()["config"] == _CONFIG


def test_a_configuration_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"key 'a.eps' is not finite"):
        RunFolder(tmp_path / "a").prepare({"a": {"eps": float("inf")}})
    assert not (tmp_path / "a").exists()


def test_foreign_folders_are_refused_and_untouched(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("file")
    (tmp_path / "link").symlink_to(foreign)
    for name, reason in (("thesis", "holds other files"), ("file", "is a file"), ("link", "is a symbolic link")):
        run = RunFolder(tmp_path / name)
        for work in (partial(run.prepare, _CONFIG), run.lock, run.status, run.clear):
            with pytest.raises(InputError, match=rf"{name} .*{reason}"):
                work()
    assert [path.name for path in foreign.iterdir()] == ["chapter.txt"]


def test_a_kill_at_every_step_of_preparing_can_be_resumed(tmp_path: Path, in_child, failpoints) -> None:
    steps = failpoints(lambda: RunFolder(tmp_path / "traced").prepare(_CONFIG))
    assert len(steps) == 5
    for number, step in enumerate(steps):
        run = RunFolder(tmp_path / str(number))

        def work(run: RunFolder = run) -> None:
            with run.lock():
                run.prepare(_CONFIG)

        assert in_child(work, f"{step}:kill") == -9
        work()
        assert run.status() == "running"
        assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_kill_at_every_step_of_finishing_is_finished_or_running(tmp_path: Path, in_child, failpoints) -> None:
    RunFolder(tmp_path / "traced").prepare(_CONFIG)
    steps = failpoints(RunFolder(tmp_path / "traced").finish)
    for number, step in enumerate(steps):
        run = RunFolder(tmp_path / str(number))
        run.prepare(_CONFIG)
        assert in_child(run.finish, f"{step}:kill") == -9
        if run.status() == "finished":
            run.verify()
        else:
            assert run.status() == "running"
        run.prepare(_CONFIG)
        run.finish()
        assert sorted(run.verify()) == ["run.json"]


def test_outcomes_are_recorded(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.prepare(_CONFIG)
    for error, status in (
        (DivergedError("NaN"), "diverged"),
        (Interrupted(15, "SIGTERM"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        with pytest.raises(type(error)), run.records_outcome():
            raise error
        assert run.status() == status
        run.prepare(_CONFIG)
        assert run.status() == "running"
    with pytest.raises(ZeroDivisionError), run.records_outcome():
        raise ZeroDivisionError
    assert run.status() == "running"
    with pytest.raises(ValueError, match="running, diverged or interrupted, got 'finished'"):
        run.mark("finished")


def test_the_lock_is_exclusive(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    with run.lock(), pytest.raises(LockedError), run.lock():
        pass


def test_damage_of_the_record_is_found(tmp_path: Path, each_damage) -> None:
    run = RunFolder(tmp_path / "a")
    run.prepare(_CONFIG)
    path = run.path / "run.json"
    whole = run.record()
    for _ in each_damage(path):
        try:
            record = run.record()
        except (CorruptError, InputError):
            continue
        # an unfinished run's record vouches for its configuration; a finished one is in the manifest
        assert record["config"] == whole["config"]
    run.finish()
    for _ in each_damage(path):
        with pytest.raises(CorruptError, match=r"run\.json"):
            run.verify()


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no run folder: it has no run.json"):
        RunFolder(tmp_path).record()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(CorruptError, match="no record of a run"):
        RunFolder(tmp_path).status()


def test_a_newer_schema_is_said_to_be_newer(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.prepare(_CONFIG)
    record = {**run.record(), "schema": 2}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="schema 2, this version reads up to 1"):
        run.prepare(_CONFIG)


def test_clearing_starts_over_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    run = RunFolder(tmp_path / "a")
    with run.lock():
        run.prepare(_CONFIG)
        (run.path / "sub").mkdir()
        (run.path / "link").symlink_to(tmp_path / "outside")
        run.clear()
        assert [path.name for path in run.path.iterdir()] == ["LOCK"]
        run.prepare({"other": 1})
    assert (tmp_path / "outside" / "kept").exists()
    RunFolder(tmp_path / "missing").clear()


def test_names_stay_inside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.prepare(_CONFIG)
    with pytest.raises(InputError, match="no name inside"):
        run.resolve("../b")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_FAILPOINT", "write.half/run.json:enospc")
    with pytest.raises(DiskError, match=r"run\.json: No space left"):
        RunFolder(tmp_path / "a").prepare(_CONFIG)
    monkeypatch.delenv("PHALANX_FAILPOINT")
    RunFolder(tmp_path / "a").prepare(_CONFIG)
