from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from report_sample import config, epochs, make_evaluation, make_run, make_source, page_of, spec

from phalanx.errors import CorruptError, InputError
from phalanx.report import Page, RowSource, build_page
from phalanx.report.mixture import Mixture
from phalanx.runs.rate import Rate


def test_a_row_holds_what_the_folders_say(page: Page) -> None:
    (row,) = page.rows
    assert (row.label, row.status, row.method, row.mixtures) == ("AT", "finished", "at", (Mixture("small_cnn", 4, 1),))
    assert (row.architecture, row.alpha, row.is_dual, row.is_view) == ("4 x small_cnn, top-1", None, False, False)
    assert (row.parameters, row.seed, row.weights) == (36282, 0, "best")
    assert (row.clean, row.worst) == (Rate(8, 10), Rate(5, 10))
    (done,) = row.attacks
    assert done is not None
    # the two images wrong when clean are never attacked, and still count in n
    assert (done.held, done.broken, done.untried, done.n) == (5, 3, 0, 10)
    assert row.load == (0.4, 0.3, 0.2, 0.1)
    assert row.settings["model.router.name"] == "linear"
    assert row.settings["data.augment"] == ["translate:1"]
    assert row.measurement["eps"] == "8/255"
    assert row.environment["training.torch"] == "2.15.0"
    assert page.notices == ()


def test_the_page_is_made_of_plain_values(page: Page) -> None:
    json.dumps(asdict(page), allow_nan=False)


def test_curves_are_read_by_epoch(page: Page) -> None:
    curves = page.rows[0].curves
    assert [point.epoch for point in curves.train] == [1, 2, 3]
    assert curves.validation[-1].robust == Rate(120, 200)  # 0.1 + 0.5 of 200
    assert curves.validation_attack == "pgd-10, Linf 8/255"


def test_no_row_is_refused() -> None:
    with pytest.raises(InputError, match="at least one evaluated run"):
        build_page("t", "", [], "c")


def test_rows_keep_their_order_and_share_a_column_of_the_same_budget(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "B"), make_source(tmp_path, "A"))
    assert [row.label for row in page.rows] == ["B", "A"]
    assert [attack.label for attack in page.attacks] == ["pgd-50"]


def test_budgets_that_differ_do_not_share_a_column(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "A"), make_source(tmp_path, "B", eps="4/255"))
    assert [attack.label for attack in page.attacks] == ["pgd-50, Linf 8/255", "pgd-50, Linf 4/255"]
    assert [[done is not None for done in row.attacks] for row in page.rows] == [[True, False], [False, True]]


def test_a_seed_is_no_budget(tmp_path: Path) -> None:
    page = page_of(
        make_source(tmp_path, "A"),
        make_source(tmp_path, "B", specs={"pgd-50": spec(seed=7)}),
    )
    assert len(page.attacks) == 1
    assert [row.measurement["seed"] for row in page.rows] == [0, 7]


def test_the_worst_case_is_taken_by_sample(tmp_path: Path) -> None:
    # held by pgd-50: samples 0 1 2, by fgsm: 1 2 3; by both: 1 2
    page = page_of(make_source(tmp_path, clean="hhhhb", attacks={"fgsm": "bhhh", "pgd-50": "hhhb"}))
    (row,) = page.rows
    assert [done.held for done in row.attacks if done] == [3, 3]
    assert row.worst == Rate(2, 5)


def test_an_image_not_tried_by_every_attack_does_not_count_as_held(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hhhh", attacks={"fgsm": "hhhh", "pgd-50": "hb.."}))
    (row,) = page.rows
    assert row.worst == Rate(1, 4)
    assert any("2 of 4 correctly classified images were not attacked by pgd-50" in n.text for n in page.notices)


def test_an_attack_that_was_declared_and_not_begun_leaves_nothing_robust(tmp_path: Path) -> None:
    specs = {"fgsm": spec("FGSM"), "pgd-50": spec()}
    page = page_of(make_source(tmp_path, clean="hhb", attacks={"fgsm": "hh"}, specs=specs))
    (row,) = page.rows
    fgsm, pgd = row.attacks
    assert fgsm is not None
    assert pgd is not None
    assert (fgsm.held, pgd.held, pgd.untried, pgd.n) == (2, 0, 2, 3)
    assert row.worst == Rate(0, 3)


def test_an_invalid_verdict_is_never_robust(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hhhi", attacks={"pgd-50": "hii"}))
    (row,) = page.rows
    assert (row.clean, row.worst) == (Rate(3, 4), Rate(1, 4))
    assert [notice.kind for notice in page.notices] == ["invalid", "invalid"]


def test_an_evaluation_without_attacks_has_no_worst_case(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, attacks={}))
    assert page.rows[0].worst is None
    assert page.attacks == ()


def test_an_evaluation_that_did_not_end_says_so(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, ended=False))
    assert page.rows[0].weights is None
    assert [notice.kind for notice in page.notices] == ["incomplete"]
    assert "did not end" in page.notices[0].text


def test_fewer_images_than_planned_are_said(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, n=450))
    assert [notice.text for notice in page.notices] == ["Only 10 of 450 images were judged."]


def test_a_run_without_metrics_has_empty_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=[], finished=False)
    page = page_of(RowSource("AT", run, make_evaluation(tmp_path / "e")))
    assert page.rows[0].curves.train == ()
    assert "Training did not end: the run is running." in [notice.text for notice in page.notices]


def test_one_expert_has_no_load(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(experts=1), epochs(3, experts=1))
    page = page_of(RowSource("one", run, make_evaluation(tmp_path / "e", load=None)))
    (row,) = page.rows
    assert (row.load, row.largest_load, row.curves.load) == (None, None, ())


def test_alarms_are_prominent_and_told_once(tmp_path: Path) -> None:
    alarms = [
        {"kind": "alarm", "epoch": epoch, "alarm": "router_collapse", "message": f"router collapse in epoch {epoch}"}
        for epoch in (2, 3)
    ]
    run = make_run(tmp_path / "run", records=[*epochs(3), *alarms])
    page = page_of(RowSource("AT", run, make_evaluation(tmp_path / "e")))
    assert [(notice.kind, notice.text) for notice in page.notices] == [
        ("alarm", "Router collapse in epoch 2 (raised in 2 epochs, first shown)")
    ]


# -- what is wrong with the folders --------------------------------------------------------------------------------


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    source = RowSource("AT", make_run(tmp_path / "run"), tmp_path / "nothing")
    with pytest.raises(InputError, match=r"nothing/ledger\.sqlite.*evaluate first"):
        page_of(source)


def test_an_empty_ledger_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path, clean="", attacks={}, ended=False)
    with pytest.raises(InputError, match=r"ledger\.sqlite holds no verdict yet"):
        page_of(source)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"elsewhere is no run folder"):
        page_of(RowSource("AT", tmp_path / "elsewhere", make_evaluation(tmp_path / "e")))


def test_a_changed_file_of_a_finished_run_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    path = source.run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.2", b"0.9", 1))
    with pytest.raises(CorruptError, match=r"metrics\.jsonl is damaged"):
        page_of(source)


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (source.evaluation / "evaluation.json").write_text('{"schema": 1')
    with pytest.raises(CorruptError, match=r"evaluation\.json is damaged"):
        page_of(source)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_sha256": "00"}, "model_sha256 is '00'"),
        ({"threat": {"norm": "L2", "eps": "8/255"}}, "norm is 'L2'"),
        ({"threat": {"norm": "Linf", "eps": "1"}}, "eps is '1'"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    source = make_source(tmp_path)
    path = source.evaluation / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptError, match=f"different evaluations: {says}"):
        page_of(source)


def test_an_attack_nobody_declared_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path, specs={"fgsm": spec("FGSM")})
    with pytest.raises(CorruptError, match=r"does not say what the attack 'pgd-50' is"):
        page_of(source)


def test_a_run_of_a_hand_built_model_is_refused(tmp_path: Path) -> None:
    settings = config()
    del settings["model"]
    run = make_run(tmp_path / "run", settings, [])
    with pytest.raises(InputError, match=r"run\.json: config has no model"):
        page_of(RowSource("AT", run, make_evaluation(tmp_path / "e")))


def test_a_wrong_value_names_file_line_and_key(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=[{"kind": "train", "epoch": "one"}])
    with pytest.raises(CorruptError, match=r'metrics\.jsonl, line 1: epoch should be a whole number, got "one"'):
        page_of(RowSource("AT", run, make_evaluation(tmp_path / "e")))


def test_a_newer_schema_is_not_guessed_at(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    path = source.evaluation / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 9}))
    with pytest.raises(InputError, match="schema 9, this version reads up to 1"):
        page_of(source)


def test_equal_labels_are_numbered(tmp_path: Path) -> None:
    held = ("hhhhhbbb", "bbbbbbbb", "hhhbbbbb")
    sources = [make_source(tmp_path / str(place), "AT", attacks={"pgd-50": each}) for place, each in enumerate(held)]
    page = page_of(*sources)
    assert [row.label for row in page.rows] == ["AT", "AT (2)", "AT (3)"]
