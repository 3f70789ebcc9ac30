"""Evaluate a run, a model made of runs, or someone else's model into an evaluation folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phalanx.config import AnyView, DualView, EvaluationConfig, RunConfig
from phalanx.data import Splits
from phalanx.errors import InputError
from phalanx.evaluation import Evaluation
from phalanx.loading import load_recipe, to_plain
from phalanx.models import load, load_mixtures
from phalanx.threat import ThreatModel
from phalanx.training import Reporter
from phalanx.workflow.certifying import certify_run
from phalanx.workflow.foreign import foreign_model, weights_record
from phalanx.workflow.measuring import (
    ANALYSIS_NAME,
    EVALUATION_NAME,
    HONESTY_NAME,
    LEDGER_NAME,
    Conduct,
    Subject,
    measure,
)
from phalanx.workflow.surrogates import taking
from phalanx.workflow.training import part_name, run_config
from phalanx.workflow.viewing import viewed

__all__ = [
    "ANALYSIS_NAME",
    "EVALUATION_NAME",
    "HONESTY_NAME",
    "LEDGER_NAME",
    "Conduct",
    "evaluate_foreign",
    "evaluate_run",
    "evaluate_view",
    "evaluation_folder",
    "evaluation_record",
    "foreign_settings",
]


def evaluation_folder(run: Path, config: EvaluationConfig, view: AnyView | None = None) -> Path:
    """Where an evaluation of a run goes: its name says what was measured."""
    name = f"{config.protocol.replace(',', '+').replace('/', '_').replace(' ', '')}-{config.weights}-{config.size}"
    if isinstance(view, DualView):
        name += f"-dual-{Path(view.standard).name}-{view.alpha}-{view.mix}"
    return Path(run) / "evaluations" / name


def evaluation_record(
    config: EvaluationConfig, threat: ThreatModel, seed: int, view: AnyView | None = None
) -> dict[str, Any]:
    """What an evaluation's folder is bound to."""
    seen = None if view is None else {key: value for key, value in to_plain(view).items() if key != "label"}
    # folders from before there were these do not speak of them
    asked = {"attribution": config.attribution, "certify": config.certify if view is None else None}
    return {
        "kind": "evaluation",
        "protocol": config.protocol,
        "n": config.n,
        "weights": config.weights,
        "analysis": config.analysis,
        "threat": to_plain(threat),
        "seed": seed,
        "view": seen,
        **{key: value for key, value in asked.items() if value is not None},
    }


def evaluate_run(
    run: Path,
    folder: Path,
    config: EvaluationConfig,
    reporter: Reporter | None = None,
    *,
    label: str = "",
    conduct: Conduct | None = None,
) -> Evaluation | None:
    """Evaluates a finished run on its test split into `folder`; None if that was done already. Then certifies it where
    `config.certify` says how.

    Raises InputError for a run that is not finished, or whose data are no longer what it was trained on.
    """

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, None]:
        del data
        return load(run, weights=config.weights).to(device), None

    settings, conduct = run_config(run), conduct or Conduct()
    bound = _bound(config, settings, None, conduct)
    subject = Subject(settings, (run,), build, bound, label, weights=config.weights)
    found = measure(folder, subject, config, reporter, conduct)
    if config.certify is not None and (found is None or found.finished):
        certify_run(run, config, settings.threat.norm, config.certify, reporter=reporter)
    return found


def evaluate_view(
    view: AnyView,
    runs: Mapping[str, Path],
    folder: Path,
    config: EvaluationConfig,
    reporter: Reporter | None = None,
    *,
    conduct: Conduct | None = None,
) -> Evaluation | None:
    """Evaluates a model made of finished runs on their test split; None if that was done already.

    `runs` are the folders by the view's `made_of`; the last one's threat and seed hold. Raises InputError as
    `evaluate_run`, and for runs that do not fit together.
    """
    settings = run_config(list(runs.values())[-1])

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        parts = load_mixtures({part_name(name): run for name, run in runs.items()})
        model, seen = viewed(view, [part.to(device) for part in parts.values()], data, settings)
        # a new module begins in training mode, whatever its parts are in
        return model.eval().to(device), {"kind": view.name, **seen}

    conduct = conduct or Conduct()
    bound = _bound(config, settings, view, conduct)
    subject = Subject(settings, tuple(runs.values()), build, bound, view.title)
    return measure(folder, subject, config, reporter, conduct)


def foreign_settings(data: str, threat: ThreatModel, seed: int, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The settings under which someone else's model is evaluated: data, threat and seed, and of `overrides` device,
    threads and the data's own. Raises InputError."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in ("data", "device", "threads"):
            raise InputError(f"--set {override}: with --model only data.KEY, device and threads are read; leave it out")
    values = {"data": {"name": data}, "threat": to_plain(threat), "seed": seed}
    return load_recipe(RunConfig, None, overrides, values=values, values_are="--data").value


def evaluate_foreign(
    model: str,
    weights: Path | None,
    folder: Path,
    settings: RunConfig,
    config: EvaluationConfig,
    reporter: Reporter | None = None,
    *,
    outputs: int | None = None,
    conduct: Conduct | None = None,
) -> Evaluation | None:
    """Evaluates what "module:function" returns, with the weights of a file, on the test split; None if that was done.

    `outputs` is the number of classes that the model tells apart, by default that of the data. Raises InputError as
    `evaluate_run`, and for a model that cannot be built.
    """
    conduct = conduct or Conduct()
    bound = {**_bound(config, settings, None, conduct), "data": to_plain(settings.data)}
    bound["model"] = {"factory": model, "weights_sha256": weights_record(weights)}

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, None]:
        built = foreign_model(model, weights).to(device)
        return taking(f"--model {model}", built, data.test.images([0]).to(device)), None

    subject = Subject(settings, (), build, bound, model, outputs)
    return measure(folder, subject, config, reporter, conduct)


def _bound(config: EvaluationConfig, settings: RunConfig, view: AnyView | None, conduct: Conduct) -> dict[str, Any]:
    """An evaluation's record; surrogates, and a limit that can change verdicts, are part of it."""
    record = evaluation_record(config, settings.threat, settings.seed, view)
    if conduct.surrogates:
        record["surrogates"] = list(conduct.surrogates)
    seconds = conduct.limits.attack_seconds
    return record if seconds is None else {**record, "attack_seconds": seconds}
