"""What several commands take, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from phalanx.errors import InputError

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or the path of a YAML file.")]
DataArgument = Annotated[
    str,
    typer.Argument(metavar="DATA", help="digits, folder:PATH, parquet:PATH, a public set, or a recipe with its data."),
]
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
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N,...",
        help="Make everything once for each training seed, in DIR/seed-N; report mean ± deviation.",
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Remove what the folder holds and start again.")]


def check_subject(
    run: Path | None, model: str | None, weights: str, for_model: Mapping[str, object], for_run: Mapping[str, object]
) -> None:
    """Raises InputError unless a run or a model is named, with the options that belong to it; both mappings are options
    by their names, None where they were not given."""
    if (run is None) == (model is None):
        raise InputError("give either a run's folder or --model MODULE:FUNCTION, and not both")
    if run is not None and weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}; a file goes with --model")
    for option, value in (for_model if run is not None else for_run).items():
        if value is not None:
            whose = "--model: a run has its own, as its recipe says" if run is not None else "a run, not for --model"
            raise InputError(f"{option} is for {whose}; leave it out")
    if model is not None and for_model["--data"] is None:
        raise InputError("--model needs --data, such as digits or folder:PATH")


def file_name(text: str) -> str:
    """`text` without what leads out of a folder."""
    return text.replace("/", "_").replace("\0", "_")
