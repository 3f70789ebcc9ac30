"""Three answers for each sample, and what submitted images take."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import HonestyError
from phalanx.runs import Verdict, summarise
from phalanx.runs.headline import challenges, headline
from phalanx.runs.summary import external_attacks
from phalanx.runs.verdict import Outcome
from verdicts import verdict

SPEC = {"attack": "PGD", "norm": "Linf", "eps": "8/255", "surface": "whole"}


def row(sample: int, attack: str, outcome: Outcome, *, clean: bool = True) -> Verdict:
    return verdict(sample, attack, outcome, clean_predicted=1 if clean else 2)


def external(when: str, **changes: Any) -> dict[str, Any]:
    return {**SPEC, "attack": "Given", "external": True, "sha256": "ab" * 32, "count": 2, "when": when, **changes}


CLEAN = [row(sample, "clean", "held") for sample in range(5)] + [row(5, "clean", "broken", clean=False)]
PGD = [row(0, "pgd", "broken"), row(1, "pgd", "timeout"), *(row(sample, "pgd", "held") for sample in (2, 3, 4))]


def test_each_sample_is_broken_certified_or_undecided() -> None:
    found = headline([*CLEAN, *PGD], certified={2, 1})
    assert (found.broken, found.certified, found.undecided) == ({0, 5}, {1, 2}, {3, 4})
    assert found.n == 6


def test_a_sample_that_is_certified_and_broken_is_an_error_that_names_it() -> None:
    with pytest.raises(HonestyError, match=r"samples 0, 5 both certified and broken: a certificate is unsound"):
        headline([*CLEAN, *PGD], certified={0, 2, 5})
    alice = row(3, "external:alice", "broken")
    assert headline([*CLEAN, *PGD], certified={3}).certified == {3}
    with pytest.raises(HonestyError, match=r"sample 3 both"):
        headline([*CLEAN, *PGD, alice], certified={3})
    # what lies outside the threat contradicts nothing
    assert headline([*CLEAN, *PGD, row(3, "pgd:1", "broken")], aside=["pgd:1"], certified={3}).certified == {3}
    with pytest.raises(HonestyError, match="sample 9 certified, but not in the ledger"):
        headline(CLEAN, certified={9})


def test_without_a_submission_nothing_is_summarised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.runs.headline.summarise", lambda *rows, **options: pytest.fail("a whole ledger"))
    assert challenges([*CLEAN, *PGD], {"pgd": SPEC}) == ()


def test_submitted_images_lower_and_leave_nothing_to_try() -> None:
    specs = {"pgd": SPEC, "external:a": external("2"), "external:b": external("1")}
    assert external_attacks(specs) == ("external:a", "external:b")
    rows = [*CLEAN, *PGD, row(2, "external:a", "broken"), row(3, "external:a", "held"), row(2, "external:b", "broken")]
    before = summarise([*CLEAN, *PGD], attacks={"pgd": SPEC})
    after = summarise(rows, attacks=specs)
    assert (before.robust, after.robust, after.incomplete) == (3, 2, 0)
    assert [(done.untried, done.tried) for done in after.attacks if done.attack == "external:a"] == [(0, 2)]
    # declared and not yet there: a merge that was killed in between
    assert summarise([*CLEAN, *PGD], attacks=specs).robust == 3
    # without the declaration they would be an attack that the other samples have still to meet
    assert summarise(rows).incomplete > 0
    one, two = challenges(rows, specs)
    assert (one.name, one.judged, one.broken, one.lowered) == ("b", 1, 1, 1)
    assert (two.name, two.judged, two.broken, two.lowered, two.submitted) == ("a", 2, 1, 1, 2)


def test_no_submission_ever_raises_a_headline() -> None:
    for outcome in ("held", "broken", "invalid", "timeout"):
        for sample in range(6):
            specs = {"pgd": SPEC, "external:a": external("1")}
            rows = [*CLEAN, *PGD, row(sample, "external:a", outcome, clean=sample != 5)]
            found = summarise(rows, attacks=specs)
            assert found.robust == 3 - (sample in (2, 3, 4) and outcome != "held")
            assert found.clean_correct == 5 and found.incomplete == 0
