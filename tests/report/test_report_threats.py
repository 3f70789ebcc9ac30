"""The threat-coverage table closes every report, and submitted images have a table of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from report_sample import make_source, page_of, spec

from phalanx.report import evaluation_text, over_seeds, render_html, seeds_text, terminal_table, to_json
from phalanx.report.seeds_page import seeds_html, seeds_json
from phalanx.report.threats import challenges_table, threats_table
from phalanx.runs.threats import HOW

ALICE = {**spec("Given"), "external": True, "sha256": "ab" * 32, "count": 3, "when": "2026-01-02T03:04:05+00:00"}


def challenged(folder: Path, label: str = "AT") -> Any:
    attacks = {"pgd-50": "hhhhhbbb", "external:alice": "bb...b.."}
    return make_source(folder, label, attacks=attacks, specs={"pgd-50": spec(), "external:alice": ALICE})


def test_every_page_ends_with_the_table_old_folders_included(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path))
    assert "threats" not in (tmp_path / "AT.evaluation" / "evaluation.json").read_text()
    text = render_html(page)
    assert re.findall(r"<h2>(.*?)</h2>", text)[-1] == "Threat coverage"
    lines = {line[0]: line for line in threats_table(page).lines}
    assert list(lines) == list(HOW)
    assert lines["white-box"][2:4] == ("RA 50.0 [23.7, 76.3] %", "10") and "at most 50 steps" in lines["white-box"][4]
    assert lines["poisoning"][1:] == ("AT", "not measured", "–", HOW["poisoning"])
    told = terminal_table(page)
    assert told.rstrip().splitlines()[-1].startswith(("hardware: not measured", "    "))
    assert max(map(len, told.splitlines())) <= 100
    assert [line["threat"] for line in to_json(page)["rows"][0]["threats"]] == list(HOW)
    last = evaluation_text(tmp_path / "AT.evaluation" / "ledger.sqlite").splitlines()[-1]
    assert last.startswith("threats measured: white-box; not measured: transfer, ")


def test_models_of_which_nothing_is_known_share_a_line(tmp_path: Path) -> None:
    square = {"attacks": {"square-9": "hhhhhhhb"}, "specs": {"square-9": spec("Square")}}
    page = page_of(make_source(tmp_path, "A"), make_source(tmp_path, "B", **square))
    lines = [line[:3] for line in threats_table(page).lines]
    assert ("score-query", "B", "RA 70.0 [39.7, 89.2] %") in lines and ("score-query", "A", "not measured") in lines
    assert ("hardware", "every model", "not measured") in lines


def test_no_other_attackers_number_is_in_the_headline_or_taken_from_it(tmp_path: Path) -> None:
    plain, other = page_of(make_source(tmp_path / "1")), page_of(challenged(tmp_path / "2"))
    assert plain.rows[0].worst is not None and other.rows[0].worst is not None
    assert (plain.rows[0].worst.held, other.rows[0].worst.held) == (5, 3)
    one, two = ({line[0]: line[2] for line in threats_table(page).lines} for page in (plain, other))
    assert one["white-box"] == two["white-box"] and two["external"].startswith("broke 3 of 3 images")


def test_a_challenge_tells_by_how_much_the_headline_fell(tmp_path: Path) -> None:
    page = page_of(challenged(tmp_path))
    table = challenges_table(page)
    assert table is not None and challenges_table(page_of(make_source(tmp_path / "x"))) is None
    (line,) = table.lines
    assert line == ("AT", "alice", "2026-01-02", "3", "3", "3", "2", "50.0 [23.7, 76.3] to 30.0 [10.8, 60.3]")
    assert [attack.label for attack in page.attacks] == ["pgd-50"] and not page.notices
    assert page.rows[0].columns["worst"] == page.rows[0].worst and not [c for c in page.caveats if "external" in c]
    assert "external:alice broke 3 of 3 images, 2 of which" in evaluation_text(
        tmp_path / "AT.evaluation" / "ledger.sqlite"
    )


def test_several_seeds_are_closed_by_it_too(tmp_path: Path) -> None:
    tables = []
    for seed in (0, 1):
        table = to_json(page_of(challenged(tmp_path / str(seed))))
        table["rows"][0]["seed"] = seed
        tables.append(table)
    made = over_seeds(tables, "phalanx run x --seeds 0,1")
    text = seeds_text(made)
    assert "white-box: AT: RA 50.0 ± 0.0 %; pgd-50, Linf 8/255" in text
    assert "external: AT: broke 3 of 3, 3 of 3" in text and "hardware: AT: not measured" in text
    assert re.findall(r"<h2>(.*?)</h2>", seeds_html(made))[-1] == "Threat coverage"
    assert seeds_json(made)["rows"][0]["threats"]["white-box"][1]["held"] == 5


def test_the_worst_case_names_what_it_is_over(tmp_path: Path) -> None:
    page = page_of(challenged(tmp_path))
    assert "in the worst case over pgd-50 and the images of 1 challenge" in page.summary[1]
    assert "RA, worst case of these 1 and 1 challenge" in terminal_table(page)
    assert "1 attack, 1 challenge" in render_html(page)
    # of an evaluation whose own attacks all stand aside, submitted images are all there is
    outside = {"pgd-50": "hhhhhhhh", "external:alice": "b......."}
    specs = {"pgd-50": spec(eps="16/255"), "external:alice": ALICE}
    other = page_of(make_source(tmp_path, "B", attacks=outside, specs=specs))
    assert "under the images of 1 challenge" in other.summary[1] and other.rows[0].worst is not None
    assert (other.rows[0].worst.held, other.rows[0].unchallenged) == (7, None)
    assert render_html(other) and terminal_table(other)
