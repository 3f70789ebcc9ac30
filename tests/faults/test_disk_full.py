"""A full disk: one clear error, the last checkpoint and every verdict kept, and the same call goes on afterwards."""

from __future__ import annotations

import resource
from pathlib import Path

import children
import pytest

import tiny
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.checkpoint import load_latest

DISK_ERROR = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never met a full disk."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert children.finish(lambda: children.train(folder)) == 0
    return folder


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _goes_on(folder: Path, step: int, capfd: pytest.CaptureFixture[str]) -> None:
    message = capfd.readouterr().err
    assert message.startswith("DiskError: cannot ") and str(folder) in message and "Traceback" not in message
    kept = load_latest(folder / "checkpoints")
    assert kept is not None and not kept.notes and kept.step == step
    assert RunFolder(folder).status() == "running"


def test_files_that_may_not_grow(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    stop = tiny.StopAt(4, lambda: _limit_files(1000))
    assert children.finish(lambda: children.train(folder, stop)) == DISK_ERROR
    _goes_on(folder, 4, capfd)
    assert children.finish(lambda: children.train(folder)) == 0
    assert tiny.result(folder) == tiny.result(run)


def test_a_file_system_without_room(run: Path, tiny_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, filler = tiny_disk / "run", tiny_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    assert children.finish(lambda: children.train(folder, tiny.StopAt(4, fill))) == DISK_ERROR
    _goes_on(folder, 4, capfd)
    # still full: still the same clear error, and still nothing lost
    assert children.finish(lambda: children.train(folder)) == DISK_ERROR
    _goes_on(folder, 4, capfd)
    filler.unlink()
    assert children.finish(lambda: children.train(folder)) == 0
    assert tiny.result(folder) == tiny.result(run)


def test_a_ledger_that_may_not_grow(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert children.finish(lambda: children.evaluate(run, tmp_path / "whole")) == 0

    def limited() -> None:
        # enough for the first batches, not for all: a ledger of this protocol takes more
        _limit_files(60_000)
        children.evaluate(run, tmp_path / "part")

    assert children.finish(limited) == DISK_ERROR
    message = capfd.readouterr().err
    assert "DiskError: cannot use the ledger" in message and "Traceback" not in message
    with Ledger.read(tmp_path / "part/ledger.sqlite") as ledger:
        kept = ledger.rows()
    assert children.finish(lambda: children.evaluate(run, tmp_path / "part")) == 0
    with Ledger.read(tmp_path / "whole/ledger.sqlite") as one, Ledger.read(tmp_path / "part/ledger.sqlite") as two:
        assert one.table_sha256() == two.table_sha256()
        assert kept and set(kept) < set(two.rows())
