"""The report's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phalanx.errors import InputError
from phalanx.report.html import render_html
from phalanx.report.page import Page
from phalanx.report.seeds import SeedTable
from phalanx.report.seeds_page import seeds_html, seeds_json, seeds_text
from phalanx.report.tables import terminal_table, to_json
from phalanx.runs import write_bytes
from phalanx.runs.atomic import disk_errors, render_json


def write_report(folder: Path, page: Page) -> dict[str, Path]:
    """Write report.html, table.json and table.txt into `folder`, made if need be; each replaces its old one at once.

    Returns the paths by file name. Raises InputError if `folder` is a file, DiskError, leaving the old files.
    """
    return _write(folder, render_html(page), to_json(page), terminal_table(page))


def write_seeds_report(folder: Path, table: SeedTable) -> dict[str, Path]:
    """The same of a study under several seeds."""
    return _write(folder, seeds_html(table), seeds_json(table), seeds_text(table))


def _write(folder: Path, html: str, values: Mapping[str, Any], text: str) -> dict[str, Path]:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, so no report can be written into it; give a folder")
    contents = {"report.html": html.encode(), "table.json": render_json(values), "table.txt": text.encode()}
    with disk_errors(folder, sum(map(len, contents.values()))):
        folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in contents}
    for name, path in paths.items():
        write_bytes(path, contents[name])
    return paths
