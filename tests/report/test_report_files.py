from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_sample import make_evaluation, make_run, page_of

from phalanx.errors import InputError
from phalanx.report import Page, RowSource, render_html, terminal_table, to_json, write_report


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """Quick to draw: its run has no epochs."""
    return page_of(RowSource("AT", make_run(tmp_path / "run", records=[]), make_evaluation(tmp_path / "evaluation")))


def test_the_three_files_say_the_same_page(page: Page, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new" / "out", page)
    assert list(paths) == ["report.html", "table.json", "table.txt"]
    assert paths["report.html"].read_text(encoding="utf-8") == render_html(page)
    assert json.loads(paths["table.json"].read_bytes()) == json.loads(json.dumps(to_json(page)))
    assert paths["table.txt"].read_text(encoding="utf-8") == terminal_table(page)


def test_writing_again_changes_no_byte_and_leaves_nothing_behind(page: Page, tmp_path: Path) -> None:
    first = {name: path.read_bytes() for name, path in write_report(tmp_path / "out", page).items()}
    again = {name: path.read_bytes() for name, path in write_report(tmp_path / "out", page).items()}
    assert first == again
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(first)


def test_a_write_that_fails_keeps_the_old_page(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(tmp_path / "out", page)["report.html"].read_bytes()
    monkeypatch.setenv("PHALANX_FAILPOINT", "write.half/report.html:raise")
    with pytest.raises(Exception, match=r"write\.half/report\.html"):
        write_report(tmp_path / "out", page)
    assert (tmp_path / "out" / "report.html").read_bytes() == old
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_file_is_no_folder_to_write_into(page: Page, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file"):
        write_report(tmp_path / "file", page)
