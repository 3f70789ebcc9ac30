from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_sample import config, epochs, make_evaluation, make_run, make_source, page_of

from phalanx.report import Page, RowSource, render_html

VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Tags(HTMLParser):
    """Collects tags and attributes, and checks that what opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("two_rows")
    return page_of(
        RowSource("ST", make_run(folder / "st", config(method="st"), epochs(30)), make_evaluation(folder / "st.e")),
        RowSource("AT", make_run(folder / "at", config(), epochs(30)), make_evaluation(folder / "at.e")),
    )


@pytest.fixture(scope="module")
def text(two_rows: Page) -> str:
    return render_html(two_rows)


def test_the_page_is_the_same_every_time_small_and_well_formed(two_rows: Page, text: str) -> None:
    assert text == render_html(two_rows)
    assert len(text.encode()) < 300_000
    _Tags(text)


def test_ids_are_unique_and_every_reference_has_one(text: str) -> None:
    tags = _Tags(text).tags
    ids = [found for _, attributes in tags if (found := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    assert ids
    used = {found.removeprefix("#") for _, attributes in tags if (found := attributes.get("xlink:href"))}
    used |= {name for _, attributes in tags for name in re.findall(r"url\(#(.*?)\)", str(attributes.get("clip-path")))}
    assert used <= set(ids)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(text: str) -> None:
    tags = _Tags(text).tags
    assert "http" not in text.replace("http-equiv", "")
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object", "base", "form", "img"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert all(str(attributes.get("xlink:href", "#")).startswith("#") for _, attributes in tags)
    (policy,) = [a["content"] for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_users_text_stays_text(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>\" onload='x' $a_{$ {{ 7*7 }} fill: #1c2430"
    notes, classes = ["note " + nasty], [nasty, "b"]
    source = RowSource(
        nasty,
        make_run(tmp_path / "run", notes=notes, class_names=classes),
        make_evaluation(tmp_path / "e", data_notes=notes),
    )
    parsed = _Tags(render_html(page_of(source, title=nasty)))
    assert [tag for tag, _ in parsed.tags if tag in ("script", "img")] == ["script"]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    said = "".join(parsed.words)
    assert said.count(nasty) >= 5  # title twice, row, heading, notes
    assert "49" not in said.replace("49.0", "")
    assert "var(--ink)" not in "".join(word for word in parsed.words if "alert" in word)


def test_a_robust_accuracy_stands_with_attack_n_and_interval(page: Page) -> None:
    said = re.sub(r"[ \n]+", " ", " ".join(_Tags(render_html(page)).words))
    assert "RA, pgd-50 Linf 8/255, %" in said
    assert "50.0 [23.7, 76.3] n = 10" in said
    assert "50.0\u00a0%\u00a0[23.7,\u00a076.3] under pgd-50 (Linf\u00a08/255)" in said


def test_every_section_is_there(page: Page) -> None:
    text = render_html(page)
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == [
        "What to distrust",
        "Results",
        "Training",
        "Analysis",
        "Attacks and budgets",
        "Evaluation",
        "Data",
        "Settings",
        "Environment",
        "How to reproduce",
        "Threat coverage",
    ]
    assert "<code>phalanx run quickstart</code>" in text
    assert text.count('role="img" aria-label="') == text.count("<details>") == 5
    links = re.findall(r'<a href="#([a-z]+)">(.*?)</a>', text)
    assert [name for _, name in links] == heads
    assert all(f'id="{place}"' in text for place, _ in links)
    for setting in ("training.optimizer.lr", "model.router.name", "threat.eps"):
        assert f">{setting}</th>" in text


def test_settings_that_differ_are_marked(text: str) -> None:
    marked = re.findall(r'<tr class="differs"><th scope="row">(\S+) ', text)
    assert marked == ["method.name"]


def test_alarms_invalid_and_missing_verdicts_are_seen(tmp_path: Path) -> None:
    alarm = {"kind": "alarm", "epoch": 1, "alarm": "router_collapse", "message": "router collapse in epoch 1"}
    source = RowSource(
        "AT",
        make_run(tmp_path / "run", records=[*epochs(1), alarm], finished=False),
        make_evaluation(tmp_path / "e", clean="hhhhi", attacks={"pgd-50": "hit."}, ended=False),
    )
    text = render_html(page_of(source))
    assert '<p class="notice alarm"><strong>alarm</strong>' in text
    assert text.count('<small class="bad">1 invalid</small>') == 2
    assert '<small class="flag">1 not attacked</small>' in text
    assert '<small class="flag">1 timed out</small>' in text
    assert '<span class="flag">running</span>' in text
    assert text.index("Router collapse") < text.index("<h2>Results</h2>")


def test_nothing_trained_yet_and_one_expert(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(experts=1), records=[])
    text = render_html(page_of(RowSource("one", run, make_evaluation(tmp_path / "e", attacks={}, load=None))))
    assert "No epoch has been recorded." in text
    assert "No attack was run." in text
    assert "Router load" not in text


def test_loss_that_was_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    records = [{**record, "loss": float("nan")} if record["epoch"] == 2 else record for record in epochs(3)]
    run = make_run(tmp_path / "run", records=records)
    text = render_html(page_of(RowSource("AT", run, make_evaluation(tmp_path / "e"))))
    assert '<th scope="row">2</th><td>–</td>' in text
    assert "nan" not in text.casefold()


def test_a_grid_fills_what_a_row_does_not_have(tmp_path: Path) -> None:
    page = page_of(make_source(tmp_path, "A"), make_source(tmp_path, "B", eps="4/255"))
    html = render_html(page)
    assert "RA, pgd-50, Linf 4/255<small>Linf 4/255, %</small>" in html
    table = html[html.index("<h3>Each attack by itself</h3>") :]
    assert table.count('<td class="number">–</td>') == 2
