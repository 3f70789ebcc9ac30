"""The report's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from phalanx.errors import InputError
from phalanx.report.formats import to_csv, to_latex, to_markdown
from phalanx.report.html import render_html
from phalanx.report.page import Page
from phalanx.report.seeds import SeedTable
from phalanx.report.seeds_page import seeds_html, seeds_json, seeds_text
from phalanx.report.tables import terminal_table, to_json
from phalanx.runs import write_bytes
from phalanx.runs.atomic import disk_errors, render_json

FORMATS: Mapping[str, tuple[str, Callable[[Page], str]]] = {
    "html": ("report.html", render_html),
    "json": ("table.json", lambda page: render_json(to_json(page)).decode()),
    "text": ("table.txt", terminal_table),
    "csv": ("table.csv", to_csv),
    "latex": ("table.tex", to_latex),
    "markdown": ("table.md", to_markdown),
}
"""The file of each format, and what is in it."""
DEFAULT_FORMATS = ("html", "json", "text")


def read_formats(asked: Sequence[str]) -> tuple[str, ...]:
    """The formats named, each once; a name may be several with commas between them. None named: `DEFAULT_FORMATS`.

    Raises InputError for one that is none.
    """
    names = tuple(dict.fromkeys(name.strip() for text in asked for name in text.split(",")))
    unknown = next((name for name in names if name not in FORMATS), None)
    if unknown is not None:
        raise InputError(f"--format must be among {', '.join(FORMATS)}, got {unknown!r}")
    return names or DEFAULT_FORMATS


def write_report(folder: Path, page: Page, formats: Sequence[str] = DEFAULT_FORMATS) -> dict[str, Path]:
    """Write the page in each of `formats` (see `FORMATS`) into `folder`, made if need be; each file replaces its old
    one at once. The same page gives the same bytes.

    Returns the paths by file name. Raises InputError if `folder` is a file, DiskError, leaving the old files.
    """
    files = (FORMATS[name] for name in formats)
    return _write(folder, {name: render(page).encode() for name, render in files})


def write_seeds_report(folder: Path, table: SeedTable) -> dict[str, Path]:
    """report.html, table.json and table.txt of a study under several seeds."""
    contents = {
        "report.html": seeds_html(table).encode(),
        "table.json": render_json(seeds_json(table)),
        "table.txt": seeds_text(table).encode(),
    }
    return _write(folder, contents)


def _write(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, so no report can be written into it; give a folder")
    with disk_errors(folder, sum(map(len, contents.values()))):
        folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in contents}
    for name, path in paths.items():
        write_bytes(path, contents[name])
    return paths
