"""A run that was stopped anywhere and taken up again ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from method_samples import TurnByTurn
from torch import nn

import tiny
from phalanx.errors import Interrupted
from phalanx.evaluation import protocol, validation
from phalanx.methods import ST, FreeAT, Method
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_latest, save_checkpoint
from phalanx.runs.metrics import read_metrics
from phalanx.training import AWP, Adam
from phalanx.training.loop import trained_seconds

STEPS = 9


class Case(NamedTuple):
    model: Callable[[int], nn.Module]
    method: Callable[[], Method]
    settings: dict[str, Any]


def _mlps(seed: int) -> nn.Module:
    model: nn.Module = tiny.mixture(seed=seed)
    return model


def _noisy(seed: int) -> nn.Module:
    model: nn.Module = tiny.mixture(top_k="all", seed=seed, expert="tiny:noisy_cnn")
    return model


CASES = {
    "st": Case(_mlps, ST, {}),
    "at": Case(_mlps, tiny.at, {"optimizer": Adam(lr=0.01), "augment": ("translate:1",)}),
    "ema": Case(_mlps, ST, {"ema_decay": 0.9}),
    "ema from the second epoch": Case(_mlps, ST, {"ema_decay": 0.9, "ema_start_epoch": 1}),
    "awp": Case(_noisy, tiny.at, {"awp": AWP(gamma=0.02, warmup_epochs=1), "ema_decay": 0.9}),
    "free": Case(_mlps, lambda: FreeAT(replays=2).within(tiny.THREAT), {"awp": AWP()}),
    "bf16": Case(_mlps, tiny.at, {"precision": "bf16", "clip_norm": 1.0}),
    "batchnorm and dropout": Case(_noisy, tiny.at, {"ema_decay": 0.9}),
    "two players": Case(_mlps, TurnByTurn, {}),
}


def _train(folder: Path, case: Case, seed: int = 0, **settings: Any) -> None:
    attack = protocol("pgd-2", tiny.THREAT).members[0].attack
    tiny.run_training(
        folder,
        case.model(seed),
        case.method(),
        epochs=3,
        validate=validation(tiny.digits().val, attack),
        **{"checkpoint_seconds": 0.0, **case.settings, **settings},
    )


@pytest.mark.parametrize("name", CASES)
def test_stopped_at_random_steps(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    _train(tmp_path / "whole", case)
    rng = random.Random(name)
    for crash in range(3):
        # every step saved, or only the first: then a crash goes back to where the run was taken up
        seconds = rng.choice([0.0, 0.0, 3600.0]) if crash else 0.0
        with pytest.raises(tiny.Stop):
            steps = rng.randint(1, 2)
            # a freshly built model has other weights: all that counts must come from the checkpoint
            _train(tmp_path / "stopped", case, crash, checkpoint_seconds=seconds, reporter=tiny.StopAt(steps))
    _train(tmp_path / "stopped", case, seed=7)
    assert tiny.result(tmp_path / "stopped") == tiny.result(tmp_path / "whole")
    assert tiny.result(tmp_path / "whole")["checkpoint step and state"].startswith(f"[{STEPS},")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_first(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    case = CASES["two players"]
    _train(tmp_path / "whole", case)
    stop = tiny.StopAt(5, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match="stopped at step 5 of 9, saved; the same command goes on") as caught:
        _train(tmp_path / "stopped", case, checkpoint_seconds=3600.0, reporter=stop)
    assert (caught.value.signum, caught.value.exit_code) == (signum, code)
    kept = load_latest(tmp_path / "stopped/checkpoints")
    assert kept is not None and kept.step == 5
    _train(tmp_path / "stopped", case, seed=1)
    assert tiny.result(tmp_path / "stopped") == tiny.result(tmp_path / "whole")


@pytest.mark.parametrize("where", ["save.open", "save.rename", "save.latest", "save.prune", "save.end"])
def test_a_signal_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    case = CASES["st"]
    _train(tmp_path / "whole", case)
    passed: list[str] = []

    def failpoint(name: str) -> None:
        passed.append(name)
        if name == where and passed.count(where) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("phalanx.runs.checkpoint.failpoint", failpoint)
        with pytest.raises(Interrupted):
            _train(tmp_path / "stopped", case)
    _train(tmp_path / "stopped", case)
    assert tiny.result(tmp_path / "stopped") == tiny.result(tmp_path / "whole")


def test_a_second_signal_does_not_wait_for_the_step(tmp_path: Path) -> None:
    def insist() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, CASES["st"], reporter=tiny.StopAt(5, insist))
    before = tiny.result(tmp_path)["checkpoint step and state"]
    assert before.startswith("[5,")
    _train(tmp_path, CASES["st"])


def test_a_finished_run_taken_up_again_changes_nothing(tmp_path: Path) -> None:
    _train(tmp_path, CASES["at"])
    before = tiny.result(tmp_path)
    _train(tmp_path, CASES["at"], seed=1)
    assert tiny.result(tmp_path) == before


class _Slow(tiny.StopAt):
    """Every step takes ten seconds."""

    def __init__(self, clock: list[float], steps: int) -> None:
        super().__init__(steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
        self.clock = clock

    def progress(self, done: int, total: int, note: str) -> None:
        self.clock[0] += 10
        super().progress(done, total, note)


def _logged_seconds(folder: Path) -> list[float]:
    return [record["seconds"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


def test_the_clock_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("phalanx.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    case = CASES["st"]
    _train(tmp_path / "whole", case, reporter=_Slow(clock, -1))
    with pytest.raises(Interrupted):
        _train(tmp_path / "stopped", case, reporter=_Slow(clock, 5))
    # the time in between is nobody's
    clock[0] += 1000
    run = RunFolder(tmp_path / "stopped")
    assert trained_seconds(run) == 50 and trained_seconds(RunFolder(tmp_path / "new")) == 0
    _train(run.path, case, reporter=_Slow(clock, -1))
    assert _logged_seconds(run.path) == _logged_seconds(tmp_path / "whole") == [20, 50, 80]


def test_a_checkpoint_without_the_time_is_taken_up(tmp_path: Path) -> None:
    case = CASES["st"]
    with pytest.raises(tiny.Stop):
        _train(tmp_path, case, reporter=tiny.StopAt(5))
    kept = load_latest(tmp_path / "checkpoints")
    assert kept is not None and kept.state["metrics"].pop("seconds") > 0
    save_checkpoint(tmp_path / "checkpoints", kept.step, kept.tensors, kept.state)
    _train(tmp_path, case)
    assert tiny.result(tmp_path)["checkpoint step and state"].startswith(f"[{STEPS},")


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    case = CASES["st"]
    _train(tmp_path / "whole", case)
    folder = tmp_path / "stopped"
    with pytest.raises(tiny.Stop):
        _train(folder, case, reporter=tiny.StopAt(5))
    newest = folder / "checkpoints/step-00000005/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    reporter = tiny.StopAt(-1)
    _train(folder, case, seed=1, reporter=reporter)
    assert any(str(newest) in message and "sha256" in message for message in reporter.messages)
    assert tiny.result(folder) == tiny.result(tmp_path / "whole")


def test_the_run_folder_stays_clean(tmp_path: Path) -> None:
    _train(tmp_path, CASES["st"])
    assert {name for name in RunFolder(tmp_path).files() if not name.startswith("checkpoints/")} == {
        "best.safetensors", "best.safetensors.sha256", "last.safetensors", "last.safetensors.sha256",
        "metrics.jsonl", "run.json",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "LATEST", "step-00000008", "step-00000009",
    ]  # fmt: skip
