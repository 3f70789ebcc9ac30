"""One study under several seeds: its numbers, and what is shown of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import config, make_evaluation, make_run, page_of, spec

from phalanx.errors import CorruptError, InputError
from phalanx.report import RowSource, over_seeds, seeds_text, to_json, write_seeds_report
from phalanx.report.findings import ONE_SEED
from phalanx.report.seeds import SeedTable, Spread
from phalanx.report.text import WIDTH
from phalanx.runs.rate import Rate

# 10 images, 8 of them right when clean: 5, 6 and 7 hold under pgd-50
HELD = {0: "hhhhhbbb", 1: "hhhhhhbb", 2: "hhhhhhhb"}
SWEPT = {f"fgsm:{n}/255": spec("FGSM", eps=f"{n}/255", steps=None) for n in (2, 4, 6, 16)}


def table_of(folder: Path, seed: int, held: str, *, label: str = "AT", sha256: str = "ef" * 32) -> dict[str, Any]:
    """A study's table.json under one seed: one row, which faced pgd-50 and FGSM at four radii, one outside."""
    run = make_run(folder / f"run-{seed}", config(seed=seed))
    attacks = {"pgd-50": held, **dict.fromkeys(SWEPT, held)}
    made = make_evaluation(
        folder / f"evaluation-{seed}", attacks=attacks, specs={"pgd-50": spec(), **SWEPT}, data_sha256=sha256
    )
    page = page_of(RowSource(label, run, made), reported={label: {"SA": 91.0, "RA": 64.37}}, reported_source="a paper")
    return json.loads(json.dumps(to_json(page)))


@pytest.fixture
def table(tmp_path: Path) -> SeedTable:
    return over_seeds([table_of(tmp_path, seed, held) for seed, held in HELD.items()], "phalanx run it --seeds 0,1,2")


def test_every_number_is_a_mean_and_a_sample_deviation(table: SeedTable) -> None:
    (row,) = table.rows
    assert table.seeds == (0, 1, 2) and row.n == 10
    assert row.columns["RA"].rates == (Rate(5, 10), Rate(6, 10), Rate(7, 10))
    # divided by seeds - 1: 0.1, not 0.082
    assert row.columns["RA"].mean == pytest.approx(0.6) and row.columns["RA"].deviation == pytest.approx(0.1)
    assert {key: spread.text for key, spread in row.columns.items()} == {
        "SA": "80.0 ± 0.0",
        "RA": "60.0 ± 10.0",
        "worst": "60.0 ± 10.0",
    }
    assert set(row.attacks) == {"pgd-50", *SWEPT} == set(table.attacks) and table.attacks[-1] == "fgsm:16/255"
    assert row.reported == {"SA": 91.0, "RA": 64.37}


def test_broken_certified_and_undecided_over_the_seeds(tmp_path: Path) -> None:
    tables = [table_of(tmp_path, seed, held) for seed, held in HELD.items()]
    without = over_seeds(tables, "")
    assert not without.rows[0].threefold and "undecided, %" not in seeds_text(without)
    for table, broken in zip(tables, (5, 4, 3), strict=True):
        parts = {"broken": broken, "certified": 2, "undecided": 8 - broken}
        table["rows"][0]["threefold"] = {"n": 10, **parts, "contradictions": []}
    made = over_seeds(tables, "")
    assert {part: spread.text for part, spread in made.rows[0].threefold.items()} == {
        "broken": "40.0 ± 10.0",
        "certified": "20.0 ± 0.0",
        "undecided": "40.0 ± 10.0",
    }
    files = write_seeds_report(tmp_path / "out", made)
    shown = json.loads(files["table.json"].read_text())["rows"][0]["threefold"]
    assert (shown["certified"]["held"], shown["certified"]["n"]) == ([2, 2, 2], [10, 10, 10])
    assert "Linf 8/255" in seeds_text(made) and "Broken, certified or undecided" in files["report.html"].read_text()
    tables[1]["rows"][0]["threefold"] = None
    assert not over_seeds(tables, "").rows[0].threefold


def test_one_seed_has_no_deviation() -> None:
    assert Spread((Rate(5, 10),)).deviation is None and Spread((Rate(5, 10),)).text == "50.0"


def test_a_curve_goes_over_the_seeds_too(table: SeedTable) -> None:
    (sweep,) = table.sweeps
    assert (sweep.over, sweep.names) == ("eps", ("2/255", "4/255", "6/255", "16/255"))
    assert all(spread is not None and spread.text == "60.0 ± 10.0" for (spread,) in sweep.spreads)


def test_printed_points_stand_beside_the_means(tmp_path: Path) -> None:
    tables = [table_of(tmp_path, seed, held) for seed, held in HELD.items()]
    for table in tables:
        table["rows"][0]["reported"]["fgsm:4/255"] = 52.32
    page = write_seeds_report(tmp_path / "out", over_seeds(tables, ""))["report.html"].read_text()
    assert "AT, reported, %" in page and "52.32" in page


def test_a_number_that_one_seed_lacks_is_left_out(tmp_path: Path) -> None:
    tables = [table_of(tmp_path, seed, held) for seed, held in HELD.items()]
    tables[1]["rows"][0]["columns"]["RA"] = None
    tables[2]["sweeps"][0]["rows"][0]["accuracies"][1] = None
    made = over_seeds(tables, "")
    assert set(made.rows[0].columns) == {"SA", "worst"}
    assert made.sweeps[0].spreads[1] == (None,) and made.sweeps[0].spreads[0] != (None,)


def test_what_one_seed_cannot_say_is_replaced_by_what_several_do(table: SeedTable) -> None:
    said = " ".join(table.caveats)
    assert ONE_SEED not in said
    assert "sample standard deviation over 3 training seeds" in said and "no interval of the mean" in said
    # 5 of 10: [23.7, 76.3]
    assert "up to 52.7 points wide" in said
    assert "no AutoAttack" in said


def test_notices_say_their_seed(tmp_path: Path) -> None:
    tables = [table_of(tmp_path, seed, held) for seed, held in {0: "hhhhhbbb", 4: "hhhhhbbi"}.items()]
    assert {notice.label for notice in over_seeds(tables, "").notices} == {"AT, seed 4"}


def test_tables_that_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first, second = (table_of(tmp_path, seed, HELD[seed]) for seed in (0, 1))
    other = table_of(tmp_path / "more", 1, HELD[1], sha256="aa" * 32)
    with pytest.raises(InputError, match="different seeds, got 0, 0"):
        over_seeds([first, first], "")
    with pytest.raises(InputError, match="same rows, images and threat"):
        over_seeds([first, other], "")
    with pytest.raises(InputError, match="same rows, images and threat"):
        over_seeds([first, {**second, "rows": [{**second["rows"][0], "label": "ST"}]}], "")
    with pytest.raises(InputError, match="at least one table"):
        over_seeds([], "")
    del second["rows"][0]["columns"]["RA"]["held"]
    with pytest.raises(CorruptError, match=r"table 2: rows\[0\].columns.RA.held should be a whole number"):
        over_seeds([first, second], "")


def test_the_text_has_every_column_and_fits(table: SeedTable) -> None:
    text = seeds_text(table)
    assert max(map(len, text.splitlines())) <= WIDTH
    lines = [line.split() for line in text.splitlines()]
    assert ["measured", "80.0", "±", "0.0", "60.0", "±", "10.0", "60.0", "±", "10.0"] in lines
    assert ["reported", "91.00", "64.37", "–"] in lines
    assert "mean ± sample standard deviation of 3 seeds (0, 1, 2)" in " ".join(text.split())


def test_many_columns_stand_in_two_tables(table: SeedTable) -> None:
    wide = SeedTable(**{**vars(table), "columns": table.columns * 3})
    text = seeds_text(wide)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert sum(line.startswith("model") for line in text.splitlines()) == 2


def test_the_files_hold_the_mean_and_every_seed(table: SeedTable, tmp_path: Path) -> None:
    files = write_seeds_report(tmp_path / "out", table)
    found = json.loads(files["table.json"].read_text())
    ra = found["rows"][0]["columns"]["RA"]
    assert (found["seeds"], ra["held"], ra["n"]) == ([0, 1, 2], [5, 6, 7], [10, 10, 10])
    assert ra["deviation"] == pytest.approx(0.1)
    page = files["report.html"].read_text()
    assert "60.0 ± 10.0" in page and "64.37" in page and "--seeds 0,1,2" in page
    # the single seeds, with their intervals
    assert "<td>2</td>" in page and "70.0 [39.7, 89.2]" in page
    assert page == write_seeds_report(tmp_path / "again", table)["report.html"].read_text()
    assert page.count("<script") == 1
