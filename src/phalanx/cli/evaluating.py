"""Attacks on one model, and what they say of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.options import SetOption, check_subject, file_name
from phalanx.cli.refusals import refuse_dishonest
from phalanx.errors import HonestyError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from phalanx.config import DualView
    from phalanx.threat import ThreatModel


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder; none with --model.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Attacks joined by commas, such as thorough (AutoAttack, then all that aims at the routing), quick, "
            "standard (AutoAttack), pgd-50 or routing-50 (all surfaces). "
            "[default: pgd-50; with --model standard]"
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use the first N test images.")] = None,
    weights: Annotated[
        str, typer.Option(help="best (on validation) or last; with --model a .safetensors file.")
    ] = "best",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images attacked together; changes no verdict. [default: 64]"),
    ] = None,
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
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after 90s, 10m or 1h30m, at a batch's end; the same command goes on."),
    ] = None,
    attack_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Give up an attack on a batch after so long: not robust, verdict timeout."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/K", help="Only the I-th of K parts of the images; processes share one folder."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="probabilities: evaluate a model that seems to answer with them.")
    ] = None,
    surrogate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|MODULE:FUNCTION",
            help="Also try what breaks this other model: a run, or what a function returns. Repeatable.",
        ),
    ] = None,
    attribution: Annotated[
        bool | None,
        typer.Option(
            "--attribution/--no-attribution",
            help="Say whether the router or an expert is to blame for each broken image. "
            "[default: of a mixture under standard, plus, quick, thorough and routing-STEPS]",
        ),
    ] = None,
    no_checks: Annotated[
        bool, typer.Option("--no-checks", help="Leave out the honesty checks; the report says so.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Evaluate the model that this function returns. Runs its code."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --model: digits, folder:PATH or parquet:PATH.")] = None,
    classes: Annotated[
        int | None, typer.Option(min=2, help="With --model: its outputs. [default: the data's classes]")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="With --model: the radius, in pixel units of [0, 1]. [default: 8/255]")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="With --model: Linf, L2 or L1. [default: Linf]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --model: of the attacks. [default: 0]")] = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write. [default: RUN/evaluations/NAME, evaluations/NAME]"),
    ] = None,
) -> None:
    """Measure clean and robust accuracy on the test split, or go on where that was stopped.

    Of RUN, or with --model and --data of any model, images in [0, 1] to logits.
    """
    from phalanx.config import EvaluationConfig
    from phalanx.console import ConsoleReporter
    from phalanx.errors import Interrupted
    from phalanx.evaluation import Limits, Shard, parse_duration
    from phalanx.report import evaluation_text, honesty_text, read_honesty
    from phalanx.threat import ThreatModel, parse_norm
    from phalanx.workflow import (
        HONESTY_NAME,
        LEDGER_NAME,
        Conduct,
        evaluate_foreign,
        evaluate_run,
        evaluate_view,
        evaluation_folder,
        foreign_settings,
    )

    theirs = {"--data": data, "--classes": classes, "--eps": eps, "--norm": norm, "--seed": seed, "--set": set_}
    check_subject(run, model, weights, theirs, {"--standard": standard, "--alpha": alpha})
    asked_norm, asked_eps = norm or "Linf", eps or "8/255"
    if standard is None and alpha is not None:
        raise InputError("--alpha is a dual model's; give --standard RUN too")
    conduct = Conduct(
        limits=Limits(
            seconds=None if time_budget is None else parse_duration(time_budget),
            attack_seconds=None if attack_limit is None else parse_duration(attack_limit),
            shard=None if shard is None else Shard.parse(shard),
        ),
        allow=tuple(allow or ()),
        surrogates=tuple(surrogate or ()),
        announce=lambda message: typer.echo(message, err=True),
    )
    usual = EvaluationConfig()
    settings = EvaluationConfig(
        protocol=protocol or (usual.protocol if model is None else "standard"),
        n=n,
        weights="last" if weights == "last" else "best",
        batch_size=batch_size or usual.batch_size,
        attribution=attribution,
        checks=0 if no_checks else None,
    )
    view = None if standard is None or run is None else _dual_view(standard, run, alpha or "picked")
    folder = out or evaluation_folder(run or Path(), settings, view)
    if model is not None and out is None:
        folder = folder.with_name(file_name(f"{model.replace(':', '.')}-{folder.name}-{asked_norm}-{asked_eps}"))
    if surrogate and out is None:
        names = "+".join(Path(name.replace(":", ".")).name for name in surrogate)
        folder = folder.with_name(file_name(f"{folder.name}-from-{names}"))
    with ConsoleReporter(model or folder.name if run is None else run.name) as reporter:
        try:
            if model is not None:
                threat = _parsed("--eps and --norm", lambda: ThreatModel(parse_norm(asked_norm), asked_eps))
                asked = foreign_settings(str(data), threat, seed or 0, tuple(set_ or ()))
                file = None if weights == "best" else Path(weights)
                evaluate_foreign(model, file, folder, asked, settings, reporter, outputs=classes, conduct=conduct)
            elif run is not None and view is not None:
                runs = {"standard": Path(view.standard), "robust": run}
                evaluate_view(view, runs, folder, settings, reporter, conduct=conduct)
            elif run is not None:
                evaluate_run(run, folder, settings, reporter, conduct=conduct)
        except Interrupted:
            if (folder / LEDGER_NAME).is_file():
                typer.echo(evaluation_text(folder / LEDGER_NAME))
            raise
    typer.echo(evaluation_text(folder / LEDGER_NAME))
    if checked := honesty_text(folder / HONESTY_NAME):
        typer.echo(checked)
    typer.echo(f"evaluation: {folder}")
    honesty = read_honesty(folder / HONESTY_NAME)
    refuse_dishonest([] if honesty is None else honesty.failed)


def attack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    name: Annotated[str, typer.Option("--attack", help="One attack, such as pgd-50 or apgd-t-100x9@pinned.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")],
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use the first N test images.")] = None,
    weights: Annotated[str, typer.Option(help="best (on validation) or last.")] = "best",
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together; changes no verdict.")] = 64,
    png: Annotated[int, typer.Option(min=0, help="Write so many images as PNGs, too.")] = 100,
) -> None:
    """Write a run's adversarial test images and their verdicts, judged again from the files."""
    from phalanx.config import EvaluationConfig
    from phalanx.console import ConsoleReporter
    from phalanx.workflow import attack_run

    if weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}")
    settings = EvaluationConfig(n=n, weights="last" if weights == "last" else "best", batch_size=batch_size)
    with ConsoleReporter(run.name) as reporter:
        done = attack_run(run, name, out, settings, png, reporter)
    typer.echo(f"clean {done.clean_correct:,} of {done.n:,} right, {done.held:,} still right under {done.attack}")
    typer.echo(f"written, and judged again from the file: {done.folder}")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's folder, or a run's.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one's, of the same images and attacks.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how two models differ on the same images, and whether by more than chance."""
    from phalanx.workflow import compare as compared

    found = compared(first, second)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else found.text())


def selftest(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the results as JSON. [default: nothing]")
    ] = None,
) -> None:
    """Plant known flaws in small models and show that each fools a plain attack and is caught here. Takes a minute."""
    from phalanx.console import ConsoleReporter
    from phalanx.runs import write_json
    from phalanx.workflow.compute import cpu_threads
    from phalanx.workflow.selftest import selftest as planted

    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it, or choose another file")
    # models of a few thousand numbers: more threads would only wait for each other
    with ConsoleReporter("selftest") as reporter, cpu_threads(1):
        found = planted(progress=reporter.progress)
    typer.echo(found.text())
    if out is not None:
        write_json(out, found.to_json())
    if found.failed:
        raise HonestyError(f"the self-test failed ({', '.join(found.failed)}): do not trust evaluations made here")


def _parsed(what: str, parse: Callable[[], ThreatModel]) -> ThreatModel:

    try:
        return parse()
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None


def _dual_view(standard: Path, robust: Path, alpha: str) -> DualView:
    from phalanx.config import DualView

    if standard == robust:
        raise InputError(f"--standard {standard} is RUN itself; a dual model has two halves: give another run")
    try:
        return DualView(
            standard=str(standard), robust=str(robust), alpha="picked" if alpha == "picked" else float(alpha)
        )
    except ValueError as error:
        raise InputError(f"--alpha: {error}") from None
