from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import make_source, page_of

from phalanx.errors import CorruptError, InputError
from phalanx.report import Page, render_html, terminal_table, to_json
from phalanx.report.attribution import Attribution, read_attribution
from phalanx.report.attribution_tables import attribution_tables, moves_tables
from phalanx.report.table import Table


def share(held: int, n: int = 10) -> dict[str, Any]:
    return {"held": held, "n": n, "interval": [0.0, 1.0]}


def counts(n: int, clean: int, robust: int) -> dict[str, int]:
    return {"n": n, "clean": clean, "robust": robust}


def blamed(router: int, expert: int, both: int) -> dict[str, int]:
    n = router + expert + both
    return {"n": n, "router": router, "expert": expert, "both": both, "flipped": 2, "old_right": router, "any_right": n}


def part(name: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "experts": 2,
        "gates": 1,
        "top_k": 1,
        "whole": share(3),
        "all": [counts(10, 8, 4), counts(10, 7, 3)],
        "own": [counts(6, 5, 3), counts(4, 4, 1)],
        "held_route": share(4),
        "worst_route": share(1),
        "best_route": counts(10, 9, 6),
        "transfer": [[4, 6], [7, 3]],
        "transfer_whole": [5, 6],
        "without": [counts(10, 7, 2), counts(10, 6, 1)],
        "undefined": "",
        **changes,
    }


def rung(multiple: str, eps: float, held: int, flipped: int, entropy: float | None) -> dict[str, Any]:
    gate = {"name": "", "flipped": share(flipped), "entropy": entropy}
    return {"multiple": multiple, "eps": eps, "accuracy": share(held), "gates": [gate]}


def attribution(**changes: Any) -> dict[str, Any]:
    """Of 10 images: 5 held, of 4 broken ones one did not break again."""
    return {
        "schema": 1,
        "blame": {
            "broken": 4,
            "attacks": [{"attack": "pgd-50", **blamed(1, 1, 0)}, {"attack": "steer-50", **blamed(0, 0, 1)}],
            "total": blamed(1, 1, 1),
            "gates": [{"name": "", "flipped": 2, "moves": [[1, 2], [0, 0]]}],
            "lost": [7],
            "unexplained": [],
            "samples": [],
        },
        "attack": "pgd-20",
        "n": 10,
        "whole": share(5),
        "router": share(8),
        "experts": share(6),
        "missed": [],
        "parts": [part()],
        "ladder": [rung("0", 0.0, 9, 0, 0.25), rung("1", 0.03137, 5, 2, None)],
        "attacks_run": 12,
        **changes,
    }


def told(folder: Path, **changes: Any) -> Page:
    source = make_source(folder)
    (source.evaluation / "attribution.json").write_text(json.dumps(attribution(**changes)))
    return page_of(source)


def tables(page: Page) -> dict[str, Table]:
    return {table.title: table for table in attribution_tables(page.rows[0].attribution)}


def attributed(page: Page) -> Attribution:
    found = page.rows[0].attribution
    assert found is not None
    return found


def test_every_table_by_hand(tmp_path: Path) -> None:
    page = told(tmp_path)
    found = tables(page)
    assert list(found) == [
        "Who is to blame",
        "Robust accuracy taken apart",
        "Each expert, and the model without it",
        "Transfer between experts",
        "Gates by radius",
    ]
    blame = found["Who is to blame"]
    # Wilson: 1 of 2, 0 of 2, 0 of 1, 1 of 1, 1 of 3
    half = "50.0 [9.5, 90.5]"
    assert [line[:5] for line in blame.lines] == [
        ("pgd-50", "2", half, half, "0.0 [0.0, 65.8]"),
        ("steer-50", "1", "0.0 [0.0, 79.3]", "0.0 [0.0, 79.3]", "100.0 [20.7, 100.0]"),
        ("all", "3", *["33.3 [6.1, 79.2]"] * 3),
    ]
    assert "Of 10 images, 4 that were right when clean are broken" in blame.note
    assert "1 more did not break again" in blame.note
    (moves,) = moves_tables(attributed(page))
    assert moves.head == ("from", "to 0", "to 1") and moves.lines == (("0", "1", "2"), ("1", "0", "0"))
    # Wilson: 2 of 3
    assert "66.7 % [20.8, 93.9] of 3 flip" in moves.note
    apart = found["Robust accuracy taken apart"]
    assert [line[2] for line in apart.lines] == ["5", "8", "6", "4", "1", "6"]
    assert apart.lines[0][3] == "50.0 [23.7, 76.3]"
    experts = found["Each expert, and the model without it"]
    assert experts.lines[1] == (
        "1", "4", "25.0 [4.6, 69.9]", "30.0 [10.8, 60.3]", "60.0 [31.3, 83.2]", "10.0 [1.8, 40.4]",
    )  # fmt: skip
    assert found["Transfer between experts"].lines[0] == ("expert 0", "40.0", "60.0", "50.0")
    assert [line[-1] for line in found["Gates by radius"].lines] == ["0.250", "–"]
    html = render_html(page)
    assert "<h4>Who is to blame</h4>" in html and "<figcaption>Routes of the broken images</figcaption>" in html
    json.dumps(to_json(page), allow_nan=False)


def test_the_halves_of_a_dual_model_are_told_apart(tmp_path: Path) -> None:
    reason = "the model has several gates"
    robust = part("robust", own=None, held_route=None, best_route=None, without=None, undefined=reason)
    found = tables(told(tmp_path, parts=[part("standard"), robust]))
    assert "Transfer between experts, standard half" in found
    experts = found["Each expert, and the model without it, robust half"]
    assert experts.lines[0] == ("0", "–", "–", "40.0 [16.8, 68.7]", "–", "–")
    assert f"not defined, since {reason}." in experts.note
    named = [line[0] for line in found["Robust accuracy taken apart"].lines]
    assert "standard half: by itself" in named and "robust half: best route, the label picks the expert" not in named


def test_what_the_evaluation_missed_is_an_alarm(tmp_path: Path) -> None:
    page = told(tmp_path, missed=[3, 4])
    (notice,) = page.notices
    assert notice.kind == "alarm" and "2 images of 10" in notice.text and "--protocol thorough" in notice.text
    assert "ALARM" in terminal_table(page)
    assert not told(tmp_path / "other").notices


def test_nothing_was_broken(tmp_path: Path) -> None:
    none = {**attribution()["blame"], "broken": 0, "attacks": [], "total": blamed(0, 0, 0), "gates": [], "lost": []}
    found = tables(told(tmp_path, blame=none))
    assert "Who is to blame" not in found and "Robust accuracy taken apart" in found


def test_without_the_file_there_is_no_attribution(page: Page) -> None:
    assert page.rows[0].attribution is None and to_json(page)["rows"][0]["attribution"] is None
    assert "Who is to blame" not in render_html(page)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": "ten"}, r"attribution\.json: n should be a whole number"),
        ({"whole": share(11)}, r"whole should count held <= n"),
        ({"parts": [part(best_route=counts(1, 2, 0))]}, r"best_route should count robust <= clean <= n"),
        ({"parts": [part(transfer=[[1, 2]])]}, r"transfer should be as many lists of as many whole numbers"),
        ({"parts": [part(transfer=[[1, 2], [3, -1]])]}, r"transfer should be as many lists"),
        ({"parts": [part(transfer_whole=[1])]}, r"transfer_whole should have 2 numbers, got 1"),
        ({"parts": [part(own=[counts(1, 1, 1)])]}, r"own should tell of 2 experts, got 1"),
        ({"blame": {**attribution()["blame"], "total": {**blamed(1, 1, 1), "n": 4}}}, "blame 4 images, blames 3"),
        ({"blame": {**attribution()["blame"], "total": {**blamed(1, 1, 1), "any_right": 4}}}, "count at most 3 images"),
        ({"blame": {**attribution()["blame"], "gates": [{"name": "", "flipped": 2, "moves": [[1]]}]}}, "at most 1 im"),
    ],
)  # fmt: skip
def test_a_damaged_attribution_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "attribution.json"
    path.write_text(json.dumps(attribution(**change)))
    with pytest.raises(CorruptError, match=says):
        read_attribution(path)


def test_a_newer_attribution_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "attribution.json"
    path.write_text(json.dumps(attribution(schema=2)))
    with pytest.raises(InputError, match="schema 2, this version reads up to 1"):
        read_attribution(path)
