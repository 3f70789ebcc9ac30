"""The self-test: it passes, and goes red where what has to catch a flaw is taken away."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from phalanx.evaluation.honesty import suite
from phalanx.evaluation.honesty.finding import passed
from phalanx.workflow.selftest import CASES, Case, selftest

Run = Callable[..., tuple[int, str, str]]

QUICK = [case for case in CASES if case.plain != "standard"]
"""AutoAttack takes a quarter of a minute."""


def _cheap(case: Case) -> Case:
    return replace(case, plain="pgd-20") if case.plain == "standard" else case


def test_every_flaw_fools_a_plain_attack_and_is_caught() -> None:
    found = selftest([_cheap(case) for case in CASES])
    assert not found.failed, found.text()
    for case in found.cases:
        assert case.truth == 0 and case.reading >= 0.95 and case.caught_by and not case.missed_by


@pytest.mark.parametrize(("case", "check"), [(case, check) for case in CASES for check in case.checks])
def test_without_a_check_its_case_goes_red(case: Case, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = tuple(
        replace(each, look=lambda probe: passed("nothing seen")) if each.id == check else each for each in suite.CHECKS
    )
    monkeypatch.setattr(suite, "CHECKS", blind)
    found = selftest([_cheap(case)])
    assert found.failed == (case.name,) and found.cases[0].missed_by == (check,)
    assert f"MISSED by {check}" in found.text()


@pytest.mark.parametrize("case", [case for case in CASES if case.attack], ids=lambda case: case.name)
def test_without_its_attack_a_case_goes_red(case: Case) -> None:
    weak = replace(_cheap(case), attack="pgd-1:1/2550")
    found = selftest([weak])
    # an answer that is no number is never robust, however weak the attack
    assert found.failed == (() if case.name == "not a number" else (case.name,))


def test_a_flaw_that_fools_nobody_is_no_case() -> None:
    sharp = replace(CASES[0], plain="steer-5", checks=(), attack="")
    (found,) = selftest([sharp]).cases
    assert not found.passed and found.reading == 0 and found.verdict == "plain attack not fooled"


def test_command(phalanx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.workflow.selftest.selftest.__defaults__", (tuple(QUICK[:1]), None))
    code, out, err = phalanx("selftest", "--out", tmp_path / "selftest.json")
    assert code == 0, err
    assert "masked gradients" in out and "caught" in out
    assert json.loads((tmp_path / "selftest.json").read_text())["cases"][0]["passed"] is True
    red = (replace(QUICK[0], checks=("M1",)),)
    monkeypatch.setattr("phalanx.workflow.selftest.selftest.__defaults__", (red, None))
    code, out, err = phalanx("selftest")
    assert code == 7 and "MISSED by M1" in out and "the self-test failed (masked gradients)" in err
