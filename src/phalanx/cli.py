"""The command line: a command is one thin function over `phalanx.workflow`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx import __version__
from phalanx.errors import PhalanxError

if TYPE_CHECKING:
    from phalanx.config import DualView
    from phalanx.report import RowSource
    from phalanx.runs import Summary
    from phalanx.workflow import Plan

EXIT_CODES = """Exit codes: 0 done, 2 wrong input, 3 training diverged, 4 a file is corrupt, 5 disk full or not
writable, 6 the folder is in use, 130 or 143 stopped by a signal after saving."""

app = typer.Typer(
    name="phalanx",
    help="Train, attack and report on image classifiers that are mixtures of experts.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="What can be run, and with which settings.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Look at a data set before using it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as model.experts=8. Repeatable."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Where to write. [default: runs/RECIPE]"),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=64,
        help="Processes for independent runs. [default: 2 on a CPU with two cores or more, else 1]",
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Remove what the folder holds and start again.")]


def _out(out: Path | None, recipe: str) -> Path:
    return out or Path("runs") / Path(recipe).stem


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phalanx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    workers: WorkersOption = None,
) -> None:
    """Train and evaluate everything a study or recipe names; print the table, write the report.

    The same command takes up interrupted work where it stopped, and repeats nothing that is finished.
    """
    from phalanx.report import terminal_table
    from phalanx.workflow import plan, report_on

    overrides = tuple(set_ or ())
    work = plan(recipe, overrides)
    folder = _out(out, recipe)
    rows = _made(work, folder, fresh, workers)
    command = " ".join(["phalanx run", recipe, *(f"--set {item}" for item in overrides)])
    page, files = report_on(rows, folder, title=work.title, description=work.description, command=command)
    typer.echo(terminal_table(page))
    typer.echo(f"report: {files['report.html']}")


def _made(work: Plan, folder: Path, fresh: bool, workers: int | None) -> list[RowSource]:
    from phalanx.console import ConsoleReporter
    from phalanx.workflow import default_workers, make_study

    return make_study(
        work,
        folder,
        ConsoleReporter,
        fresh=fresh,
        progress=lambda name, step: typer.echo(f"{name}: {step}", err=True),
        workers=workers or default_workers(work),
    )


@app.command()
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
    fresh: FreshOption = False,
    workers: WorkersOption = None,
) -> None:
    """Make the rows of a paper's table: what was printed, what the released attack says, and what was measured."""
    from phalanx.config import load_reproduction, shipped_reproductions
    from phalanx.report import terminal_table
    from phalanx.workflow import report_on, reproduction

    if table is None:
        for name in shipped_reproductions():
            typer.echo(f"{name:<16} {load_reproduction(name).value.title}")
        return
    overrides = tuple(set_ or ())
    made = reproduction(table, scale, overrides)
    folder = made.folder(out)
    rows = _made(made.plan, folder, fresh, workers)
    command = " ".join([f"phalanx reproduce {table} --scale {scale}", *(f"--set {item}" for item in overrides)])
    page, files = report_on(
        rows,
        folder / "tables" / table.replace("/", "-"),
        title=made.plan.title,
        description=made.plan.description,
        command=command,
        reported=made.reported,
        reported_source=made.source,
    )
    typer.echo(terminal_table(page))
    typer.echo(f"report: {files['report.html']}")


@app.command()
def train(recipe: RecipeArgument, set_: SetOption = None, out: OutOption = None, fresh: FreshOption = False) -> None:
    """Train one recipe into a run folder, or take it up again."""
    from phalanx.config import load_run
    from phalanx.console import ConsoleReporter
    from phalanx.runs import RunFolder
    from phalanx.workflow import train_run

    config = load_run(recipe, tuple(set_ or ())).value
    folder = _out(out, recipe)
    if fresh:
        target = RunFolder(folder)
        with target.lock():
            target.clear()
    with ConsoleReporter(folder.name) as reporter:
        train_run(config, folder, reporter)
    typer.echo(f"run: {folder}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Attacks joined by commas, such as pgd-50 or routing-50 (all surfaces). [default: the recipe's]"
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use the first N test images.")] = None,
    weights: Annotated[str, typer.Option(help="best (on validation) or last.")] = "best",
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together; changes no verdict.")] = 64,
    standard: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Evaluate the dual model of this standard half and RUN, the robust one."),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Weight of the robust half in [0, 1]; picked: by its margins on validation data. [default: picked]"
        ),
    ] = None,
) -> None:
    """Measure a run's clean and robust accuracy on its test split, or go on where that was stopped."""
    from phalanx.config import EvaluationConfig
    from phalanx.console import ConsoleReporter
    from phalanx.errors import InputError
    from phalanx.runs import Ledger, summarise
    from phalanx.runs.summary import aside_attacks
    from phalanx.workflow import LEDGER_NAME, evaluate_run, evaluate_view, evaluation_folder, run_config

    if weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}")
    if standard is None and alpha is not None:
        raise InputError("--alpha is a dual model's; give --standard RUN too")
    settings = EvaluationConfig(
        protocol=protocol or run_config(run).evaluation.protocol,
        n=n,
        weights="best" if weights == "best" else "last",
        batch_size=batch_size,
        analysis=run_config(run).evaluation.analysis,
    )
    view = None if standard is None else _dual_view(standard, run, alpha or "picked")
    folder = evaluation_folder(run, settings, view)
    with ConsoleReporter(run.name) as reporter:
        if view is None:
            evaluate_run(run, folder, settings, reporter)
        else:
            evaluate_view(view, {"standard": Path(view.standard), "robust": run}, folder, settings, reporter)
    with Ledger.read(folder / LEDGER_NAME) as ledger:
        binding, attacks = ledger.binding(), ledger.attacks()
        aside = aside_attacks(attacks, binding.norm, binding.eps)
        typer.echo(_summary_text(summarise(ledger.rows(), aside=aside), f"{binding.norm} {binding.eps}"))
    typer.echo(f"evaluation: {folder}")


def _dual_view(standard: Path, robust: Path, alpha: str) -> DualView:
    from phalanx.config import DualView
    from phalanx.errors import InputError

    try:
        return DualView(
            standard=str(standard), robust=str(robust), alpha="picked" if alpha == "picked" else float(alpha)
        )
    except ValueError as error:
        raise InputError(f"--alpha: {error}") from None


def _summary_text(summary: Summary, threat: str) -> str:
    def line(name: str, accuracy: float, interval: tuple[float, float], n: int) -> str:
        return f"{name:<24} {accuracy:6.1%}  [{interval[0]:.1%}, {interval[1]:.1%}]  n = {n}"

    lines = [line("clean", summary.clean_accuracy, summary.clean_interval, summary.n)]
    # a name with a radius of its own says it
    lines += [
        line(a.attack if ":" in a.attack else f"{a.attack} ({threat})", a.accuracy, a.interval, a.n)
        for a in summary.attacks
    ]
    lines.append(line("worst case per image", summary.robust_accuracy, summary.robust_interval, summary.n))
    return "\n".join(lines)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Studies or evaluated runs, side by side.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write. [default: the first folder]"),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Robustness report",
) -> None:
    """Write report.html, table.json and table.txt from what was evaluated; computes nothing."""
    from phalanx.report import terminal_table
    from phalanx.workflow import find_rows, report_on

    command = " ".join(["phalanx report", *map(str, runs)])
    page, files = report_on(find_rows(runs), out or runs[0], title=title, description="", command=command)
    typer.echo(terminal_table(page))
    typer.echo(f"report: {files['report.html']}")


@recipes_app.command("list")
def recipes_list() -> None:
    """The recipes that come with Phalanx."""
    from phalanx.config import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{name:<20} {first}")


@recipes_app.command("show")
def recipes_show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every setting, defaults included.")] = False,
) -> None:
    """A recipe's text, or with --resolved everything it stands for."""
    import yaml

    from phalanx.config import find_recipe, is_study, load_run, load_study
    from phalanx.loading import to_plain
    from phalanx.workflow import plan

    path = find_recipe(recipe)
    if not (resolved or set_):
        typer.echo(path.read_text(encoding="utf-8"), nl=False)
        return
    overrides = tuple(set_ or ())
    if not is_study(path):
        shown: object = load_run(recipe, overrides).resolved
    else:
        resolved_runs = {name: to_plain(config) for name, config in plan(recipe, overrides).runs.items()}
        shown = {**load_study(recipe).resolved, "runs": resolved_runs}
    typer.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), nl=False)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from phalanx.config import RunConfig
    from phalanx.loading import schema

    typer.echo(json.dumps(schema(RunConfig), indent=2))


DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="digits, folder:PATH, parquet:PATH, or a recipe whose data is meant.")
]


@data_app.command("check")
def data_check(data: DataArgument, set_: SetOption = None) -> None:
    """Name everything that is wrong with a data set; nothing is written."""
    from phalanx.console import ConsoleReporter
    from phalanx.data.describe import check_source
    from phalanx.errors import InputError
    from phalanx.workflow import data_config

    with ConsoleReporter(data) as reporter:
        problems = check_source(data_config(data, tuple(set_ or ())), reporter.progress)
    if problems:
        raise InputError("\n  ".join([f"{len(problems)} problems in {data}:", *problems]))
    typer.echo(f"{data}: nothing wrong")


@data_app.command("describe")
def data_describe(data: DataArgument, set_: SetOption = None) -> None:
    """Sizes, classes, statistics and remarks of a data set, as JSON."""
    from phalanx.console import ConsoleReporter
    from phalanx.data import load_data
    from phalanx.data.describe import describe
    from phalanx.workflow import data_config

    with ConsoleReporter(data) as reporter:
        splits = load_data(data_config(data, tuple(set_ or ())), progress=reporter.progress)
    typer.echo(json.dumps(describe(splits), indent=2))


def main() -> None:
    """Runs a command; a user's mistake is one message and an exit code, never a traceback."""
    # read by cuBLAS when it starts: without it, matrix products on a GPU are not repeatable
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app()
    except PhalanxError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
