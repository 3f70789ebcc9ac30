"""What a command does: the rooms put together. Each function makes, or takes up again, one folder."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from phalanx import __version__
from phalanx.config import EvaluationConfig, RunConfig, bound_config, find_recipe, is_study, load_run, load_study
from phalanx.data import DataConfig, ImageSet, Splits, load_data
from phalanx.errors import InputError, Interrupted
from phalanx.evaluation import Evaluation, evaluate, protocol, validation
from phalanx.evaluation.evaluate import model_sha256
from phalanx.loading import load_recipe, to_plain
from phalanx.methods import Method
from phalanx.models import MODEL_NAME, build_model, load, read_description, save_description
from phalanx.report import Page, RowSource, build_page, write_report
from phalanx.runs import Node, RunFolder, Study, write_json
from phalanx.threat import ThreatModel
from phalanx.training import Reporter, Silent, TrainingConfig, train
from phalanx.training.loop import Validate

ENVIRONMENT_NAME = "environment.json"
EVALUATION_NAME = "evaluation.json"
LEDGER_NAME = "ledger.sqlite"
EVALUATION_SCHEMA = 1


# -- where a run computes ------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one. Raises InputError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs were found; use device: cpu")
    return device


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch uses this many CPU threads inside; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device, started: str, seconds: float) -> dict[str, Any]:
    """Versions and hardware, for the report."""
    on_gpu = device.type == "cuda"
    return {
        "phalanx": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "platform": platform.system() + " " + platform.machine(),
        "processor": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "cpus": os.cpu_count(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "started": started,
        "seconds": round(seconds, 1),
    }


def processor_name() -> str:
    """The CPU's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What `train_into` was asked to do, ready to be done: built only if the folder is not finished."""

    model: nn.Module
    method: Method
    data: Splits
    training: TrainingConfig
    seed: int
    augment: tuple[str, ...]
    validate: Validate


def train_into(
    folder: Path,
    config: Mapping[str, Any],
    prepare: Callable[[], Trained],
    *,
    device: torch.device,
    reporter: Reporter | None = None,
) -> None:
    """Makes the run folder bound to `config`, resumes it, or, if it is finished, verifies it."""
    run = RunFolder(folder)
    with run.lock():
        run.prepare(config)
        if run.status() == "finished":
            run.verify()
            return
        with run.records_outcome():
            started, clock = _now(), time.monotonic()
            job = prepare()
            if run.resolve(MODEL_NAME).is_file():
                _refuse_other_data(folder, job.data)
            else:
                save_description(run.resolve(MODEL_NAME), job.model, job.data)
            train(
                job.model,
                job.method,
                job.data,
                job.training,
                run,
                seed=job.seed,
                augment=job.augment,
                validate=job.validate,
                reporter=reporter,
            )
            write_json(run.resolve(ENVIRONMENT_NAME), environment(device, started, time.monotonic() - clock))
        results = [name for name in run.files() if not name.startswith("evaluations/")]
        run.finish(results)


def _refuse_other_data(run: Path, data: Splits) -> None:
    """Raises InputError unless `data` is, image for image, what `run` was begun with."""
    recorded = read_description(run)["data"]["fingerprint"]
    if recorded != data.fingerprint:
        raise InputError(
            f"{run} was made with other images: the fingerprint of {data.name} was {recorded[:12]}..., "
            f"now {data.fingerprint[:12]}...; restore the data, or train into another folder"
        )


def train_run(config: RunConfig, folder: Path, reporter: Reporter | None = None) -> None:
    """Trains what a recipe describes."""
    device = pick_device(config.device)
    # a mistake that only building shows must not leave a new folder bound to it
    made = prepare_run(config, device, reporter) if RunFolder(folder).status() == "new" else None
    with cpu_threads(config.threads):
        plain = bound_config(to_plain(config))
        train_into(
            folder,
            plain,
            lambda: made or prepare_run(config, device, reporter),
            device=device,
            reporter=reporter,
        )


def prepare_run(config: RunConfig, device: torch.device, reporter: Reporter | None = None) -> Trained:
    """Data, model, method and validation of a recipe. Raises InputError for whatever does not fit together."""
    validating, *more = protocol(config.validation.protocol, config.threat).members
    if more:
        raise InputError(
            f"validation.protocol must be one attack, got {config.validation.protocol!r}, which is several"
        )
    protocol(config.evaluation.protocol, config.threat)
    data = load_data(config.data, progress=None if reporter is None else reporter.progress)
    if config.training.batch_size > len(data.train):
        raise InputError(
            f"training.batch_size is {config.training.batch_size}, but {data.name} has {len(data.train)} training "
            "images; lower it"
        )
    images = data.val if config.validation.n is None else data.val.first(config.validation.n)
    return Trained(
        model=build_model(config.model, data, config.seed).to(device),
        method=config.method.within(config.threat),
        data=data,
        training=config.training,
        seed=config.seed,
        augment=config.data.augment,
        validate=validation(images, validating.attack, seed=config.seed),
    )


# -- evaluation ----------------------------------------------------------------------------------------------------


def run_config(run: Path) -> RunConfig:
    """The configuration a recipe's run was made with. Raises InputError for a run of a hand-built model."""
    record = RunFolder(run).record()["config"]
    if "model" not in record:
        raise InputError(f"{run} was not made from a recipe; evaluate it from Python: px.evaluate(model, images, ...)")
    return load_recipe(RunConfig, None, values=record).value


def evaluation_folder(run: Path, config: EvaluationConfig) -> Path:
    """Where an evaluation of a run goes: its name says what was measured."""
    size = "all" if config.n is None else str(config.n)
    return Path(run) / "evaluations" / f"{config.protocol.replace(',', '+').replace(' ', '')}-{config.weights}-{size}"


def evaluation_record(config: EvaluationConfig, threat: ThreatModel, seed: int) -> dict[str, Any]:
    """What an evaluation's folder is bound to."""
    return {
        "kind": "evaluation",
        "protocol": config.protocol,
        "n": config.n,
        "weights": config.weights,
        "threat": to_plain(threat),
        "seed": seed,
    }


def _require_finished(run: Path) -> None:
    folder = RunFolder(run)
    status = folder.status()
    if status != "finished":
        # its best weights so far may still change, and the verdicts would outlive them
        raise InputError(f"{run} is not finished (status {status}); give its train command again, it goes on")
    folder.verify()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end an evaluation at once and by name: every batch that is done is on disk already."""

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(signum, "stopped; the verdicts of every finished batch are kept, the same command goes on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def evaluate_run(
    run: Path, folder: Path, config: EvaluationConfig, reporter: Reporter | None = None
) -> Evaluation | None:
    """Evaluates a finished run on its test split into `folder`; None if that was done already.

    Raises InputError for a run that is not finished, or whose data are no longer what it was trained on.
    """
    settings = run_config(run)
    _require_finished(run)
    wanted = protocol(config.protocol, settings.threat)
    target = RunFolder(folder)
    with target.lock(), cpu_threads(settings.threads):
        target.prepare(evaluation_record(config, settings.threat, settings.seed))
        if target.status() == "finished":
            target.verify()
            return None
        with target.records_outcome(), _stopped_by_signals():
            started, device = _now(), pick_device(settings.device)
            model = load(run, weights=config.weights).to(device)
            data = load_data(settings.data)
            _refuse_other_data(run, data)
            images: ImageSet = data.test if config.n is None else data.test.first(config.n)
            result = evaluate(
                model,
                images,
                wanted,
                settings.threat,
                ledger=target.resolve(LEDGER_NAME),
                batch_size=config.batch_size,
                seed=settings.seed,
                device=device,
                progress=(reporter or Silent()).progress,
            )
            record = {
                "schema": EVALUATION_SCHEMA,
                "protocol": config.protocol,
                "weights": config.weights,
                "n": result.n,
                "threat": to_plain(settings.threat),
                "seed": settings.seed,
                "batch_size": config.batch_size,
                "seconds": round(result.seconds, 1),
                "environment": environment(device, started, result.seconds),
                "data": {"name": data.name, "notes": list(data.notes)},
                "load": None if result.load is None else list(result.load),
                "model_sha256": model_sha256(model),
            }
            write_json(target.resolve(EVALUATION_NAME), record)
        target.finish()
    return result


# -- studies and reports -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study, or a single recipe taken as a study of one run."""

    title: str
    description: str
    runs: Mapping[str, RunConfig]


def plan(name: str, overrides: tuple[str, ...] = ()) -> Plan:
    """What `phalanx run NAME` will make. Raises RecipeErrors before anything is written."""
    path = find_recipe(name)
    if not is_study(path):
        loaded = load_run(name, overrides)
        label = loaded.value.label or path.stem
        return Plan(label, "", {path.stem: loaded.value})
    study = load_study(name).value
    runs = {run: load_run(recipe, overrides).value for run, recipe in study.runs.items()}
    return Plan(study.title or path.stem, study.description, runs)


EVALUATION_SUFFIX = ".evaluation"

ReporterFor = Callable[[str], AbstractContextManager[Reporter]]
"""From a piece of work's name to what shows its progress."""


def make_study(
    plan: Plan,
    folder: Path,
    reporter_for: ReporterFor,
    *,
    fresh: bool = False,
    progress: Callable[[str, str], None] | None = None,
) -> list[RowSource]:
    """Trains and evaluates every run that is not finished; the rows of the table."""
    nodes = [node for name, config in plan.runs.items() for node in _nodes(name, config, reporter_for)]
    study = Study(folder, nodes)
    if fresh:
        for node in reversed(study.order()):
            made = RunFolder(folder / node.name)
            with made.lock():
                made.clear()
    for name, config in plan.runs.items():
        # every run's mistakes before the first one's hours
        if RunFolder(folder / name).status() == "new":
            with reporter_for(name) as reporter:
                prepare_run(config, pick_device(config.device), reporter)
    study.run(progress)
    return [
        RowSource(config.label or name, folder / name, folder / (name + EVALUATION_SUFFIX))
        for name, config in plan.runs.items()
    ]


def _nodes(name: str, config: RunConfig, reporter_for: ReporterFor) -> list[Node]:
    def training(folder: Path, needs: Mapping[str, Path]) -> None:
        del needs
        with reporter_for(name) as reporter:
            train_run(config, folder, reporter)

    def measuring(folder: Path, needs: Mapping[str, Path]) -> None:
        with reporter_for(f"{name} {config.evaluation.protocol}") as reporter:
            evaluate_run(needs[name], folder, config.evaluation, reporter)

    return [
        Node(name, (), bound_config(to_plain(config)), training),
        Node(
            name + EVALUATION_SUFFIX,
            (name,),
            evaluation_record(config.evaluation, config.threat, config.seed),
            measuring,
        ),
    ]


def find_rows(paths: list[Path]) -> list[RowSource]:
    """The table's rows of study folders and run folders. Raises InputError for a folder with nothing evaluated."""
    rows = [row for path in paths for row in _rows_in(path)]
    if not rows:
        raise InputError(
            f"nothing evaluated in {', '.join(map(str, paths))}; run phalanx evaluate RUN, or phalanx run RECIPE"
        )
    return rows


def _rows_in(path: Path) -> list[RowSource]:
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give a study's or a run's folder")
    own = [
        RowSource(f"{path.name} {folder.name}", path, folder)
        for folder in sorted((path / "evaluations").glob("*"))
        if (folder / EVALUATION_NAME).is_file()
    ]
    inside = [
        RowSource(
            folder.name.removesuffix(EVALUATION_SUFFIX), path / folder.name.removesuffix(EVALUATION_SUFFIX), folder
        )
        for folder in sorted(path.glob("*" + EVALUATION_SUFFIX))
        if (folder / EVALUATION_NAME).is_file()
    ]
    return own + inside


def report_on(
    rows: list[RowSource], folder: Path, *, title: str, description: str, command: str
) -> tuple[Page, dict[str, Path]]:
    """Builds the page and writes it into `folder`: the page, and where its files are by kind."""
    page = build_page(title, description, rows, command)
    return page, write_report(folder, page)


def data_config(name: str, overrides: tuple[str, ...] = ()) -> DataConfig:
    """The data settings meant by "digits", "folder:PATH", "parquet:PATH" or a recipe, with `--set data.KEY=VALUE`."""
    if name == "digits" or ":" in name:
        return load_recipe(RunConfig, None, overrides, values={"data": {"name": name}}).value.data
    return load_run(name, overrides).value.data
