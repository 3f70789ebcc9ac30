"""Evaluate a run, or the dual model of two runs, into an evaluation folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from phalanx.attacks import RouteSteering
from phalanx.config import (
    AnyView,
    DualView,
    EnsembleView,
    EvaluationConfig,
    GateView,
    NutsView,
    RunConfig,
)
from phalanx.data import ImageSet, Splits, load_data
from phalanx.errors import Interrupted
from phalanx.evaluation import Evaluation, Protocol, analyse, evaluate, pick_alpha, pick_nuts, protocol
from phalanx.evaluation.evaluate import model_sha256
from phalanx.loading import to_plain
from phalanx.models import load, load_mixtures
from phalanx.routing import (
    AdaptiveSmoothing,
    Counts,
    DualModel,
    Ensemble,
    MixedNUTS,
    MixtureOfExperts,
    counts,
    with_gate,
)
from phalanx.runs import RunFolder, write_json
from phalanx.threat import ThreatModel
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, environment, now, pick_device
from phalanx.workflow.training import part_name, refuse_other_data, require_finished, run_config

EVALUATION_NAME = "evaluation.json"
ANALYSIS_NAME = "analysis.json"
LEDGER_NAME = "ledger.sqlite"
EVALUATION_SCHEMA = 1

ANALYSED = 1000
"""At most so many images are analysed: the averages stand, and the cost does not grow with the data."""

COUNTED = 8
"""On so many images the model's cost is counted: it varies only with the routes, and only if experts differ in size."""

PICKING = RouteSteering(steps=50)
"""What searches the robust half's smallest margins when alpha is picked."""


@dataclass(frozen=True)
class _Subject:
    """A model to be measured, and the settings of the run that it, or its robust half, comes from."""

    settings: RunConfig
    runs: tuple[Path, ...]
    build: Callable[[Splits, torch.device], tuple[nn.Module, dict[str, Any] | None]]
    """The model on a device, and what evaluation.json says of the view, None for a run as it is."""


def evaluation_folder(run: Path, config: EvaluationConfig, view: AnyView | None = None) -> Path:
    """Where an evaluation of a run goes: its name says what was measured."""
    size = "all" if config.n is None else str(config.n)
    name = f"{config.protocol.replace(',', '+').replace('/', '_').replace(' ', '')}-{config.weights}-{size}"
    if isinstance(view, DualView):
        name += f"-dual-{Path(view.standard).name}-{view.alpha}-{view.mix}"
    return Path(run) / "evaluations" / name


def evaluation_record(
    config: EvaluationConfig, threat: ThreatModel, seed: int, view: AnyView | None = None
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


def evaluate_view(
    view: AnyView,
    runs: Mapping[str, Path],
    folder: Path,
    config: EvaluationConfig,
    reporter: Reporter | None = None,
) -> Evaluation | None:
    """Evaluates a model made of finished runs on their test split; None if that was done already.

    `runs` are the folders by the view's `made_of`; the last one's threat and seed hold. Raises InputError as
    `evaluate_run`, and for runs that do not fit together.
    """
    settings = run_config(list(runs.values())[-1])

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        parts = load_mixtures({part_name(name): run for name, run in runs.items()})
        model, seen = _viewed(view, [part.to(device) for part in parts.values()], data, settings)
        return model.to(device), {"kind": view.name, **seen}

    subject = _Subject(settings, tuple(runs.values()), build)
    return _evaluate_into(folder, subject, config, view, view.title, reporter)


def _viewed(
    view: AnyView, parts: Sequence[MixtureOfExperts], data: Splits, settings: RunConfig
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a view makes of its runs' models, and what there is to say of it."""
    match view:
        case DualView():
            alpha, picked = _alpha(view, parts[1], data, settings)
            seen: dict[str, Any] = {"alpha": alpha, "mix": view.mix, "picked": picked}
            return DualModel(parts[0], parts[1], alpha, mix=view.mix), seen
        case NutsView():
            choice = pick_nuts(parts[1], data.val, PICKING.within(settings.threat), keep=view.keep, seed=settings.seed)
            found = {"alpha": choice.alpha, "scale": choice.scale, "power": choice.power, "bias": choice.bias}
            return MixedNUTS(parts[0], parts[1], **found), {
                **found,
                "picked": {**_picked(view.keep, choice.quantile, choice.held), "out_of_reach": choice.out_of_reach},
            }
        case EnsembleView():
            return Ensemble(parts, mix=view.mix), {"mix": view.mix}
        case GateView():
            return with_gate(parts[0], view.gate, seed=settings.seed), {"gate": view.gate}


def _alpha(view: DualView, robust: nn.Module, data: Splits, settings: RunConfig) -> tuple[float, dict[str, Any] | None]:
    """The weight of the robust half, and what it was picked on."""
    if view.alpha != "picked":
        return view.alpha, None
    choice = pick_alpha(robust, data.val, PICKING.within(settings.threat), keep=view.keep, seed=settings.seed)
    return choice.alpha, _picked(view.keep, choice.quantile, choice.n)


def _picked(keep: float, quantile: float, n: int) -> dict[str, Any]:
    attack = f"{PICKING.name}, {PICKING.steps} steps"
    return {"keep": keep, "quantile": quantile, "n": n, "attack": attack, "images": "validation"}


def _evaluate_into(
    folder: Path,
    subject: _Subject,
    config: EvaluationConfig,
    view: AnyView | None,
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
                _protocol(config.protocol, settings.threat, model),
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
                "counts": _counted(model, images, device).to_json(),
                "model_sha256": model_sha256(model),
            }
            write_json(target.resolve(EVALUATION_NAME), record)
        target.finish()
    return result


def _protocol(name: str, threat: ThreatModel, model: nn.Module) -> Protocol:
    return protocol(name, threat, halves=isinstance(model, DualModel), mixing=isinstance(model, AdaptiveSmoothing))


def _counted(model: nn.Module, images: ImageSet, device: torch.device) -> Counts:
    # spread over the set: a folder's images come class by class
    spread = torch.linspace(0, len(images) - 1, min(COUNTED, len(images))).long()
    return counts(model, images.images(spread).to(device))


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
    (member,) = _protocol(name, settings.threat, model).members
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
