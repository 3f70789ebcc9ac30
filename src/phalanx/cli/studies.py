"""Studies, papers' tables, and the reports of what was evaluated."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.options import FreshOption, OutOption, RecipeArgument, SeedsOption, SetOption, WorkersOption
from phalanx.cli.refusals import refuse_contradicted, refuse_dishonest

if TYPE_CHECKING:
    from collections.abc import Callable

    from phalanx.report import Page
    from phalanx.workflow import Reproduction


TITLE = "Robustness report"


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    seeds: SeedsOption = None,
    fresh: FreshOption = False,
    workers: WorkersOption = None,
) -> None:
    """Train and evaluate everything a study or recipe names; print the table, write the report.

    The same command takes up interrupted work where it stopped, and repeats nothing that is finished.
    """
    from phalanx.workflow import whole_study

    _study(lambda overrides: whole_study(recipe, overrides), set_, out, seeds, fresh, workers)


def reproduce(
    table: Annotated[
        str | None, typer.Argument(metavar="TABLE", help="A paper's table, such as dual/table3; none lists them.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="digits (minutes on a CPU), reduced (narrow, few epochs) or full (the paper's size).")
    ] = "digits",
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the study's runs go. [default: runs/STUDY, shared by tables]"),
    ] = None,
    seeds: SeedsOption = None,
    fresh: FreshOption = False,
    workers: WorkersOption = None,
) -> None:
    """Make the rows of a paper's table: what was printed, what the released attack says, and what was measured."""
    from phalanx.config import load_reproduction, shipped_reproductions
    from phalanx.workflow import reproduction

    if table is None:
        for name in shipped_reproductions():
            typer.echo(f"{name:<16} {load_reproduction(name).value.title}")
        return
    named = table
    _study(lambda overrides: reproduction(named, scale, overrides), set_, out, seeds, fresh, workers)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Studies, evaluated runs or models' evaluations, side by side."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write. [default: the first folder]"),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = TITLE,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="html, json, text, csv, latex or markdown; repeated or joined by commas. [default: html,json,text]",
        ),
    ] = None,
) -> None:
    """Write a page and tables of what was evaluated; computes nothing, and the same folders give the same bytes."""
    from phalanx.report import terminal_table
    from phalanx.workflow import find_rows, report_on

    given = ["phalanx", "report", *map(str, runs)]
    given += [part for name in format_ or () for part in ("--format", name)]
    given += [] if title == TITLE else ["--title", title]
    given += [] if out is None else ["--out", str(out)]
    page, files = report_on(
        find_rows(runs), out or runs[0], title=title, description="", command=shlex.join(given), formats=format_ or ()
    )
    typer.echo(terminal_table(page))
    for name, path in files.items():
        typer.echo(f"{'report' if name == 'report.html' else name}: {path}")
    refuse_contradicted([page])


def _study(
    make: Callable[[tuple[str, ...]], Reproduction],
    set_: list[str] | None,
    out: Path | None,
    seeds: str | None,
    fresh: bool,
    workers: int | None,
) -> None:
    """Makes what `make` plans from settings, once for each seed if some are named; prints the table."""
    from phalanx.report import terminal_table
    from phalanx.workflow import parse_seeds, report_over_seeds, seed_folder

    overrides = tuple(set_ or ())
    if seeds is None:
        work = make(overrides)
        page, files = _made(work, work.folder(out), _command(work, overrides, out), fresh, workers)
        text, made = terminal_table(page), [page]
    else:
        chosen = parse_seeds(seeds, overrides)
        settings = {seed: (*overrides, f"seed={seed}") for seed in chosen}
        planned = {seed: make(settings[seed]) for seed in chosen}
        work = planned[chosen[0]]
        folder = work.folder(out)
        pages: dict[int, Page] = {}
        for seed in chosen:
            typer.echo(f"seed {seed}", err=True)
            into = seed_folder(folder, seed)
            again = _command(planned[seed], settings[seed], None if out is None else into)
            pages[seed], _ = _made(planned[seed], into, again, fresh, workers)
        command = f"{_command(work, overrides, out)} --seeds {','.join(map(str, chosen))}"
        text, files = report_over_seeds(pages, folder / work.report_in, command)
        made = list(pages.values())
    typer.echo(text)
    typer.echo(f"report: {files['report.html']}")
    refuse_contradicted(made)
    checked = [(row.label, row.honesty) for page in made for row in page.rows if row.honesty]
    refuse_dishonest(sorted({f"{label}: {check}" for label, honesty in checked for check in honesty.failed}))


def _command(work: Reproduction, overrides: tuple[str, ...], out: Path | None) -> str:
    """What makes it again, to be pasted into a shell."""
    given = [part for item in overrides for part in ("--set", item)] + ([] if out is None else ["--out", str(out)])
    return " ".join([work.command, *map(shlex.quote, given)])


def _made(
    work: Reproduction, folder: Path, command: str, fresh: bool, workers: int | None
) -> tuple[Page, dict[str, Path]]:
    """Makes what is not finished yet, and its report: the page, and its files by name."""
    from phalanx.console import ConsoleReporter
    from phalanx.workflow import default_workers, make_study, report_on

    rows = make_study(
        work.plan,
        folder,
        ConsoleReporter,
        fresh=fresh,
        progress=lambda name, step: typer.echo(f"{name}: {step}", err=True),
        workers=workers or default_workers(work.plan),
    )
    return report_on(
        rows,
        folder / work.report_in,
        title=work.plan.title,
        description=work.plan.description,
        command=command,
        reported=work.reported,
        reported_source=work.source,
    )
