"""Recipes with a mistake: never a traceback, and the page names the file, the line and the key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Command
from hypothesis import HealthCheck, given, seed, settings
from mutations import Mutated, broken_texts, recipes

SHARE, ALL = 60, 500
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _check(command: Command, folder: Path, mutated: Mutated) -> None:
    recipe, run = folder / "mine.yaml", folder / "run"
    recipe.write_text(mutated.text, encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)
    code, out, err = command(["train", str(recipe), "--out", str(run)])
    seen = f"{mutated.how} of {mutated.key}, line {mutated.line}:\n{err}"
    assert code in (2, "started"), seen
    if code == "started":
        return
    assert out == "" and err.startswith("error: "), seen
    assert not run.exists(), seen
    assert err.isprintable() or all(line.isprintable() for line in err.splitlines()), seen
    lines = [int(line) for line in re.findall(rf"{re.escape(str(recipe))}:(\d+)", err)]
    # what a missing key takes its default for may disagree with others: one of these is named instead
    assert lines or mutated.how == "remove", seen
    if mutated.line and mutated.how != "remove":
        name = mutated.key.rpartition(".")[2]
        assert mutated.line in lines or name in err, seen


@seed(0)
@settings(max_examples=SHARE, deadline=None, suppress_health_check=QUIET, database=None)
@given(mutated=recipes())
def test_mutated_recipes(command: Command, folder: Path, mutated: Mutated) -> None:
    _check(command, folder, mutated)


@pytest.mark.nightly
@settings(max_examples=ALL, deadline=None, suppress_health_check=QUIET)
@given(mutated=recipes())
def test_500_mutated_recipes(command: Command, folder: Path, mutated: Mutated) -> None:
    _check(command, folder, mutated)


@seed(0)
@settings(max_examples=SHARE, deadline=None, suppress_health_check=QUIET, database=None)
@given(text=broken_texts())
def test_broken_files(command: Command, folder: Path, text: bytes) -> None:
    recipe = folder / "broken.yaml"
    recipe.write_bytes(text)
    code, out, err = command(["recipes", "show", str(recipe), "--resolved"])
    assert code in (0, 2), err
    assert code == 0 or (out == "" and re.search(rf"error: .*\n?.*{re.escape(str(recipe))}", err)), err
