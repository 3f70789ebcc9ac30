"""Cascades: each attack on what those before it have left standing, image by image, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from known_answers import FIVE, THREAT, Bright

import tiny
from phalanx.evaluation import Evaluation, Limits, Member, Protocol, Shard, evaluate, protocol
from phalanx.routing import MixtureOfExperts
from phalanx.runs import Ledger, summarise
from phalanx.threat import ThreatModel

SMALL = ThreatModel("Linf", "1/32")
MARGIN = 1e-5
"""Of images whose verdict is closer than this, rounding may decide."""


def cascade(names: str, threat: ThreatModel) -> Protocol:
    """A cascade of attacks that are not AutoAttack's: the same rules at a smaller cost."""
    found = protocol(names, threat)
    before = [member.name for member in found.members]
    return Protocol(
        names, tuple(Member(m.name, m.attack, tuple(before[:place])) for place, m in enumerate(found.members))
    )


SUITE = cascade("fgsm,apgd-6,apgd-t-4x3,fab-t-4x3,square-30", SMALL)


def _verdicts(found: Evaluation) -> list[tuple[object, ...]]:
    """Every verdict but those that rounding may decide."""
    return [
        (row.key, row.verdict, row.predicted, row.flipped)
        for row in found.rows
        if row.loss is None or abs(row.loss) > MARGIN
    ]


def test_each_attack_meets_what_still_stands(trained: MixtureOfExperts) -> None:
    test = tiny.digits().test
    found = evaluate(trained, test, SUITE, SMALL)
    alone = {m.name: evaluate(trained, test, protocol(m.name, SMALL), SMALL) for m in SUITE.members}
    standing = {row.sample for row in found.rows if row.attack == "clean" and row.verdict == "held"}
    for member in SUITE.members:
        tried = {row.sample: row.verdict for row in found.rows if row.attack == member.name}
        assert set(tried) == standing
        # the verdict is the one that the attack reaches by itself
        own = {row.sample: row.verdict for row in alone[member.name].rows if row.attack == member.name}
        assert tried == {sample: own[sample] for sample in tried}
        standing = {sample for sample, verdict in tried.items() if verdict == "held"}
    assert found.robust_acc == len(standing) / len(test) and 0 < found.robust_acc < found.clean_acc
    worst = evaluate(trained, test, protocol(SUITE.name, SMALL), SMALL)
    assert found.robust_acc == worst.robust_acc


def test_shares_and_what_was_spared(trained: MixtureOfExperts) -> None:
    summary = evaluate(trained, tiny.digits().test, SUITE, SMALL).summary
    assert [attack.attack for attack in summary.attacks] == [member.name for member in SUITE.members]
    left = summary.clean_correct
    for attack in summary.attacks:
        assert attack.tried == left and attack.untried == 0 and attack.spared == summary.clean_correct - left
        left -= attack.broken
        assert attack.held == left
    assert left == summary.robust and summary.incomplete == 0
    assert sum(attack.broken for attack in summary.attacks) == summary.clean_correct - summary.robust


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_verdicts_do_not_depend_on_batches_or_shards(
    trained: MixtureOfExperts, tmp_path: Path, size: int, shards: int
) -> None:
    test = tiny.digits().test.first(20)
    whole = evaluate(trained, test, SUITE, SMALL, batch_size=64, seed=3)
    path = tmp_path / "ledger.sqlite"
    for number in range(1, shards + 1):
        limits = Limits(shard=Shard(number, shards))
        found = evaluate(trained, test, SUITE, SMALL, batch_size=size, seed=3, ledger=path, limits=limits)
        assert found.finished == (number == shards) and found.planned == 20
    with Ledger.read(path) as ledger:
        assert {row.sample for row in ledger.rows()} == set(test.ids.tolist())
    union = evaluate(trained, test, SUITE, SMALL, batch_size=size, seed=3, ledger=path)
    assert _verdicts(union) == _verdicts(whole) and len(_verdicts(whole)) > 40
    assert union.load == pytest.approx(whole.load)


def test_a_part_of_a_cascade_is_no_robust_accuracy(trained: MixtureOfExperts) -> None:
    found = evaluate(trained, tiny.digits().test, SUITE, SMALL)
    rows = [row for row in found.rows if row.attack != "square-30"]
    known, unknown = summarise(rows, attacks=found.attacks), summarise(rows)
    # an attack that was declared and has no row yet: everything that stands is still to be tried
    assert (known.robust, known.incomplete) == (0, unknown.robust) and unknown.robust > 0
    assert known.standing == unknown.robust
    last = known.attacks[-1]
    assert (last.attack, last.untried, last.tried) == ("square-30", known.standing, 0)


def test_time_is_over_after_a_batch_and_the_next_call_goes_on(trained: MixtureOfExperts, tmp_path: Path) -> None:
    test, path = tiny.digits().test.first(20), tmp_path / "ledger.sqlite"
    whole = evaluate(trained, test, SUITE, SMALL, batch_size=4)
    calls, seen = 0, [0]
    while True:
        found = evaluate(trained, test, SUITE, SMALL, batch_size=4, ledger=path, limits=Limits(seconds=1e-9))
        calls += 1
        assert len(found.rows) > seen[-1]
        seen.append(len(found.rows))
        if found.finished:
            break
        assert f"RA at most {found.summary.standing / found.n:.1%}" in str(found) and "of 20" in str(found)
        assert found.load is None and found.summary.standing / found.n >= 0
    assert calls >= 5 and found.rows == whole.rows and found.load == pytest.approx(whole.load)
    assert (tmp_path / "ledger.sqlite.sha256").is_file()


def test_a_partial_answer_is_never_below_the_final_one(trained: MixtureOfExperts, tmp_path: Path) -> None:
    test, path = tiny.digits().test, tmp_path / "ledger.sqlite"
    final = evaluate(trained, test, SUITE, SMALL)
    held = {row.sample for row in final.rows if row.attack == "square-30" and row.verdict == "held"}
    for _ in range(8):
        part = evaluate(trained, test, SUITE, SMALL, batch_size=8, ledger=path, limits=Limits(seconds=1e-9))
        begun = {row.sample for row in part.rows}
        assert part.summary.standing >= len(begun & held)


def test_the_ledger_says_what_comes_after_what(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    evaluate(Bright(), FIVE, cascade("fgsm,pgd-8", THREAT), THREAT, ledger=path)
    with Ledger.read(path) as ledger:
        assert ledger.attacks()["pgd-8"]["after"] == ["fgsm"] and "after" not in ledger.attacks()["fgsm"]
        assert ledger.size() == 5


def test_standard_on_two_classes_is_what_it_can_be(tmp_path: Path) -> None:
    heard: list[str] = []
    found = evaluate(Bright(), FIVE, protocol("standard", THREAT), THREAT, notify=heard.append)
    assert (found.clean_acc, found.robust_acc) == (4 / 5, 2 / 5)
    assert found.attacks["apgd-t-100x9"]["objective"] == "margin" and found.attacks["apgd-t-100x9"]["targets"] == 1
    assert "apgd-t-100x9: dlr_targeted needs more than 2 classes; the margin is climbed instead" in heard
    assert "fab-t-100x9: of 2 classes 1 can be aimed at, not 9" in heard
