from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from report_sample import config, make_evaluation, make_run, make_source, page_of

from phalanx.report import Page, RowSource, terminal_table, to_json
from phalanx.report.text import WIDTH, aligned, wrapped


def test_the_table_to_the_letter(page: Page) -> None:
    assert terminal_table(page).startswith(
        "Digits\n"
        "\n"
        "model    SA    RA         worst case\n"
        "-----  ----  ----  -----------------\n"
        "AT     80.0  50.0  50.0 [23.7, 76.3]\n"
        "\n"
        "SA: accuracy on clean images\n"
        "RA: the deployed model attacked (pgd-50)\n"
        "worst case: right under every attack within the threat, image by image\n"
        "In percent of all images (n = 10), within Linf 8/255; an attack's name says its steps. Every\n"
        "perturbation is judged on the whole real model; in brackets the 95 % Wilson interval.\n"
        "\n"
        "model  measured                 n  held  accuracy %  95 % interval\n"
        "-----  ----------------------  --  ----  ----------  -------------\n"
        "AT     SA, clean               10     8        80.0   [49.0, 94.3]\n"
        "AT     RA, pgd-50, Linf 8/255  10     5        50.0   [23.7, 76.3]\n"
        "\n"
        "model  method  architecture          parameters  largest load\n"
        "-----  ------  --------------------  ----------  ------------\n"
        "AT     at      4 x small_cnn, top-1      36,282        40.0 %\n"
        "\n"
        "- Only PGD has been run"
    )


def test_the_worst_case_of_several_attacks_has_a_line(tmp_path: Path) -> None:
    text = terminal_table(page_of(make_source(tmp_path, clean="hhhhb", attacks={"fgsm": "bhhh", "pgd-50": "hhhb"})))
    assert "AT     RA, worst case of these 2  5     2        40.0   [11.8, 76.9]" in text


def test_only_what_held_counts(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, clean="hhhhh", attacks={"pgd-50": "hbit."}))
    # Wilson: 1 of 5 is [0.036, 0.624]
    assert "RA, pgd-50, Linf 8/255  5     1        20.0    [3.6, 62.4]" in terminal_table(page)
    (attack,) = to_json(page)["rows"][0]["attacks"]
    counts = {key: attack[key] for key in ("held", "broken", "invalid", "timeout", "untried")}
    assert counts == dict.fromkeys(counts, 1)
    assert attack["accuracy"] == 0.2


def test_notices_stand_under_the_table(tmp_path: Path) -> None:
    text = terminal_table(page_of(make_source(tmp_path, clean="hhh", attacks={"pgd-50": "hi."}, n=5)))
    assert "INVALID AT: 1 answer was not a finite number under pgd-50; never counted as robust." in text
    assert "INCOMPLETE AT: Only 3 of 5 images were judged." in text


def test_one_expert_has_no_top_k_and_no_load(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(experts=1))
    text = terminal_table(page_of(RowSource("one", run, make_evaluation(tmp_path / "e", load=None))))
    assert "one    at      single small_cnn      36,282             –" in text


def test_long_labels_fit_and_control_characters_do_nothing(tmp_path: Path) -> None:
    run, evaluation = make_run(tmp_path / "run"), make_evaluation(tmp_path / "e")
    text = terminal_table(page_of(RowSource("\x1b[31m" + "x" * 300, run, evaluation), title="w" * 250))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\x1b" not in text


@given(st.lists(st.tuples(st.text(), st.text(), st.integers(0, 10**6).map(str)), min_size=1))
def test_no_line_is_ever_longer_than_the_width(lines: list[tuple[str, ...]]) -> None:
    assert all(len(line) <= WIDTH for line in aligned(("a", "b", "n"), "llr", lines).splitlines())


@given(st.text(), st.integers(0, 8))
def test_wrapping_keeps_every_word_within_the_width(text: str, indent: int) -> None:
    broken = wrapped(text, indent)
    assert all(len(line) <= WIDTH for line in broken.splitlines())
    assert "".join(broken.split()) == "".join(c if c.isprintable() else "\ufffd" for c in text).replace(" ", "")


def test_json_holds_counts_accuracies_intervals_and_budgets(page: Page) -> None:
    table = json.loads(json.dumps(to_json(page), allow_nan=False))
    (row,) = table["rows"]
    (attack,) = row["attacks"]
    counts = {key: attack[key] for key in ("label", "held", "broken", "invalid", "timeout", "untried", "n")}
    assert counts == {
        "label": "pgd-50",
        "held": 5,
        "broken": 3,
        "invalid": 0,
        "timeout": 0,
        "untried": 0,
        "n": 10,
    }
    assert attack["accuracy"] == 0.5
    assert [round(bound, 3) for bound in attack["interval"]] == [0.237, 0.763]
    assert (table["schema"], table["attacks"][0]["spec"]["steps"]) == (1, 50)
    assert row["worst_case"]["held"] == 5
    assert row["settings"]["training.optimizer.lr"] == 0.1
