"""One recipe."""

from __future__ import annotations

from pathlib import Path

import typer

from phalanx.cli.options import FreshOption, OutOption, RecipeArgument, SetOption


def train(recipe: RecipeArgument, set_: SetOption = None, out: OutOption = None, fresh: FreshOption = False) -> None:
    """Train one recipe into a run folder, or take it up again."""
    from phalanx.config import load_run
    from phalanx.console import ConsoleReporter
    from phalanx.loading import placed
    from phalanx.runs import RunFolder
    from phalanx.workflow import train_run

    loaded = load_run(recipe, tuple(set_ or ()))
    folder = out or Path("runs") / Path(recipe).stem
    if fresh:
        target = RunFolder(folder)
        with target.lock():
            target.clear()
    with ConsoleReporter(folder.name) as reporter, placed(loaded.sources):
        train_run(loaded.value, folder, reporter)
    typer.echo(f"run: {folder}")
