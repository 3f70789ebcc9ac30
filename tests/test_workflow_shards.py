"""Several processes share one evaluation: which may work at once, and what they make together."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import children

from phalanx.config import EvaluationConfig
from phalanx.errors import InputError, LockedError
from phalanx.evaluation import Limits, Shard
from phalanx.runs import Ledger, RunFolder, RunLock
from phalanx.workflow import Conduct, evaluate_run

CONFIG = EvaluationConfig(protocol="fgsm,pgd-3", batch_size=8, n=30)


def conduct(number: int, count: int, **limits: Any) -> Conduct:
    return Conduct(limits=Limits(shard=Shard(number, count), **limits))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    children.train(folder)
    return folder


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "evaluation"
    evaluate_run(run, folder, CONFIG)
    return folder


def table(folder: Path) -> str:
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        return ledger.table_sha256()


def test_shards_one_after_the_other_make_the_whole(run: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    for number in (3, 1, 2):
        found = evaluate_run(run, folder, CONFIG, conduct=conduct(number, 3))
        assert found is not None and found.finished == (number == 2)
        assert (RunFolder(folder).status() == "finished") == found.finished
    assert table(folder) == table(whole)
    RunFolder(folder).verify()
    assert not list(folder.glob("LOCK*"))
    # finished for everybody
    assert evaluate_run(run, folder, CONFIG, conduct=conduct(1, 3)) is None
    assert evaluate_run(run, folder, CONFIG) is None


def test_shards_at_once_make_the_whole(run: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    pids = [
        children.fork(lambda number=number: evaluate_run(run, folder, CONFIG, conduct=conduct(number, 4)))
        for number in range(1, 5)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0, 0]
    assert table(folder) == table(whole) and RunFolder(folder).status() == "finished"
    RunFolder(folder).verify()


def test_a_shard_that_was_stopped_is_done_by_the_whole(run: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    evaluate_run(run, folder, CONFIG, conduct=conduct(2, 3, seconds=1e-9))
    evaluate_run(run, folder, CONFIG, conduct=conduct(1, 3))
    found = evaluate_run(run, folder, CONFIG)
    assert found is not None and found.finished and table(folder) == table(whole)


def test_the_same_shard_twice_and_the_whole_beside_a_shard_are_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    with RunFolder(folder).part("shard-1-of-3"):
        with pytest.raises(LockedError, match=f"shard-1-of-3 of .*evaluation is in use by process {os.getpid()}"):
            evaluate_run(run, folder, CONFIG, conduct=conduct(1, 3))
        with pytest.raises(LockedError, match="shard-1-of-3 of"):
            evaluate_run(run, folder, CONFIG)
        assert evaluate_run(run, folder, CONFIG, conduct=conduct(2, 3)) is not None
    with RunFolder(folder).lock(), pytest.raises(LockedError, match="in use by process"):
        evaluate_run(run, folder, CONFIG, conduct=conduct(1, 3))


def test_another_protocol_is_refused_in_the_same_folder(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    evaluate_run(run, folder, CONFIG, conduct=conduct(1, 3))
    with pytest.raises(InputError, match="protocol"):
        evaluate_run(run, folder, EvaluationConfig(protocol="fgsm", n=30), conduct=conduct(2, 3))
    with pytest.raises(InputError, match="attack_seconds"):
        evaluate_run(run, folder, CONFIG, conduct=conduct(2, 3, attack_seconds=9))


def test_a_lock_that_waits(tmp_path: Path) -> None:
    held = RunLock(tmp_path, "turn")
    held.__enter__()
    timer = threading.Timer(0.2, held.__exit__, (None, None, None))
    timer.start()
    with RunLock(tmp_path, "turn", wait=5):
        pass
    timer.join()
    with RunLock(tmp_path, "turn"), pytest.raises(LockedError), RunLock(tmp_path, "turn", wait=0.1):
        pass
