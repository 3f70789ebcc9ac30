from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_sample import (
    DUAL,
    config,
    dual_config,
    dual_spec,
    epochs,
    make_evaluation,
    make_run,
    make_view,
    page_of,
    specs_of,
    view,
)

from phalanx.errors import CorruptError, InputError
from phalanx.report import RowSource, render_html, terminal_table, to_json
from phalanx.report.mixture import Mixture
from phalanx.runs.rate import Rate


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path]:
    """A standard run of one expert and a robust one of four."""
    standard = make_run(tmp_path / "st", config(method="st", experts=1, seed=1), epochs(2, experts=1))
    return standard, make_run(tmp_path / "rt-er", config(method="rt_er"), epochs(2))


def test_a_view_is_a_row_of_both_runs(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    page = page_of(make_view(tmp_path, "D", *halves, 0.7))
    (row,) = page.rows
    assert (row.method, row.alpha, row.parameters, row.seed, row.status) == ("dual", 0.7, 2 * 36282, 0, "finished")
    assert row.mixtures == (Mixture("small_cnn", 1, 1), Mixture("small_cnn", 4, 1))
    assert row.architecture == "dual 0.7: single small_cnn + 4 x small_cnn, top-1"
    assert (row.settings["standard.method.name"], row.settings["robust.method.name"]) == ("st", "rt_er")
    assert (row.settings["dual.alpha"], row.settings["dual.mix"]) == (0.7, "probabilities")
    assert row.settings["dual.picked"] is None
    assert row.environment["training of the standard half.torch"] == "2.15.0"
    assert (row.curves.train, row.curves.validation, row.load) == ((), (), None)
    assert "put together from trained runs" in page.summary[0]
    assert "several such runs put together" in page.caveats[-1]
    assert page.notices == ()
    assert "Loss" not in render_html(page)


def test_how_alpha_was_picked_is_in_the_settings(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    picked = {"keep": 0.985, "quantile": 0.25, "n": 120, "attack": "pgd-20-margin"}
    evaluation = make_evaluation(tmp_path / "e", view=view(0.8, picked=picked))
    (row,) = page_of(RowSource("D", halves[1], evaluation, halves[0])).rows
    assert (row.settings["dual.picked.keep"], row.settings["dual.picked.n"]) == (0.985, 120)


def test_alarms_of_both_halves_say_whose_they_are(tmp_path: Path) -> None:
    alarm = {"kind": "alarm", "epoch": 1, "alarm": "router_collapse", "message": "router collapse in epoch 1"}
    standard = make_run(tmp_path / "st", records=epochs(1), finished=False)
    robust = make_run(tmp_path / "rt", records=[*epochs(1), alarm])
    page = page_of(make_view(tmp_path, "D", standard, robust, 0.7))
    assert page.rows[0].status == "running"
    assert [notice.text for notice in page.notices] == [
        "Standard half: Training did not end: the run is running.",
        "Robust half: Router collapse in epoch 1",
    ]


def test_a_trained_dual_model_is_described_by_its_spec(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dual_config(), epochs(3), model_spec=dual_spec())
    page = page_of(RowSource("JTDMoE", run, make_evaluation(tmp_path / "e", load=None)))
    (row,) = page.rows
    assert (row.method, row.alpha, row.is_dual, row.is_view) == ("jtdmoe", 0.7, True, False)
    assert row.architecture == "dual 0.7: 4 x mlp, top-1 + 4 x small_cnn, top-2"
    assert len(row.curves.train) == 3
    assert "No attack has aimed at a dual model's halves" in " ".join(page.caveats)
    (made,) = to_json(page)["rows"]
    assert (made["architecture"], made["alpha"], made["expert"], made["top_k"]) == (row.architecture, 0.7, None, None)


def test_a_dual_models_columns(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    attacks = {
        **dict.fromkeys(DUAL, "hhhhhhhh"),
        "pgd-50@standard": "hhhbbbbb",
        "pgd-50@robust": "hhhhhhbb",
        "joint-50": "bhhhhhhh",
    }
    page = page_of(make_view(tmp_path, "D", *halves, 0.7, attacks=attacks, specs=specs_of(DUAL)))
    columns = page.rows[0].columns
    assert (columns["RA"], columns["RA-RMoE"], columns["RA-SMoE"]) == (Rate(8, 10), Rate(6, 10), Rate(3, 10))
    assert (columns["steering"], columns["min"], columns["worst"]) == (Rate(7, 10), Rate(3, 10), Rate(2, 10))
    assert "aimed at a dual model's halves" not in " ".join(page.caveats)
    assert [attack.label for attack in page.attacks if attack.surface == "halves"] == ["joint-50"]


def test_an_evaluation_that_did_not_end_has_no_alpha(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    page = page_of(make_view(tmp_path, "D", *halves, 0.7, ended=False))
    assert page.rows[0].alpha is None
    assert page.rows[0].architecture.startswith("dual: single small_cnn")
    assert [notice.kind for notice in page.notices] == ["incomplete"]
    assert "dual: single" in terminal_table(page)


def test_runs_from_before_there_were_dual_models_are_mixtures(tmp_path: Path) -> None:
    settings = config()
    del settings["model"]["name"]
    run = make_run(tmp_path / "run", settings)
    assert page_of(RowSource("A", run, make_evaluation(tmp_path / "e"))).rows[0].mixtures[0].experts == 4


# -- what does not belong together ---------------------------------------------------------------------------------


def test_a_view_needs_its_standard_half(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    source = make_view(tmp_path, "D", *halves, 0.7)
    with pytest.raises(InputError, match=r"evaluation\.json is of a dual model made of two runs; name the standard"):
        page_of(RowSource("D", source.run, source.evaluation))


def test_one_runs_evaluation_takes_no_standard_half(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    evaluation = make_evaluation(tmp_path / "e")
    with pytest.raises(InputError, match=r"evaluation\.json is of one run.*leave out .*st"):
        page_of(RowSource("D", halves[1], evaluation, halves[0]))


def test_another_kind_of_view_is_not_guessed_at(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    evaluation = make_evaluation(tmp_path / "e", view={**view(), "kind": "vote"})
    with pytest.raises(InputError, match="view of kind 'vote'; use a newer phalanx"):
        page_of(RowSource("D", halves[1], evaluation, halves[0]))


def test_a_trained_dual_model_without_a_spec_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dual_config())
    with pytest.raises(CorruptError, match=r"model\.json: spec should be an object, got null"):
        page_of(RowSource("JTDMoE", run, make_evaluation(tmp_path / "e")))


# -- alpha ---------------------------------------------------------------------------------------------------------


def test_views_of_the_same_runs_make_a_curve_over_alpha(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    page = page_of(
        make_view(tmp_path, "D9", *halves, 0.9, attacks={"pgd-50": "hhhhhhbb"}),
        make_view(tmp_path, "D7", *halves, 0.7, attacks={"pgd-50": "hhbbbbbb"}),
        make_view(tmp_path, "other way", halves[1], halves[0], 0.7),
    )
    (tradeoff,) = page.tradeoffs
    assert (tradeoff.standard, tradeoff.robust, tradeoff.rows) == ("st", "rt-er", (1, 0))
    text = render_html(page)
    assert "Accuracy by alpha: st (standard) and rt-er (robust)" in text
    # Wilson: 2 of 10 is [0.057, 0.510], 6 of 10 [0.313, 0.832]
    assert (
        '<tr><th scope="row">0.7</th><td>D7</td><td>10</td><td>80.0 [49.0, 94.3]</td>'
        "<td>20.0 [5.7, 51.0]</td><td>20.0 [5.7, 51.0]</td></tr>\n"
        '<tr><th scope="row">0.9</th><td>D9</td>'
    ) in text
    assert text == render_html(page)
    assert json.loads(json.dumps(to_json(page)))["alpha_tradeoffs"][0]["rows"] == ["D7", "D9"]


def test_views_that_differ_in_more_than_alpha_make_none(tmp_path: Path, halves: tuple[Path, Path]) -> None:
    other_images = make_view(tmp_path, "images", *halves, 0.8, data_sha256="11" * 32)
    other_attack = make_view(tmp_path, "attack", *halves, 0.9, attacks={"fgsm": "hhhhhhhh"})
    logits = make_evaluation(tmp_path / "e", view=view(0.6, mix="logits"))
    page = page_of(
        make_view(tmp_path, "D7", *halves, 0.7),
        other_images,
        other_attack,
        RowSource("logits", halves[1], logits, halves[0]),
    )
    assert page.tradeoffs == ()
