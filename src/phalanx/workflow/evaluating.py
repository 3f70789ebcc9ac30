"""Evaluate a run, or the dual model of two runs, into an evaluation folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from phalanx.attacks import RouteSteering
from phalanx.config import DualView, EvaluationConfig, RunConfig
from phalanx.data import ImageSet, Splits, load_data
from phalanx.errors import Interrupted
from phalanx.evaluation import Evaluation, analyse, evaluate, pick_alpha, protocol
from phalanx.evaluation.evaluate import model_sha256
from phalanx.loading import to_plain
from phalanx.models import join, load
from phalanx.routing import DualModel
from phalanx.runs import RunFolder, write_json
from phalanx.threat import ThreatModel
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, environment, now, pick_device
from phalanx.workflow.training import refuse_other_data, require_finished, run_config

EVALUATION_NAME = "evaluation.json"
ANALYSIS_NAME = "analysis.json"
LEDGER_NAME = "ledger.sqlite"
EVALUATION_SCHEMA = 1

ANALYSED = 1000
"""At most so many images are analysed: the averages stand, and the cost does not grow with the data."""

PICKING = RouteSteering(steps=50)
"""What searches the robust half's smallest margins when alpha is picked."""


@dataclass(frozen=True)
class _Subject:
    """A model to be measured, and the settings of the run that it, or its robust half, comes from."""

    settings: RunConfig
    runs: tuple[Path, ...]
    build: Callable[[Splits, torch.device], tuple[nn.Module, dict[str, Any] | None]]
    """The model on a device, and what evaluation.json says of the view, None for a run as it is."""


def evaluation_folder(run: Path, config: EvaluationConfig, view: DualView | None = None) -> Path:
    """Where an evaluation of a run goes: its name says what was measured."""
    size = "all" if config.n is None else str(config.n)
    name = f"{config.protocol.replace(',', '+').replace(' ', '')}-{config.weights}-{size}"
    if view is not None:
        name += f"-dual-{Path(view.standard).name}-{view.alpha}-{view.mix}"
    return Path(run) / "evaluations" / name


def evaluation_record(
    config: EvaluationConfig, threat: ThreatModel, seed: int, view: DualView | None = None
) -> dict[str, Any]:
    """What an evaluation's folder is bound to."""
    seen = None if view is None else {key: value for key, value in to_plain(view).items() if key != "label"}
    return {
        "kind": "evaluation",
        "protocol": config.protocol,
        "n": config.n,
        "weights": config.weights,
        "analysis": config.analysis,
        "threat": to_plain(threat),
        "seed": seed,
        "view": seen,
    }


def evaluate_run(
    run: Path, folder: Path, config: EvaluationConfig, reporter: Reporter | None = None, *, label: str = ""
) -> Evaluation | None:
    """Evaluates a finished run on its test split into `folder`; None if that was done already.

    Raises InputError for a run that is not finished, or whose data are no longer what it was trained on.
    """

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, None]:
        del data
        return load(run, weights=config.weights).to(device), None

    subject = _Subject(run_config(run), (run,), build)
    return _evaluate_into(folder, subject, config, None, label, reporter)


def evaluate_dual(
    standard: Path,
    robust: Path,
    folder: Path,
    view: DualView,
    config: EvaluationConfig,
    reporter: Reporter | None = None,
) -> Evaluation | None:
    """Evaluates the dual model of two finished runs on the robust one's test split; None if that was done already.

    Raises InputError as `evaluate_run`, and for runs that do not fit together.
    """
    settings = run_config(robust)

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        alpha, picked = view.alpha, None
        if alpha == "picked":
            choice = pick_alpha(
                load(robust).to(device), data.val, PICKING.within(settings.threat), keep=view.keep, seed=settings.seed
            )
            alpha = choice.alpha
            picked = {
                "keep": view.keep,
                "quantile": choice.quantile,
                "n": choice.n,
                "attack": f"{PICKING.name}, {PICKING.steps} steps",
            }
        model = join(standard, robust, alpha, view.mix).to(device)
        return model, {"kind": "dual", "alpha": alpha, "mix": view.mix, "picked": picked}

    subject = _Subject(settings, (standard, robust), build)
    return _evaluate_into(folder, subject, config, view, view.title, reporter)


def _evaluate_into(
    folder: Path,
    subject: _Subject,
    config: EvaluationConfig,
    view: DualView | None,
    label: str,
    reporter: Reporter | None,
) -> Evaluation | None:
    settings = subject.settings
    for run in subject.runs:
        require_finished(run)
    reporter = reporter or Silent()
    target = RunFolder(folder)
    with target.lock(), cpu_threads(settings.threads):
        target.prepare(evaluation_record(config, settings.threat, settings.seed, view))
        if target.status() == "finished":
            target.verify()
            return None
        with target.records_outcome(), _stopped_by_signals():
            started, device = now(), pick_device(settings.device)
            data = load_data(settings.data)
            for run in subject.runs:
                refuse_other_data(run, data)
            model, seen = subject.build(data, device)
            images = data.test if config.n is None else data.test.first(config.n)
            result = evaluate(
                model,
                images,
                protocol(config.protocol, settings.threat, halves=isinstance(model, DualModel)),
                settings.threat,
                ledger=target.resolve(LEDGER_NAME),
                batch_size=config.batch_size,
                seed=settings.seed,
                device=device,
                progress=reporter.progress,
            )
            if config.analysis is not None:
                found = _analysed(model, images, data, config.analysis, settings, config.batch_size, device, reporter)
                write_json(target.resolve(ANALYSIS_NAME), found)
            record = {
                "schema": EVALUATION_SCHEMA,
                "label": label,
                "view": seen,
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


def _analysed(
    model: nn.Module,
    images: ImageSet,
    data: Splits,
    name: str,
    settings: RunConfig,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Any]:
    (member,) = protocol(name, settings.threat, halves=isinstance(model, DualModel)).members
    return analyse(
        model,
        images.first(min(ANALYSED, len(images))),
        member.attack,
        name=name,
        num_classes=data.num_classes,
        batch_size=batch_size,
        seed=settings.seed,
        device=device,
        progress=reporter.progress,
    ).to_json()


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
