"""An evaluation's folder, and the model that was evaluated into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phalanx.config import RunConfig
from phalanx.data import Splits
from phalanx.errors import InputError
from phalanx.loading import load_recipe
from phalanx.models import load, load_mixtures
from phalanx.runs import RunFolder
from phalanx.workflow.foreign import foreign_model, weights_record
from phalanx.workflow.measuring import LEDGER_NAME
from phalanx.workflow.reporting import view_runs
from phalanx.workflow.studies import EVALUATION_SUFFIX, Viewing
from phalanx.workflow.training import part_name, require_finished, run_config
from phalanx.workflow.viewing import viewed


@dataclass(frozen=True)
class Foreign:
    """A model made elsewhere, as it was evaluated."""

    factory: str
    """ "module:function"; importing the module runs it."""
    weights: Path | None = None


def evaluations(run: Path) -> list[Path]:
    """The folders of a run's evaluations; of an evaluation's folder that itself."""
    if (run / LEDGER_NAME).is_file():
        return [run]
    # by its full path: "." has no name
    whole = run.resolve()
    beside = whole.with_name(whole.name + EVALUATION_SUFFIX) / LEDGER_NAME
    found = sorted(path.parent for path in run.glob(f"evaluations/*/{LEDGER_NAME}"))
    return [*found, *([beside.parent] if beside.is_file() else [])]


def find_evaluation(run: Path, evaluation: Path | None = None) -> Path:
    """The folder of a run's evaluation. Raises InputError unless there is one, and one alone if none is named."""
    found = evaluations(run)
    if evaluation is not None:
        for folder in (evaluation, run / "evaluations" / evaluation):
            if (folder / LEDGER_NAME).is_file():
                return folder
        raise InputError(f"{evaluation} is no evaluation of {run}; it has {_names(found)}")
    if len(found) != 1:
        several = f"has several evaluations ({_names(found)}); say which with --evaluation"
        raise InputError(f"{run} {several if found else 'is not evaluated; run phalanx evaluate first'}")
    return found[0]


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders) or "none"


@dataclass(frozen=True)
class Evaluated:
    """The evaluated model, and the settings it was evaluated with."""

    folder: Path
    bound: Mapping[str, Any]
    """What the evaluation is bound to."""
    settings: RunConfig
    runs: Mapping[str, Path]
    """By what they become; the only one is called ""; none of a model made elsewhere."""
    foreign: Foreign | None

    @classmethod
    def of(cls, run: Path, folder: Path, foreign: Foreign | None) -> Evaluated:
        bound = RunFolder(folder).record()["config"]
        if "model" in bound:
            return cls(folder, bound, _foreign_settings(folder, bound, foreign), {}, foreign)
        if foreign is not None:
            raise InputError(f"--model is for a model made elsewhere, but {folder} evaluates a run; leave it out")
        runs = {"": _own_run(run, folder)}
        if bound.get("view") is not None:
            runs = view_runs(_view(bound).view, folder)
        for part in runs.values():
            require_finished(part)
        return cls(folder, bound, run_config([*runs.values()][-1]), runs, None)

    def model(self, data: Splits, device: torch.device) -> nn.Module:
        """The model, in evaluation mode."""
        if self.foreign is not None:
            return foreign_model(self.foreign.factory, self.foreign.weights).to(device)
        if self.bound.get("view") is None:
            return load(self.runs[""], weights=self.bound["weights"]).to(device)
        parts = load_mixtures({part_name(name): run for name, run in self.runs.items()})
        model, _ = viewed(_view(self.bound).view, [part.to(device) for part in parts.values()], data, self.settings)
        return model.eval().to(device)


def _view(bound: Mapping[str, Any]) -> Viewing:
    return load_recipe(Viewing, None, values={"view": bound["view"]}).value


def _own_run(run: Path, folder: Path) -> Path:
    if run != folder:
        return run
    name = folder.name.removesuffix(EVALUATION_SUFFIX)
    return folder.parent.parent if name == folder.name else folder.with_name(name)


def _foreign_settings(folder: Path, bound: Mapping[str, Any], foreign: Foreign | None) -> RunConfig:
    recorded = bound["model"]
    # a folder that somebody sent must not choose what code is run
    if foreign is None:
        raise InputError(
            f"{folder} evaluates the model of {recorded['factory']}; give --model {recorded['factory']}, which runs "
            "its code, and --weights if it had any"
        )
    if (foreign.factory, weights_record(foreign.weights)) != (recorded["factory"], recorded["weights_sha256"]):
        raise InputError(
            f"{folder} evaluates {recorded['factory']} with weights of sha256 {recorded['weights_sha256']}; give these"
        )
    values = {key: bound[key] for key in ("data", "threat", "seed")}
    return load_recipe(RunConfig, None, values=values).value
