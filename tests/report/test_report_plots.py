from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib as mpl

from phalanx.report.plots import Dot, Series, interval_plot, line_plot, load_plot

NAMESPACE = 'xmlns:xlink="x" '


def _text(svg: str) -> list[str]:
    tree = ElementTree.fromstring(svg.replace("<svg ", f"<svg {NAMESPACE}", 1))
    return [element.text or "" for element in tree.iter("text")]


def _dot(share: float) -> Dot:
    return Dot("RA, pgd-50", share, share - 5, share + 5, f"{share}", 1)


def test_text_stays_text_and_labels_are_no_formulas() -> None:
    svg = interval_plot("p", [("$x_{ <b> & c", [_dot(50.0)])], 'said "so" <here>')
    assert "$x_{ <b> & c" in _text(svg)
    assert 'aria-label="said &quot;so&quot; &lt;here&gt;"' in svg


def test_an_interval_is_drawn_where_it_is() -> None:
    svg = interval_plot("p", [("A", [_dot(50.0)]), ("B", [_dot(25.0)])], "d")
    # bars of 45 to 55 and of 20 to 30 on the same scale: starts 25 apart, each 10 long
    drawn = re.findall(r'<path d="(M [^"]*)" style="([^"]*opacity: 0\.35[^"]*)"', svg)
    (first, first_end), (second, second_end) = (
        [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path, _ in drawn
    )
    assert abs((first - second) / (first_end - first) - 2.5) < 0.01
    assert abs((first_end - first) - (second_end - second)) < 0.05
    # a cap would lengthen the bar
    assert not any("stroke-linecap: square" in style for _, style in drawn)


def test_colours_follow_the_page_and_nothing_is_foreign() -> None:
    svg = line_plot("p", [Series("a", [1, 2], [1.0, 2.0], 0), Series("b", [1, 2], [2.0, None], 1)], "loss", "d")
    assert "var(--series-1)" in svg
    assert "var(--muted)" in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    for foreign in ("<style", "<metadata", "DOCTYPE", "http", "DejaVu", "font:"):
        assert foreign not in svg


def test_the_same_lists_give_the_same_bytes_and_other_names_other_ids() -> None:
    def ids(name: str) -> set[str]:
        return set(re.findall(r' id="([^"]*)"', draw(name)))

    def draw(name: str) -> str:
        return line_plot(name, [Series("a", [1, 2], [1.0, 2.0], 0)], "loss", "d")

    assert draw("p") == draw("p")
    assert ids("p")
    assert not ids("p") & ids("q")


def test_a_single_epoch_is_seen() -> None:
    assert "<use " in line_plot("p", [Series("a", [1], [1.0], 0)], "loss", "d")
    svg = load_plot("p", [1], [(70.0, 27.0, 3.0)], "d")
    # a band below 4 % has no room for its name
    assert [word for word in _text(svg) if word.startswith("expert")] == ["expert 0", "expert 1"]


def test_matplotlibs_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    load_plot("p", [1, 2], [(50.0, 50.0), (60.0, 40.0)], "d")
    assert dict(mpl.rcParams) == before
