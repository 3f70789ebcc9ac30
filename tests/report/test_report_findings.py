from __future__ import annotations

from pathlib import Path

from report_sample import (
    DUAL,
    ROUTING,
    config,
    epochs,
    make_evaluation,
    make_run,
    make_source,
    make_view,
    page_of,
    spec,
    specs_of,
)

from phalanx.report import Page, RowSource
from phalanx.report.opening import headlines

AUTOATTACK = {
    "apgd-100": spec("APGD", steps=100, restarts=5),
    "apgd-t-100x9": spec("APGDTargeted", steps=100, objective="dlr_targeted", after=["apgd-100"]),
    "fab-t-100x9": spec("FAB", steps=100, after=["apgd-100", "apgd-t-100x9"]),
    "square-5000": spec("Square", objective="margin", after=["apgd-100", "apgd-t-100x9", "fab-t-100x9"]),
}


def _caveats(page: Page) -> str:
    return " ".join(page.caveats)


def test_the_summary_tells_the_model_and_its_numbers(page: Page) -> None:
    # Wilson: 8 of 10 is [0.490, 0.943], 5 of 10 is [0.237, 0.763]
    assert page.summary == (
        "One model was evaluated on digits: AT (4 small_cnn experts, 1 of which answers each image, 36,282 parameters, "
        "trained with method at).",
        "Of 10 images, AT classifies 80.0 % [49.0, 94.3] correctly when they are clean "
        "and 50.0 % [23.7, 76.3] under pgd-50 (Linf 8/255).",
    )


def test_several_attacks_are_told_as_a_worst_case(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hhhhb", attacks={"fgsm": "bhhh", "pgd-50": "hhhb"}))
    assert "40.0 % [11.8, 76.9] in the worst case over fgsm and pgd-50 (Linf 8/255)" in page.summary[1]


def test_of_many_rows_the_most_robust_is_told(tmp_path: Path) -> None:
    held = {"A": "hbbbbbbb", "B": "hhhhhbbb", "C": "hhbbbbbb", "D": "bbbbbbbb"}
    page = page_of(*(make_source(tmp_path, label, attacks={"pgd-50": outcomes}) for label, outcomes in held.items()))
    assert page.summary[0].startswith("4 models were evaluated on digits; the most robust of them is B (")
    assert len(page.summary) == 2


def test_one_expert_and_a_row_without_attacks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(experts=1))
    page = page_of(RowSource("one", run, make_evaluation(tmp_path / "e", attacks={}, load=None)))
    assert "a single small_cnn, 36,282 parameters" in page.summary[0]
    assert page.summary[1].endswith("when they are clean; it has not been attacked.")
    assert "No attack has been run" in page.caveats[0]
    assert "routing-aware" not in _caveats(page)


def test_what_is_missing_is_named(page: Page) -> None:
    assert page.caveats[0].startswith("Only PGD has been run, no AutoAttack")
    assert "No routing-aware attack" in _caveats(page)
    assert "started once per image" in _caveats(page)
    # the widest interval at n = 10 is that of 5 of 10: 2 * 26.34 points
    assert "10 images are few: the 95 % intervals are up to 52.7 points wide" in _caveats(page)


def test_what_was_done_is_not_called_missing(tmp_path: Path) -> None:
    specs = {**AUTOATTACK, "flip": spec("PGD", surface="router", restarts=5)}
    page = page_of(make_source(tmp_path, clean="h" * 1000, attacks=dict.fromkeys(specs, "h" * 1000), specs=specs))
    assert page.caveats == (
        "Each row is one training run with one seed: the intervals do not hold the spread between seeds.",
    )


def test_a_part_of_autoattack_or_a_smaller_budget_is_not_autoattack(tmp_path: Path) -> None:
    weak = {"apgd-1": spec("APGD", steps=1), "fab-1": spec("FAB", steps=1), "square-1": spec("Square", queries=1)}
    page = page_of(make_source(tmp_path, attacks=dict.fromkeys(weak, "h" * 10), specs=weak))
    assert "not the whole of AutoAttack" in page.caveats[0]
    whole = make_source(tmp_path, "B", attacks=dict.fromkeys(AUTOATTACK, "h" * 10), specs=AUTOATTACK)
    both = page_of(make_source(tmp_path, "A", attacks=dict.fromkeys(weak, "h" * 10), specs=weak), whole)
    assert both.caveats[0].startswith("Of A robust accuracy is an upper bound")


def test_autoattack_aims_at_no_route(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, attacks=dict.fromkeys(AUTOATTACK, "h" * 10), specs=AUTOATTACK))
    assert "No routing-aware attack" in _caveats(page)
    assert "4 attacks, 0 of them aimed at routes" in headlines(page)[0].protocol
    assert [figure.share for figure in headlines(page)[0].figures[:2]] == ["80.0 %"] * 2
    transfer = {"experts-apgd-100": spec("ExpertTransfer", steps=100)}
    aimed = page_of(make_source(tmp_path, "B", attacks=dict.fromkeys(transfer, "h" * 10), specs=transfer))
    assert "No routing-aware attack" not in _caveats(aimed)


def test_rows_that_do_not_compare_say_so(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "A"), make_source(tmp_path, "B", eps="4/255", data_sha256="11" * 32))
    for said in ("different images", "different budgets", "Not every row faced every attack"):
        assert said in _caveats(page)


def test_attacks_on_halves_are_told_apart_from_missing_ones(tmp_path: Path) -> None:
    attacks = dict.fromkeys(DUAL, "h" * 4)
    common = {name: attacks[name] for name in ROUTING}
    single = make_source(tmp_path, clean="hhhh", attacks=common, specs=specs_of(ROUTING))
    dual = make_view(
        tmp_path,
        "dual",
        make_run(tmp_path / "st"),
        single.run,
        0.7,
        clean="hhhh",
        attacks=attacks,
        specs=specs_of(DUAL),
    )
    assert "also faced attacks on their halves" in _caveats(page_of(single, dual))
    assert "Not every row faced" not in _caveats(page_of(single, dual))
    fewer = make_source(
        tmp_path, "B", clean="hhhh", attacks={"pgd-50": "hhhh"}, specs=specs_of({"pgd-50": ROUTING["pgd-50"]})
    )
    assert "Not every row faced every attack" in _caveats(page_of(fewer, dual))


def test_a_training_attack_without_gradient_is_an_alarm(tmp_path: Path) -> None:
    blind = [{**record, "zero_gradient": 0.31} for record in epochs(2) if record["kind"] == "train"]
    page = page_of(RowSource("AT", make_run(tmp_path / "run", records=blind), make_evaluation(tmp_path / "e")))
    assert [notice.kind for notice in page.notices] == ["alarm"]
    assert "up to 31.0 %" in page.notices[0].text


def test_timeouts_are_incomplete(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hhh", attacks={"pgd-50": "htb"}))
    assert [(notice.kind, notice.text) for notice in page.notices] == [
        ("incomplete", "1 of 3 correctly classified images ran out of time under pgd-50 and are not counted as robust.")
    ]


def test_a_sentence_does_not_list_many_attacks(tmp_path: Path) -> None:
    attacks = {"fgsm": "hhbh", "pgd-5": "hhhh", "pgd-50": "bhhh", "pgd-50x2": "bhhb"}
    page = page_of(make_source(tmp_path, clean="hhhh", attacks=attacks))
    # one of four is held by all
    assert "25.0 % [4.6, 69.9] in the worst case over the 4 attacks of the table (Linf 8/255)" in page.summary[1]
