"""Adversarial images that anybody made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phalanx.errors import HonestyError, InputError


def submit_images(
    images: Annotated[Path, typer.Argument(metavar="X_ADV.NPZ", help="x_adv (n, C, H, W) and ids (n,).")],
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="A run's folder, or an evaluation's.")],
    name: Annotated[str, typer.Option("--name", help="Who submits; once merged, it stays.")],
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", metavar="FOLDER", help="Which one. [default: the run's only one]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Of a model made elsewhere: what was evaluated. Runs its code."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="With --model: its .safetensors file.")] = None,
) -> None:
    """Judge somebody's adversarial images on the real model and merge them: robust accuracy can only fall."""
    from phalanx.workflow.challenge import submit
    from phalanx.workflow.evaluated import Foreign

    if weights is not None and model is None:
        raise InputError("--weights goes with --model")
    foreign = None if model is None else Foreign(model, weights)
    done = submit(images, run, name, evaluation, foreign=foreign)
    typer.echo(done.text())
    if done.contradicted:
        raise HonestyError(f"{name} broke {done.disproved}: a certificate is unsound, or the verdict wrong")


def list_submissions(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an evaluation's.")],
) -> None:
    """What was submitted to a run's evaluations, and what it broke."""
    from phalanx.workflow.challenge import standings

    for standing in standings(run):
        typer.echo(standing.text())
