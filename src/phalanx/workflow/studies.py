"""A study: the runs and rows that a recipe names, made in order, side by side, and never twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from phalanx.config import (
    DualConfig,
    DualView,
    EvaluationConfig,
    MixtureConfig,
    RunConfig,
    StudyConfig,
    StudyRun,
    bound_config,
    find_recipe,
    is_study,
    load_run,
    load_study,
)
from phalanx.data import DataConfig, Splits, load_data
from phalanx.errors import InputError
from phalanx.loading import load_recipe, to_plain
from phalanx.loading.shapes import keys
from phalanx.report import RowSource
from phalanx.runs import Node, RunFolder, Study
from phalanx.training import Reporter
from phalanx.workers import WorkerPool
from phalanx.workflow.compute import pick_device
from phalanx.workflow.evaluating import evaluate_dual, evaluate_run, evaluation_record
from phalanx.workflow.training import check_unmade, prepare_run, train_run

T = TypeVar("T")

EVALUATION_SUFFIX = ".evaluation"

ReporterFor = Callable[[str], AbstractContextManager[Reporter]]
"""From a piece of work's name to what shows its progress."""

Job = Mapping[str, Any]
"""One piece of work as plain data: what `perform` does, here or in a worker process."""


# -- what is to be made --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study, or a single recipe taken as a study of one run."""

    title: str
    description: str
    runs: Mapping[str, RunConfig]
    duals: Mapping[str, DualView] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    """Names of runs and duals in the table's order; empty for all of them."""

    @property
    def table(self) -> tuple[str, ...]:
        """The rows in order."""
        return self.rows or (*self.runs, *self.duals)

    def needs(self, name: str) -> tuple[str, ...]:
        """The runs of the study that a run starts from, or that a dual joins."""
        made = self.duals[name] if name in self.duals else self.runs[name].model
        if isinstance(made, MixtureConfig):
            return ()
        return tuple(half for half in (made.standard, made.robust) if half in self.runs)

    def only(self, rows: Iterable[str]) -> Plan:
        """The part of the study that makes these rows. Raises InputError for a row that it does not have."""
        rows = tuple(rows)
        for row in rows:
            if row not in self.runs and row not in self.duals:
                raise InputError(f"the study has no row {row!r}; it has {', '.join((*self.runs, *self.duals))}")
        wanted, queue = set(rows), list(rows)
        while queue:
            queue += (new := set(self.needs(queue.pop())) - wanted)
            wanted |= new
        return replace(
            self,
            runs={name: run for name, run in self.runs.items() if name in wanted},
            duals={name: dual for name, dual in self.duals.items() if name in wanted},
            rows=rows,
        )

    def evaluation(self, row: str) -> EvaluationConfig:
        """How a row is measured: a dual as its robust half."""
        return self.runs[self.duals[row].robust if row in self.duals else row].evaluation

    def label(self, row: str) -> str:
        """What a row is called."""
        return self.duals[row].title if row in self.duals else self.runs[row].label or row


def plan(name: str, overrides: tuple[str, ...] = ()) -> Plan:
    """What `phalanx run NAME` will make. Raises RecipeErrors before anything is written."""
    path = find_recipe(name)
    if not is_study(path):
        loaded = load_run(name, overrides)
        label = loaded.value.label or path.stem
        return Plan(label, "", {path.stem: loaded.value})
    study = load_study(name).value
    runs = {run: study_run(study, made, overrides) for run, made in study.runs.items()}
    return Plan(study.title or path.stem, study.description, runs, study.duals, study.rows)


def study_run(study: StudyConfig, made: StudyRun, overrides: tuple[str, ...]) -> RunConfig:
    """The configuration of one run of a study, with the study's settings, its own and the command line's.

    Settings of experts and routers pass by a run whose model is made of other runs: it takes theirs.
    """
    joined = isinstance(load_run(made.recipe, made.set).value.model, DualConfig)

    def fits(setting: str) -> bool:
        section, _, key = setting.partition("=")[0].strip().partition(".")
        return not (joined and section == "model" and key.partition(".")[0] in keys(MixtureConfig))

    return load_run(made.recipe, (*filter(fits, study.set), *made.set, *filter(fits, overrides))).value


# -- making it -----------------------------------------------------------------------------------------------------


def perform(job: Job, reporter: Reporter) -> None:
    """Does one job; what is done already is only verified."""
    folder = Path(job["folder"])
    folders = {name: Path(path) for name, path in job["folders"].items()}
    match job["action"]:
        case "train":
            train_run(_read(RunConfig, job["config"]), folder, reporter, folders=folders)
        case "evaluate":
            evaluate_run(
                folders[job["run"]], folder, _read(EvaluationConfig, job["config"]), reporter, label=job["label"]
            )
        case "evaluate dual":
            view = _read(DualView, job["view"])
            config = _read(EvaluationConfig, job["config"])
            evaluate_dual(folders[view.standard], folders[view.robust], folder, view, config, reporter)
        case other:
            raise ValueError(f"a job's action is train, evaluate or evaluate dual, got {other!r}")


def _read(kind: type[T], plain: Mapping[str, Any]) -> T:
    return load_recipe(kind, None, values=plain).value


def make_study(
    plan: Plan,
    folder: Path,
    reporter_for: ReporterFor,
    *,
    fresh: bool = False,
    progress: Callable[[str, str], None] | None = None,
    workers: int = 1,
) -> list[RowSource]:
    """Trains and evaluates everything that is not finished; the rows of the table.

    Independent work is done side by side in `workers` processes; with one, in this process. No result depends on it,
    but for rounding where a run leaves its number of CPU threads to torch: the processes share them.
    """
    folders = {name: folder / name for name in plan.runs}
    if fresh:
        _clear(Study(folder, list(_nodes(plan, folders, reporter_for, perform))))
    _check_new(plan, folders, reporter_for)
    with WorkerPool(workers, threads=_threads(workers)) if workers > 1 else nullcontext() as pool:
        do = perform if pool is None else pool.do
        Study(folder, list(_nodes(plan, folders, reporter_for, do))).run(progress, workers=workers)
    return [_row_source(plan, row, folder) for row in plan.table]


def _clear(study: Study) -> None:
    for node in reversed(study.order()):
        made = RunFolder(study.folder / node.name)
        with made.lock():
            made.clear()


def default_workers(plan: Plan) -> int:
    """Two processes where there is work for them and no GPU to share."""
    on_gpu = any(pick_device(config.device).type != "cpu" for config in plan.runs.values())
    return 1 if on_gpu or len(plan.runs) == 1 or (os.cpu_count() or 1) < 2 else 2


def _threads(workers: int) -> int:
    """CPU threads of each of several processes, for runs that leave it to torch."""
    return max(1, (os.cpu_count() or 1) // workers)


def _nodes(
    plan: Plan,
    folders: Mapping[str, Path],
    reporter_for: ReporterFor,
    do: Callable[[Job, Reporter], None],
) -> Iterable[Node]:
    """First what trains, the halves of others at the head, so that no process ends up waiting for them."""
    paths = {name: str(path) for name, path in folders.items()}

    def node(name: str, title: str, needs: tuple[str, ...], bound: Mapping[str, Any], job: Job) -> Node:
        def action(made: Path, needed: Mapping[str, Path]) -> None:
            del needed
            with reporter_for(title) as reporter:
                do({**job, "folder": str(made), "folders": paths}, reporter)

        return Node(name, needs, bound, action)

    halves = {half for run in plan.runs for half in plan.needs(run)}
    for name in sorted(plan.runs, key=lambda run: run not in halves):
        config = to_plain(plan.runs[name])
        yield node(name, name, plan.needs(name), bound_config(config), {"action": "train", "config": config})
    for row in plan.table:
        job = {"config": to_plain(plan.evaluation(row)), "label": plan.label(row)}
        view = plan.duals.get(row)
        if view is None:
            job |= {"action": "evaluate", "run": row}
        else:
            job |= {"action": "evaluate dual", "view": to_plain(view)}
        measured = plan.runs[row if view is None else view.robust]
        bound = evaluation_record(plan.evaluation(row), measured.threat, measured.seed, view)
        yield node(
            row + EVALUATION_SUFFIX,
            f"{row} {measured.evaluation.protocol}",
            plan.needs(row) if view else (row,),
            bound,
            job,
        )


def _check_new(plan: Plan, folders: Mapping[str, Path], reporter_for: ReporterFor) -> None:
    """Every run's mistakes before the first one's hours."""
    known: dict[DataConfig, Splits] = {}
    for name, config in plan.runs.items():
        if RunFolder(folders[name]).status() != "new":
            continue
        with reporter_for(name) as reporter:
            data = known.get(config.data) or known.setdefault(
                config.data, load_data(config.data, progress=reporter.progress)
            )
            model = config.model
            if isinstance(model, DualConfig) and {model.standard, model.robust} <= plan.runs.keys():
                check_unmade(config, {"standard": plan.runs[model.standard], "robust": plan.runs[model.robust]}, data)
            else:
                prepare_run(config, pick_device(config.device), reporter, folders=folders, data=data)


def _row_source(plan: Plan, row: str, folder: Path) -> RowSource:
    evaluation = folder / (row + EVALUATION_SUFFIX)
    view = plan.duals.get(row)
    if view is None:
        return RowSource(plan.label(row), folder / row, evaluation)
    return RowSource(plan.label(row), folder / view.robust, evaluation, standard=folder / view.standard)
