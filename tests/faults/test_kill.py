"""kill -9 at random moments: the run ends with the same bytes, the ledger with the same verdicts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import children
import pytest

import tiny
from phalanx.evaluation import Limits, Shard
from phalanx.runs import Ledger, RunFolder
from phalanx.runs.atomic import stray_temporaries
from phalanx.workflow import Conduct


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its evaluation that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    # by the parent: what is loaded once is loaded for every child
    children.train(folder / "run")
    children.evaluate(folder / "run", folder / "evaluation")
    return folder


def _seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the killing: {seed}")
    return seed


def _killed_training(whole: Path, run: Path, kills: int, seed: int) -> None:
    rng, most = random.Random(seed), children.STEPS // kills
    assert children.kill_at_random(lambda reporter: children.train(run, reporter), kills, most, rng)
    assert children.finish(lambda: children.train(run)) == 0
    assert tiny.result(run) == tiny.result(whole / "run")
    assert tiny.result(run)["checkpoint step and state"].startswith(f"[{children.STEPS},")
    RunFolder(run).verify()
    assert not [*stray_temporaries(run), *stray_temporaries(run / "checkpoints")]


def _killed_evaluation(whole: Path, folder: Path, kills: int, seed: int) -> None:
    rng, most, log = random.Random(seed), children.BATCHES // kills, folder.with_suffix(".log")
    run, kept = whole / "run", 0
    killed = 0
    for _ in range(kills):
        killed += children.kill_at_random(
            lambda reporter: children.evaluate(run, folder, reporter, log=log), 1, most, rng
        )
        # what was written once is never lost
        rows = _rows(folder)
        assert rows >= kept
        kept = rows
    assert killed
    assert children.finish(lambda: children.evaluate(run, folder, log=log)) == 0
    assert _table(folder) == _table(whole / "evaluation")
    RunFolder(folder).verify()
    attacked = log.read_text().split()
    assert len(attacked) - len(set(attacked)) <= killed * children.BATCH


def _rows(folder: Path) -> int:
    if not (folder / "ledger.sqlite").is_file():
        return 0
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        return len(ledger.rows())


def _killed_shards(whole: Path, folder: Path, kills: int, seed: int) -> None:
    """Two processes share the evaluation; each is killed so many times while the other one works."""
    rng, run = random.Random(seed), whole / "run"

    def work(number: int, times: int) -> Callable[[], object]:
        part = Conduct(limits=Limits(shard=Shard(number, 2)))

        def killed() -> None:
            one = random.Random(seed + number)
            children.kill_at_random(
                lambda reporter: children.evaluate(run, folder, reporter, conduct=part),
                times,
                children.BATCHES // 4,
                one,
            )
            assert children.finish(lambda: children.evaluate(run, folder, conduct=part)) == 0

        return killed

    pids = [children.fork(work(number, kills + rng.randint(0, 1))) for number in (1, 2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert _table(folder) == _table(whole / "evaluation")
    assert RunFolder(folder).status() == "finished"
    RunFolder(folder).verify()


def _table(folder: Path) -> str:
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        return ledger.table_sha256()


def test_a_killed_training_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    _killed_training(whole, tmp_path / "run", kills=3, seed=_seed())


def test_a_killed_evaluation_ends_with_the_same_verdicts(whole: Path, tmp_path: Path) -> None:
    _killed_evaluation(whole, tmp_path / "evaluation", kills=3, seed=_seed())


def test_killed_shards_end_with_the_same_verdicts(whole: Path, tmp_path: Path) -> None:
    _killed_shards(whole, tmp_path / "evaluation", kills=2, seed=_seed())


@pytest.mark.nightly
def test_shards_killed_25_times(whole: Path, tmp_path: Path) -> None:
    _killed_shards(whole, tmp_path / "evaluation", kills=12, seed=_seed())


@pytest.mark.nightly
def test_a_training_killed_25_times(whole: Path, tmp_path: Path) -> None:
    _killed_training(whole, tmp_path / "run", kills=25, seed=_seed())


@pytest.mark.nightly
def test_an_evaluation_killed_25_times(whole: Path, tmp_path: Path) -> None:
    _killed_evaluation(whole, tmp_path / "evaluation", kills=25, seed=_seed())
