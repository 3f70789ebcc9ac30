from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import CorruptError
from phalanx.runs.summary import AttackSummary, aside_attacks, held_by_all, summarise, wilson
from phalanx.runs.verdict import Outcome, Verdict


def _row(
    sample: int,
    attack: str,
    verdict: Outcome,
    *,
    restart: int = 0,
    surface: str = "whole",
    flipped: bool | None = None,
    **changes: int,
) -> Verdict:
    label = changes.get("label", 1)
    predicted = label if verdict == "held" else 0
    clean = predicted if attack == "clean" else label
    clean = changes.get("clean_predicted", clean)
    return Verdict(sample, label, attack, surface, restart, verdict, predicted, clean, flipped, 0.0, 0.0, 1, -1)


def test_wilson_by_hand() -> None:
    # 5 of 10, z^2 = 3.841459: centre (0.5 + 0.192073) / 1.384146 = 0.5; half =
    # 1.959964 / 1.384146 * sqrt(0.025 + 3.841459 / 400) = 1.416010 * 0.186022 = 0.263410
    assert wilson(5, 10) == pytest.approx((0.236590, 0.763410), abs=1e-5)
    # 0 of 10: high = z^2 / (10 + z^2) = 3.841459 / 13.841459
    assert wilson(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-6))
    assert wilson(10, 10) == (pytest.approx(0.722467, abs=1e-6), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)
    # z = 1, 1 of 1: centre (1 + 1/2) / 2 = 0.75, half = sqrt(1/4) / 2 = 0.25
    assert wilson(1, 1, z=1.0) == (0.5, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_nonsense(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"in 0\.\.n={n}, got {successes}"):
        wilson(successes, n)


@given(n=st.integers(1, 5000), data=st.data())
def test_wilson_holds_the_proportion_and_is_symmetric(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    # the defining equation: each end is z standard errors from the observed share
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_a_ledger_by_hand() -> None:
    rows = [
        _row(0, "clean", "held"),
        _row(0, "pgd", "held"),
        _row(0, "pgd", "held", restart=1),
        _row(0, "square", "held"),
        _row(1, "clean", "held"),  # broken by the second restart only
        _row(1, "pgd", "held"),
        _row(1, "pgd", "broken", restart=1),
        _row(2, "clean", "held"),  # held by pgd, invalid under square
        _row(2, "pgd", "held"),
        _row(2, "square", "invalid"),
        _row(3, "clean", "held"),
        _row(3, "pgd", "timeout"),
        _row(4, "clean", "broken"),  # wrong on clean input: only its clean row
        _row(5, "clean", "invalid"),
        _row(6, "clean", "held"),  # square has not come to it yet
        _row(6, "pgd", "held"),
        _row(7, "clean", "held"),
        _row(7, "pgd", "held"),
        _row(7, "square", "held"),
    ]
    summary = summarise(rows)
    # right on clean input: 0, 1, 2, 3, 6, 7; robust: 0 and 7; 6 is not tried by all yet
    assert (summary.n, summary.clean_correct, summary.robust, summary.incomplete) == (8, 6, 2, 1)
    assert summary.attacks == (
        AttackSummary("pgd", "whole", held=4, broken=1, invalid=0, timeout=1, untried=0, n=8),
        AttackSummary("square", "whole", held=2, broken=0, invalid=1, timeout=0, untried=3, n=8),
    )
    assert summary.clean_accuracy == 6 / 8
    assert summary.robust_accuracy == 2 / 8
    assert summary.robust_interval == wilson(2, 8)
    assert summary.clean_interval == wilson(6, 8)
    assert summary.attacks[1].accuracy == 2 / 8
    assert summary.attacks[1].interval == wilson(2, 8)


def test_nothing_is_nothing() -> None:
    summary = summarise([])
    assert (summary.n, summary.robust_accuracy, summary.robust_interval) == (0, 0.0, (0.0, 1.0))


def test_attacking_a_wrong_sample_does_not_make_it_robust() -> None:
    rows = [_row(0, "clean", "broken"), _row(0, "pgd", "held", clean_predicted=2)]
    assert (summarise(rows).robust, summarise(rows).attacks[0].held) == (0, 0)
    # without a clean row the clean prediction decides
    assert summarise(rows[1:]).clean_correct == 0


def test_a_non_finite_loss_is_not_robust() -> None:
    nan = Verdict(0, 1, "pgd", "whole", 0, "held", 1, 1, None, math.nan, 0.0, 1, -1)
    summary = summarise([_row(0, "clean", "held"), nan])
    assert (summary.robust, summary.attacks[0].invalid) == (0, 1)


def test_surfaces_are_kept_apart_and_worst_case_spans_them() -> None:
    rows = [
        _row(0, "clean", "held"),
        _row(0, "pgd", "held", surface="whole"),
        _row(0, "pgd", "broken", surface="router"),
    ]
    summary = summarise(rows)
    assert [(entry.surface, entry.held) for entry in summary.attacks] == [("router", 0), ("whole", 1)]
    assert summary.robust == 0


def test_attacks_that_stand_aside_are_summed_up_and_have_no_say() -> None:
    rows = [
        *(_row(sample, "clean", "held") for sample in range(4)),
        _row(0, "pgd", "held"),
        _row(1, "pgd", "held"),
        _row(2, "pgd", "held"),
        _row(3, "pgd", "broken"),
        _row(0, "released", "broken"),
        _row(1, "released", "invalid"),
        # samples 2 and 3 have not been tried by it
    ]
    everything, aside = summarise(rows), summarise(rows, aside={"released"})
    assert (everything.robust, everything.incomplete) == (0, 1)
    assert (aside.robust, aside.incomplete) == (3, 0)
    assert aside.attacks == everything.attacks
    assert aside.attacks[1] == AttackSummary(
        "released", "whole", held=0, broken=1, invalid=1, timeout=0, untried=2, n=4
    )


LINF = {"norm": "Linf", "eps": "8/255"}


@pytest.mark.parametrize(
    ("changes", "aside"),
    [
        ({}, False),
        ({"eps": "7/255"}, False),
        ({"eps": 0.03}, False),
        ({"eps": "0.0314"}, True),
        ({"eps": "0.03137"}, False),
        ({"eps": "8 / 255"}, False),
        ({"eps": "16/510"}, False),
        ({"eps": 8 / 255}, False),
        ({"eps": "9/255"}, True),
        ({"eps": 0.04}, True),
        ({"norm": "L2"}, True),
        ({"norm": "L1", "eps": 0}, True),
        ({"norm": None}, False),
        ({"eps": None}, False),
        ({"reproduction": True}, True),
        ({"reproduction": True, "eps": "1/255"}, True),
    ],
)
def test_what_stands_aside(changes: dict[str, Any], aside: bool) -> None:
    specs = {"pgd-50": LINF, "this": {**LINF, **changes}}
    assert aside_attacks(specs, "Linf", "8/255") == (("this",) if aside else ())


@pytest.mark.parametrize("eps", ["0.1", 0.1, "1/10", 1e-1])
def test_one_radius_however_it_is_written(eps: str | float) -> None:
    others: list[str | float] = ["0.1", 0.1, "1/10", "0.10"]
    assert aside_attacks({str(other): {"norm": "L2", "eps": other} for other in others}, "L2", eps) == ()
    assert aside_attacks({"pgd": {"norm": None, "eps": eps}}, "L2", eps) == ("pgd",)  # no norm is Linf


@pytest.mark.parametrize("eps", ["8/0", "all", [1], "1e999"])
def test_a_radius_that_is_no_number(eps: Any) -> None:
    with pytest.raises(CorruptError, match=r"a ledger's eps must be a number or a fraction, got .*; evaluate again"):
        aside_attacks({"pgd": {"norm": "Linf", "eps": eps}}, "Linf", "8/255")


def test_a_union_is_held_by_all_of_its_attacks() -> None:
    rows = [
        *(_row(sample, "clean", "held" if sample < 5 else "broken") for sample in range(6)),
        _row(0, "pgd", "held"),
        _row(0, "pgd", "held", surface="router"),
        _row(1, "pgd", "held"),
        _row(1, "pgd", "broken", surface="router"),
        _row(2, "pgd", "held"),  # untried on the router
        _row(3, "pgd", "held"),
        _row(3, "pgd", "broken", restart=1),  # one restart is enough
        _row(3, "pgd", "held", surface="router"),
        _row(4, "pgd", "timeout"),
        _row(4, "pgd", "held", surface="router"),
        _row(5, "pgd", "held", clean_predicted=2),  # wrong when clean
    ]
    whole, router = ("pgd", "whole"), ("pgd", "router")
    choices = {"none": (), "whole": [whole], "router": [router], "both": [whole, router], "other": [("fgsm", "whole")]}
    # whole holds 0 1 2, the router 0 3 4
    assert held_by_all(rows, choices) == {"none": 5, "whole": 3, "router": 3, "both": 1, "other": 0}


def test_flips_are_counted_where_the_route_is_known() -> None:
    rows = [
        *(_row(sample, "clean", "held") for sample in range(4)),
        _row(0, "pgd", "held", flipped=True),
        _row(1, "pgd", "broken", flipped=False),
        _row(1, "pgd", "held", flipped=True, restart=1),  # in any restart
        _row(2, "pgd", "held", flipped=False),
        _row(3, "pgd", "held"),  # no route
        _row(4, "clean", "broken"),
        _row(4, "pgd", "held", flipped=True, clean_predicted=2),  # wrong when clean
    ]
    (attack,) = summarise(rows).attacks
    assert (attack.routed, attack.flipped) == (3, 2)


def test_two_labels_of_one_sample_are_refused() -> None:
    with pytest.raises(CorruptError, match=r"sample 4 has the labels \[1, 2\]"):
        summarise([_row(4, "clean", "held"), _row(4, "pgd", "held", label=2)])


_ROWS = st.builds(
    _row,
    st.integers(0, 5),
    st.sampled_from(["clean", "pgd", "square"]),
    st.sampled_from(["held", "broken", "invalid", "timeout"]),
    restart=st.integers(0, 1),
    surface=st.sampled_from(["whole", "router"]),
)


@given(st.lists(_ROWS, max_size=30), st.integers(0, 99))
def test_more_rows_are_never_more_robust_and_order_does_not_matter(rows: list[Verdict], seed: int) -> None:
    summary = summarise(rows)
    assert summarise(random.Random(seed).sample(rows, len(rows))) == summary
    assert summary.robust <= summary.clean_correct <= summary.n
    for entry in summary.attacks:
        assert entry.held + entry.broken + entry.invalid + entry.timeout + entry.untried == summary.clean_correct
        assert summary.robust <= entry.held
    keys = {(entry.attack, entry.surface) for entry in summary.attacks}
    unions = held_by_all(rows, {"all": keys, "none": (), **{key: [key] for key in keys}})
    assert (unions["all"], unions["none"]) == (summary.robust, summary.clean_correct)
    assert all(unions[entry.attack, entry.surface] == entry.held for entry in summary.attacks)
    aside = summarise(rows, aside={"pgd"})
    assert aside.robust == held_by_all(rows, {"": {key for key in keys if key[0] != "pgd"}})[""]
    # once every sample is there, each further row can only break
    everyone = [_row(sample, "clean", "held") for sample in range(6)]
    summaries = [summarise(everyone + rows[:length]) for length in range(len(rows) + 1)]
    standing = [summary.robust + summary.incomplete for summary in summaries]
    assert all(later <= earlier for earlier, later in pairwise(standing))
