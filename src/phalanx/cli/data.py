"""Data sets, before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from phalanx.cli.options import DataArgument, SetOption
from phalanx.errors import InputError


def check_data(data: DataArgument, set_: SetOption = None) -> None:
    """Name everything that is wrong with a data set; nothing is written."""
    from phalanx.console import ConsoleReporter
    from phalanx.data.describe import check_source
    from phalanx.workflow import data_config

    with ConsoleReporter(data) as reporter:
        problems = check_source(data_config(data, tuple(set_ or ())), reporter.progress)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError("\n  ".join([f"{count} in {data}:", *problems]))
    typer.echo(f"{data}: nothing wrong")


def get_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mnist, cifar10, cifar100, svhn or tiny-imagenet.")],
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Where to. [default: where runs look: $PHALANX_DATA/NAME]"),
    ] = None,
) -> None:
    """Download a public data set and verify its checksum; needs phalanx[vision]. Nothing else here downloads."""
    from phalanx.data.fetch import fetch

    folder = fetch(name, root, tell=lambda message: typer.echo(message, err=True))
    typer.echo(f"{name}: {folder}")


def describe_data(
    data: DataArgument,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Also write description.json and perturbed.png: images at each eps."),
    ] = None,
) -> None:
    """Sizes, classes, statistics, remarks and a suggested eps of a data set, as JSON."""
    from phalanx.console import ConsoleReporter
    from phalanx.data import load_data
    from phalanx.data.describe import describe, write_description
    from phalanx.workflow import data_config

    with ConsoleReporter(data) as reporter:
        splits = load_data(data_config(data, tuple(set_ or ())), progress=reporter.progress)
    facts = describe(splits) if out is None else write_description(splits, out)
    typer.echo(json.dumps(facts, indent=2))
    if out is not None:
        typer.echo(f"eps: {facts['epsilon']['reason']}\nwritten: {out / 'perturbed.png'}", err=True)
