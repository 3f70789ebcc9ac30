"""The command line: a command is one thin function over `phalanx.workflow`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx import __version__
from phalanx.errors import DiskError, InputError, PhalanxError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phalanx.config import DualView, EvaluationConfig
    from phalanx.report import Page
    from phalanx.threat import ThreatModel
    from phalanx.workflow import Reproduction

EXIT_CODES = """Exit codes: 0 done, 2 wrong input, 3 training diverged, 4 a file is corrupt, 5 disk full or not
writable, 6 the folder is in use, 7 a check of the numbers failed, 130 or 143 stopped by a signal after saving."""

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

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
challenge_app = typer.Typer(
    help="Judge images that anybody made, and lower a headline with them.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(challenge_app, name="challenge")

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
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N,...",
        help="Make everything once for each training seed, in DIR/seed-N; report mean ± deviation.",
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
    seeds: SeedsOption = None,
    fresh: FreshOption = False,
    workers: WorkersOption = None,
) -> None:
    """Train and evaluate everything a study or recipe names; print the table, write the report.

    The same command takes up interrupted work where it stopped, and repeats nothing that is finished.
    """
    from phalanx.workflow import whole_study

    _study(lambda overrides: whole_study(recipe, overrides), set_, out, seeds, fresh, workers)


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
        page, files = _made(work, work.folder(out), overrides, fresh, workers)
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
            pages[seed], _ = _made(planned[seed], seed_folder(folder, seed), settings[seed], fresh, workers)
        command = f"{_command(work, overrides)} --seeds {','.join(map(str, chosen))}"
        text, files = report_over_seeds(pages, folder / work.report_in, command)
        made = list(pages.values())
    typer.echo(text)
    typer.echo(f"report: {files['report.html']}")
    _refuse_contradicted(made)
    checked = [(row.label, row.honesty) for page in made for row in page.rows if row.honesty]
    _refuse_dishonest(sorted({f"{label}: {check}" for label, honesty in checked for check in honesty.failed}))


def _command(work: Reproduction, overrides: tuple[str, ...]) -> str:
    return " ".join([work.command, *(f"--set {item}" for item in overrides)])


def _made(
    work: Reproduction, folder: Path, overrides: tuple[str, ...], fresh: bool, workers: int | None
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
        command=_command(work, overrides),
        reported=work.reported,
        reported_source=work.source,
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


@app.command()
def train(recipe: RecipeArgument, set_: SetOption = None, out: OutOption = None, fresh: FreshOption = False) -> None:
    """Train one recipe into a run folder, or take it up again."""
    from phalanx.config import load_run
    from phalanx.console import ConsoleReporter
    from phalanx.loading import placed
    from phalanx.runs import RunFolder
    from phalanx.workflow import train_run

    loaded = load_run(recipe, tuple(set_ or ()))
    folder = _out(out, recipe)
    if fresh:
        target = RunFolder(folder)
        with target.lock():
            target.clear()
    with ConsoleReporter(folder.name) as reporter, placed(loaded.sources):
        train_run(loaded.value, folder, reporter)
    typer.echo(f"run: {folder}")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder; none with --model.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Attacks joined by commas, such as thorough (AutoAttack, then all that aims at the routing), quick, "
            "standard (AutoAttack), pgd-50 or routing-50 (all surfaces). "
            "[default: the recipe's; with --model standard]"
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use the first N test images.")] = None,
    weights: Annotated[
        str, typer.Option(help="best (on validation) or last; with --model a .safetensors file.")
    ] = "best",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images attacked together; changes no verdict. [default: the recipe's; else 64]"),
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
    eps: Annotated[str, typer.Option(help="With --model: the radius, in pixel units of [0, 1].")] = "8/255",
    norm: Annotated[str, typer.Option(help="With --model: Linf, L2 or L1.")] = "Linf",
    seed: Annotated[int, typer.Option(min=0, help="With --model: of the attacks.")] = 0,
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
    from phalanx.errors import InputError, Interrupted
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
        run_config,
    )

    _check_subject(run, model, data, weights, set_)
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
    own = None if run is None else run_config(run).evaluation
    settings = EvaluationConfig(
        protocol=protocol or (own.protocol if own else "standard"),
        n=n,
        weights="last" if weights == "last" else "best",
        batch_size=batch_size or (own.batch_size if own else EvaluationConfig().batch_size),
        analysis=own.analysis if own else None,
        attribution=own.attribution if own and attribution is None else attribution,
        checks=0 if no_checks else own.checks if own else None,
    )
    view = None if standard is None or run is None else _dual_view(standard, run, alpha or "picked")
    folder = out or evaluation_folder(run or Path(), settings, view)
    if model is not None and out is None:
        folder = folder.with_name(_file_name(f"{model.replace(':', '.')}-{folder.name}-{norm}-{eps}"))
    if surrogate and out is None:
        names = "+".join(Path(name.replace(":", ".")).name for name in surrogate)
        folder = folder.with_name(_file_name(f"{folder.name}-from-{names}"))
    with ConsoleReporter(model or folder.name if run is None else run.name) as reporter:
        try:
            if model is not None:
                threat = _parsed("--eps and --norm", lambda: ThreatModel(parse_norm(norm), eps))
                asked = foreign_settings(str(data), threat, seed, tuple(set_ or ()))
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
    _refuse_dishonest([] if honesty is None else honesty.failed)


def _file_name(text: str) -> str:
    """`text` without what leads out of a folder."""
    return text.replace("/", "_").replace("\0", "_")


def _refuse_dishonest(failed: Sequence[str]) -> None:
    """Raises HonestyError where honesty checks failed: everything is written, and the headline says nothing."""
    from phalanx.errors import HonestyError

    if failed:
        raise HonestyError(
            f"honesty checks failed ({', '.join(failed)}): the robust accuracy above is not to be quoted; what each "
            "found stands above and in the report"
        )


def _refuse_contradicted(pages: Sequence[Page]) -> None:
    """Raises HonestyError where an attack broke an image inside its certified radius: everything is written before."""
    from phalanx.errors import HonestyError
    from phalanx.report.threefold import contradicted

    found = [text for page in pages for row in page.rows for text in contradicted(row.label, row.threefold)]
    if found:
        raise HonestyError("; ".join(found))


def _check_subject(run: Path | None, model: str | None, data: str | None, weights: str, set_: list[str] | None) -> None:
    """Raises InputError unless a run or a model is named, with the options that belong to it."""
    from phalanx.errors import InputError

    if (run is None) == (model is None):
        raise InputError("give either a run's folder or --model MODULE:FUNCTION, and not both")
    if run is not None and weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}; a file goes with --model")
    if run is not None and (data is not None or set_):
        raise InputError("--data and --set are for --model: a run has its own data, as its recipe says")
    if model is not None and data is None:
        raise InputError("--model needs --data, such as digits or folder:PATH")


def _parsed(what: str, parse: Callable[[], ThreatModel]) -> ThreatModel:
    from phalanx.errors import InputError

    try:
        return parse()
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None


def _dual_view(standard: Path, robust: Path, alpha: str) -> DualView:
    from phalanx.config import DualView
    from phalanx.errors import InputError

    try:
        return DualView(
            standard=str(standard), robust=str(robust), alpha="picked" if alpha == "picked" else float(alpha)
        )
    except ValueError as error:
        raise InputError(f"--alpha: {error}") from None


@app.command()
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
    from phalanx.errors import InputError
    from phalanx.workflow import attack_run

    if weights not in ("best", "last"):
        raise InputError(f"--weights must be best or last, got {weights!r}")
    settings = EvaluationConfig(n=n, weights="last" if weights == "last" else "best", batch_size=batch_size)
    with ConsoleReporter(run.name) as reporter:
        done = attack_run(run, name, out, settings, png, reporter)
    typer.echo(f"clean {done.clean_correct:,} of {done.n:,} right, {done.held:,} still right under {done.attack}")
    typer.echo(f"written, and judged again from the file: {done.folder}")


@app.command()
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
    from phalanx.errors import InputError
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
        _check_subject(run, model, data, weights, None)
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
        folder = folder.with_name(_file_name(f"{model.replace(':', '.')}-{folder.name}"))
    asked = foreign_settings(data, ThreatModel(), smoothing.seed)
    with ConsoleReporter(model) as reporter:
        return smooth_foreign(
            model, weights, folder, asked, settings, smoothing, reporter, seconds=seconds, announce=announce
        )


@app.command()
def selftest(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the results as JSON. [default: nothing]")
    ] = None,
) -> None:
    """Plant known flaws in small models and show that each fools a plain attack and is caught here. Takes a minute."""
    from phalanx.console import ConsoleReporter
    from phalanx.errors import HonestyError, InputError
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


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's folder, or a run's.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one's, of the same images and attacks.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how two models differ on the same images, and whether by more than chance."""
    from phalanx.workflow import compare as compared

    found = compared(first, second)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else found.text())


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Studies, evaluated runs or models' evaluations, side by side."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write. [default: the first folder]"),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Robustness report",
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

    command = " ".join(["phalanx report", *map(str, runs)])
    page, files = report_on(
        find_rows(runs), out or runs[0], title=title, description="", command=command, formats=format_ or ()
    )
    typer.echo(terminal_table(page))
    for name, path in files.items():
        typer.echo(f"{'report' if name == 'report.html' else name}: {path}")
    _refuse_contradicted([page])


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


@recipes_app.command("schema")
def recipes_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from phalanx.config import RunConfig
    from phalanx.loading import schema

    typer.echo(json.dumps(schema(RunConfig), indent=2))


DataArgument = Annotated[
    str,
    typer.Argument(metavar="DATA", help="digits, folder:PATH, parquet:PATH, a public set, or a recipe with its data."),
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
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError("\n  ".join([f"{count} in {data}:", *problems]))
    typer.echo(f"{data}: nothing wrong")


@data_app.command("get")
def data_get(
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


@data_app.command("describe")
def data_describe(
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


@challenge_app.command("submit")
def challenge_submit(
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
    from phalanx.errors import HonestyError, InputError
    from phalanx.workflow.challenge import submit
    from phalanx.workflow.evaluated import Foreign

    if weights is not None and model is None:
        raise InputError("--weights goes with --model")
    foreign = None if model is None else Foreign(model, weights)
    done = submit(images, run, name, evaluation, foreign=foreign)
    typer.echo(done.text())
    if done.contradicted:
        raise HonestyError(f"{name} broke {done.disproved}: a certificate is unsound, or the verdict wrong")


@challenge_app.command("list")
def challenge_list(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an evaluation's.")],
) -> None:
    """What was submitted to a run's evaluations, and what it broke."""
    from phalanx.workflow.challenge import standings

    for standing in standings(run):
        typer.echo(standing.text())


def main() -> None:
    """Runs a command; a user's mistake is one message and an exit code, never a traceback."""
    # read by cuBLAS when it starts: without it, matrix products on a GPU are not repeatable
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app()
    except PhalanxError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # wherever a path was first looked at
        if error.filename is None or error.errno not in (*_DENIED, *_NO_PATH):
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; give another path, or allow access", err=True)
        sys.exit(DiskError.exit_code if error.errno in _DENIED else InputError.exit_code)


if __name__ == "__main__":
    main()
