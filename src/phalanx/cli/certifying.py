"""Certificates of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli.options import check_subject, file_name
from phalanx.errors import InputError

if TYPE_CHECKING:
    from phalanx.config import EvaluationConfig


def certify(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder; none with --model.")] = None,
    norm: Annotated[str, typer.Option(help="L2, Linf or L1.")] = "L2",
    method: Annotated[
        str,
        typer.Option(
            help="auto (the best that applies), lipschitz, ibp or crown; smoothing for the smoothed classifier."
        ),
    ] = "auto",
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use the first N test images.")] = None,
    weights: Annotated[
        str, typer.Option(help="best (on validation) or last; with --model a .safetensors file.")
    ] = "best",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images, or noisy copies of one, looked at together; changes no radius.")
    ] = 256,
    reachable: Annotated[
        str | None,
        typer.Option(help="When a linear router can reach an expert: pairwise or exact. [default: pairwise]"),
    ] = None,
    as_printed: Annotated[
        bool,
        typer.Option(
            "--as-printed",
            help="Attack the test images inside the radii that the dual-model paper's printed, UNSOUND theorems claim.",
        ),
    ] = False,
    sigma: Annotated[
        float | None, typer.Option(help="Smoothing: deviation of the noise, in pixel units of [0, 1]. [default: 0.25]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Smoothing: noisy copies that estimate. [default: 10000]")] = None,
    selection_samples: Annotated[
        int | None, typer.Option(help="Smoothing: others, that pick the winner. [default: 100]")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Smoothing: of each image's certificate. [default: 0.999]")
    ] = None,
    smoothed: Annotated[
        str | None, typer.Option(help="Smoothing: whole, or robust (half of a dual model). [default: whole]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Smoothing: of the noise. [default: 0]")] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Smoothing: stop after 90s, 10m or 1h30m; the same command goes on."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Smooth the model that this function returns. Runs its code."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --model: digits, folder:PATH or parquet:PATH.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write. [default: RUN/certificates/NAME]")
    ] = None,
) -> None:
    """Prove, for each test image of a run, a radius within which no attack changes a right answer.

    Smoothing certifies any model, averaged over Gaussian noise, in L2 and with high probability.
    """
    from phalanx.certification import certificate_text, smoothed_text
    from phalanx.config import EvaluationConfig
    from phalanx.console import ConsoleReporter
    from phalanx.workflow import attack_printed, certify_run, printed_text

    settings = EvaluationConfig(n=n, weights="last" if weights == "last" else "best", batch_size=batch_size)
    asked = {
        "sigma": sigma,
        "samples": samples,
        "selection_samples": selection_samples,
        "confidence": confidence,
        "smoothed": smoothed,
        "seed": seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if method == "smoothing":
        if reachable is not None or as_printed:
            option = "--as-printed" if as_printed else "--reachable"
            raise InputError(f"{option} is not for --method smoothing, which reads no gate; leave it out")
        check_subject(run, model, weights, {"--data": data}, {})
        file = None if model is None or weights == "best" else Path(weights)
        subject = run if run is not None else (str(model), file, str(data))
        folder, found = _smooth(subject, norm, settings, given, time_budget, out)
        typer.echo("not finished; the same command goes on" if found is None else smoothed_text(found))
        typer.echo(f"{'kept' if found is None else 'written'}: {folder}")
        return
    if given or time_budget is not None:
        first = next(iter(given), "time_budget").replace("_", "-")
        raise InputError(f"--{first} is for --method smoothing; leave it out")
    if run is None or model is not None or data is not None:
        raise InputError(f"--method {method} certifies a run: give its folder; --model is for --method smoothing")
    if weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}")
    if as_printed:
        if method != "auto" or reachable is not None:
            raise InputError("--as-printed shows what the paper's theorems say: leave out --method and --reachable")
        with ConsoleReporter(run.name) as reporter:
            folder, record = attack_printed(run, settings, norm, out, reporter)
        typer.echo(printed_text(record))
        typer.echo(f"written: {folder / 'printed.json'}")
        return
    with ConsoleReporter(run.name) as reporter:
        folder, record = certify_run(run, settings, norm, method, out, reporter, reachable=reachable or "pairwise")
    typer.echo(certificate_text(record))
    typer.echo(f"written: {folder / 'certificates.json'}")


def _smooth(
    subject: Path | tuple[str, Path | None, str],
    norm: str,
    settings: EvaluationConfig,
    given: dict[str, Any],
    time_budget: str | None,
    out: Path | None,
) -> tuple[Path, dict[str, Any] | None]:
    """Of a run, or of a model, the file of its weights and its data: the folder, and its record once it is finished."""
    from phalanx.certification import Smoothing
    from phalanx.certification.smoothing import require_l2
    from phalanx.console import ConsoleReporter
    from phalanx.evaluation import parse_duration
    from phalanx.threat import ThreatModel
    from phalanx.workflow import foreign_settings, smooth_foreign, smooth_run, smoothed_folder

    require_l2(norm)
    smoothing = Smoothing(**given)
    seconds = None if time_budget is None else parse_duration(time_budget)

    def announce(message: str) -> None:
        typer.echo(message, err=True)

    if isinstance(subject, Path):
        with ConsoleReporter(subject.name) as reporter:
            return smooth_run(subject, settings, smoothing, out, reporter, seconds=seconds, announce=announce)
    model, weights, data = subject
    folder = out or smoothed_folder(Path(), settings, smoothing)
    if out is None:
        folder = folder.with_name(file_name(f"{model.replace(':', '.')}-{folder.name}"))
    asked = foreign_settings(data, ThreatModel(), smoothing.seed)
    with ConsoleReporter(model) as reporter:
        return smooth_foreign(
            model, weights, folder, asked, settings, smoothing, reporter, seconds=seconds, announce=announce
        )
