"""The page in a real browser: sorting by click and by key, every section, contrast, texts for those who cannot see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from report_sample import analysis, make_source, page_of
from test_report_attribution import attribution
from test_report_gallery import written

from phalanx.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

HELD = {"none": "", "AT": "hhhhhbbb", "ST": "hbbbbbbb", "RT-ER": "hhhhhhbb"}
SECTIONS = (
    "distrust results honesty gallery training analysis attacks evaluation data settings environment reproduce threats"
)
SCREENS = {"wide and light": (1400, False), "phone and dark": (390, True)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows with everything: one is not attacked, one has a failed check and one a warning."""
    folder = tmp_path_factory.mktemp("report")
    sources = []
    for label, held in HELD.items():
        counts = {"path_macs": 10, "router_macs": 1, "executed_macs": 11, "parameters": 36282, "active_parameters": 9}
        attacks = {"pgd-50": held} if held else {}
        source = make_source(folder, label, attacks=attacks, analysis=analysis(), counts=counts, labels=[0, 1] * 5)
        written(source.evaluation)
        (source.evaluation / "attribution.json").write_text(json.dumps(attribution()))
        sources.append(source)
    for source, status in zip(sources, ("fail", "warn"), strict=False):
        check = {"id": "E5", "title": "large eps", "status": status, "sentence": "says so", "evidence": {}}
        record = {"schema": 1, "samples": 64, "checks": [check]}
        (source.evaluation / "honesty.json").write_text(json.dumps(record))
    return write_report(folder / "out", page_of(*sources))["report.html"]


@pytest.fixture(scope="module", params=SCREENS.values(), ids=SCREENS)
def page(request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    width, dark = request.param
    with Browser(tmp_path_factory.mktemp("browser") / "data", width, dark=dark) as browser:
        browser.open(report)
        yield browser
        assert browser.complaints == []


def column(page: Browser, head: str) -> list[str]:
    """The first table's cells under a head, from above."""
    return list(
        page.run(
            f"""(() => {{
                const table = document.querySelector("table.headline");
                const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === {head!r});
                return [...table.tBodies].map((body) => body.rows[0].cells[place].textContent.trim());
            }})()"""
        )
    )


def button(head: str) -> str:
    return f"[...document.querySelectorAll('table.headline th button')].find((one) => one.textContent === {head!r})"


def test_nothing_is_fetched_and_nothing_complains(page: Browser) -> None:
    assert all(url.startswith(("file:", "data:")) for url in page.requests)
    assert page.complaints == []


def test_every_section_is_found_and_linked(page: Browser) -> None:
    found = page.run("[...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))")
    assert found == SECTIONS.split()
    heights = page.run(f"{SECTIONS.split()!r}.map((id) => document.getElementById(id).getBoundingClientRect().height)")
    assert all(height > 20 for height in heights)


def test_a_click_sorts_numbers_and_puts_what_is_missing_last(page: Browser) -> None:
    page.run(f"{button('worst case')}.click()")
    assert [cell[:4] for cell in column(page, "worst case")] == ["60.0", "50.0", "10.0", "–"]
    assert column(page, "Model") == ["RT-ER", "AT", "ST", "none"]
    page.run(f"{button('worst case')}.click()")
    assert column(page, "Model") == ["ST", "AT", "RT-ER", "none"]
    sorted_by = page.run("[...document.querySelectorAll('[aria-sort]')].map((th) => [th.textContent, th.ariaSort])")
    assert sorted_by == [["worst case", "ascending"]]


def test_the_keyboard_sorts_and_its_focus_is_seen(page: Browser) -> None:
    page.run(f"{button('Model')}.focus()")
    page.press("Enter")
    assert column(page, "Model") == ["AT", "none", "RT-ER", "ST"]
    page.press(" ")
    assert column(page, "Model") == ["ST", "RT-ER", "none", "AT"]
    page.press("Tab")
    focused = "document.activeElement"
    assert page.run(f"{focused}.textContent") == "SA"
    assert page.run(f"getComputedStyle({focused}).outline").endswith("solid 2px")


def test_the_first_key_leads_to_the_results(page: Browser) -> None:
    page.run("document.activeElement.blur(), document.body.scrollIntoView(), getSelection().removeAllRanges()")
    first = "document.querySelector('a[href], button, summary, [tabindex]')"
    assert page.run(f"{first}.hash") == "#results"
    page.run(f"{first}.focus()")
    assert page.run(f"{first}.getBoundingClientRect().left") >= 0


def test_nothing_is_wider_than_the_screen(page: Browser) -> None:
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = true))")
    assert page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_every_drawing_and_picture_says_what_it_is_and_drawings_have_their_numbers(page: Browser) -> None:
    assert page.run("[...document.images].filter((image) => !image.alt || !image.naturalWidth).length") == 0
    assert page.run("document.images.length") == 36
    assert page.run("[...document.querySelectorAll('svg')].filter((one) => !one.ariaLabel || one.role !== 'img')") == []
    assert page.run(
        "[...document.querySelectorAll('svg')].every((one) => one.closest('figure').querySelector('table'))"
    )


# WCAG 2.2: 4.5 to 1, of large text (24 px, or bold 18.66 px) 3 to 1; the background is the nearest that is not clear
CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    throw new Error("no background");
  };
  document.querySelectorAll("details").forEach((found) => (found.open = true));
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script")) continue;
    const style = getComputedStyle(element);
    const color = parts(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(color), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const what = `${element.tagName} ${element.className.baseVal ?? element.className} ${style.color}`;
    const text = walker.currentNode.textContent.trim();
    if (!(what in found) || found[what][0] > ratio) found[what] = [ratio, needed, text];
  }
  return Object.entries(found);
})()"""


def test_all_text_stands_out_from_what_is_behind_it(page: Browser) -> None:
    found: list[Any] = page.run(CONTRAST)
    assert len(found) > 30
    assert [(what, ratio, text) for what, (ratio, needed, text) in found if ratio < needed] == []


def test_lines_of_drawings_stand_out(page: Browser) -> None:
    """3 to 1, as WCAG asks of graphics."""
    ratios = page.run(
        """(() => {
            const style = getComputedStyle(document.documentElement);
            const light = (hex) => {
                const v = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
                    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2];
            };
            const paper = light(style.getPropertyValue("--paper").trim());
            return [1, 2, 3, 4, 5, 6, 7, 8].map((n) => light(style.getPropertyValue(`--series-${n}`).trim()))
                .map((one) => (Math.max(one, paper) + 0.05) / (Math.min(one, paper) + 0.05));
        })()"""
    )
    assert len(ratios) == 8 and min(ratios) >= 3


def test_a_link_into_something_folded_opens_it(page: Browser) -> None:
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = false))")
    place = "document.querySelector('details.fold h4')"
    page.run(f"{place}.id = 'inside', location.hash = '#inside', new Promise((done) => setTimeout(done, 50))")
    assert page.run(f"{place}.closest('details').open")


def test_on_paper_everything_is_unfolded(page: Browser) -> None:
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = false))")
    page.ask("Page.printToPDF")
    assert page.run("[...document.querySelectorAll('details.fold')].every((found) => found.open)")
