"""What can be run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from phalanx.cli.options import RecipeArgument, SetOption


def list_recipes() -> None:
    """The recipes that come with Phalanx."""
    from phalanx.config import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{name:<20} {first}")


def show_recipe(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every setting, defaults included.")] = False,
) -> None:
    """A recipe's text, or with --resolved everything it stands for."""
    import yaml

    from phalanx.config import find_recipe, is_study, load_run, load_study
    from phalanx.loading import read_text, to_plain
    from phalanx.workflow import plan

    path = find_recipe(recipe)
    if not (resolved or set_):
        typer.echo(read_text(path), nl=False)
        return
    overrides = tuple(set_ or ())
    if not is_study(path):
        shown: object = load_run(recipe, overrides).resolved
    else:
        resolved_runs = {name: to_plain(config) for name, config in plan(recipe, overrides).runs.items()}
        shown = {**load_study(recipe).resolved, "runs": resolved_runs}
    typer.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), nl=False)


def show_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from phalanx.config import RunConfig
    from phalanx.loading import schema

    typer.echo(json.dumps(schema(RunConfig), indent=2))
