"""From run folders to what people read: a table in the terminal, table.json, and one self-contained HTML page.

Everything goes one way: `build_page` reads the folders into a `Page` of plain values, and the outputs read nothing
but the page. Free of torch.
"""

from __future__ import annotations

from phalanx.report.build import build_page
from phalanx.report.evaluated import evaluation_text
from phalanx.report.files import read_formats, write_report, write_seeds_report
from phalanx.report.honesty import honesty_text, read_honesty
from phalanx.report.html import render_html
from phalanx.report.material import RowSource
from phalanx.report.page import Page
from phalanx.report.seeds import SeedTable, Spread, over_seeds
from phalanx.report.seeds_page import seeds_text
from phalanx.report.tables import terminal_table, to_json

__all__ = [
    "Page",
    "RowSource",
    "SeedTable",
    "Spread",
    "build_page",
    "evaluation_text",
    "honesty_text",
    "over_seeds",
    "read_formats",
    "read_honesty",
    "render_html",
    "seeds_text",
    "terminal_table",
    "to_json",
    "write_report",
    "write_seeds_report",
]
