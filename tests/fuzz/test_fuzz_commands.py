"""Command lines with mistakes: never a traceback, always one message and a documented exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import Command
from hypothesis import HealthCheck, given, seed, settings
from mutations import command_lines

SHARE, ALL = 25, 600
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

TINY = ["--set", "training.epochs=1", "--set", "training.batch_size=64", "--set", "validation.n=10"]


@pytest.fixture(scope="module")
def paths(folder: Path) -> dict[str, Path]:
    """What the words of a mutated command line stand for: a run that can be evaluated, a file, a folder, nothing.

    Named before `command`: this is trained in earnest.
    """
    from phalanx.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["phalanx", "train", "digits-st", "--out", str(folder / "finished"), *TINY])
        with pytest.raises(SystemExit):
            main()
    (folder / "file").write_bytes(bytes(range(256)))
    (folder / "some").mkdir()
    (folder / "some/thing").touch()
    return {"RUN": folder / "finished", "FILE": folder / "file", "FOLDER": folder / "some", "NEW": folder / "new"}


def _spelled(word: str, paths: dict[str, Path]) -> str:
    for name, path in paths.items():
        word = word.replace(name, str(path))
    return word


def _check(command: Command, folder: Path, paths: dict[str, Path], line: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        (folder / "here").mkdir(exist_ok=True)
        patch.chdir(folder / "here")
        code, out, err = command([_spelled(word, paths) for word in line])
    seen = f"phalanx {' '.join(map(repr, line))}: {code}\n{err}"
    assert code in (0, 2, "started"), seen
    assert "Traceback" not in out + err, seen
    if code == 2:
        assert err.strip() and len(err.splitlines()) < 40, seen


@seed(0)
@settings(max_examples=SHARE, deadline=None, suppress_health_check=QUIET, database=None)
@given(line=command_lines())
def test_mutated_command_lines(paths: dict[str, Path], command: Command, folder: Path, line: list[str]) -> None:
    _check(command, folder, paths, line)


@pytest.mark.nightly
@settings(max_examples=ALL, deadline=None, suppress_health_check=QUIET)
@given(line=command_lines())
def test_100_mutated_command_lines(paths: dict[str, Path], command: Command, folder: Path, line: list[str]) -> None:
    _check(command, folder, paths, line)
