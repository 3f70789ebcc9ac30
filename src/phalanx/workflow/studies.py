"""A study: the runs and rows that a recipe names, made in order, side by side, and never twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from phalanx.config import (
    AnyView,
    EvaluationConfig,
    MixtureConfig,
    RunConfig,
    StudyConfig,
    bound_config,
    find_recipe,
    is_study,
    load_run,
    load_study,
)
from phalanx.data import DataConfig, Splits, load_data
from phalanx.errors import InputError, about
from phalanx.loading import Loaded, load_recipe, placed, to_plain
from phalanx.loading.shapes import keys
from phalanx.report import RowSource
from phalanx.runs import Node, RunFolder, Study
from phalanx.runs.study import check_name
from phalanx.training import Reporter
from phalanx.workers import WorkerPool
from phalanx.workflow.compute import pick_device
from phalanx.workflow.evaluating import evaluate_run, evaluate_view, evaluation_record
from phalanx.workflow.training import check_unmade, part_name, prepare_run, train_run

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
    views: Mapping[str, AnyView] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    """Names of runs and views in the table's order; empty for all of them."""
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By run, where its settings were written, as `Loaded` says it."""

    @property
    def table(self) -> tuple[str, ...]:
        """The rows in order."""
        return self.rows or (*self.runs, *self.views)

    def made_of(self, name: str) -> Mapping[str, str]:
        """The runs that a run starts from, or that a view is made of, by what they become."""
        return self.views[name].made_of if name in self.views else self.runs[name].model.made_of

    def needs(self, name: str) -> tuple[str, ...]:
        """Those of them that the study makes."""
        return tuple(run for run in self.made_of(name).values() if run in self.runs)

    def measured(self, row: str) -> RunConfig:
        """The run whose threat, seed and evaluation hold for a row: itself, or the last one that a view is made of."""
        return self.runs[list(self.made_of(row).values())[-1] if row in self.views else row]

    def only(self, rows: Iterable[str]) -> Plan:
        """The part of the study that makes these rows. Raises InputError for a row that it does not have."""
        rows = tuple(rows)
        for row in rows:
            if row not in self.runs and row not in self.views:
                raise InputError(f"the study has no row {row!r}; it has {', '.join((*self.runs, *self.views))}")
        wanted, queue = set(rows), list(rows)
        while queue:
            queue += (new := set(self.needs(queue.pop())) - wanted)
            wanted |= new
        return replace(
            self,
            runs={name: run for name, run in self.runs.items() if name in wanted},
            views={name: view for name, view in self.views.items() if name in wanted},
            rows=rows,
        )

    def label(self, row: str) -> str:
        """What a row is called."""
        return self.views[row].title if row in self.views else self.runs[row].label or row


def plan(name: str, overrides: tuple[str, ...] = ()) -> Plan:
    """What `phalanx run NAME` will make. Raises RecipeErrors before anything is written."""
    path = find_recipe(name)
    if not is_study(path):
        loaded = load_run(name, overrides)
        label = loaded.value.label or path.stem
        return Plan(label, "", {path.stem: loaded.value}, sources={path.stem: loaded.sources})
    study = load_study(name)
    for kind, names in (("runs", study.value.runs), ("views", study.value.views)):
        for row in names:
            with placed(study.sources), about(f"{kind}.{row}"):
                check_name(row)
    made = {run: _study_run(study, run, overrides) for run in study.value.runs}
    return Plan(
        study.value.title or path.stem,
        study.value.description,
        {run: loaded.value for run, loaded in made.items()},
        study.value.views,
        study.value.rows,
        {run: loaded.sources for run, loaded in made.items()},
    )


def _study_run(study: Loaded[StudyConfig], name: str, overrides: tuple[str, ...]) -> Loaded[RunConfig]:
    """The configuration of one run of a study, with the study's settings, its own and the command line's.

    Settings of a mixture pass by a run whose model is of another kind and does not have them.
    """
    made, shared = study.value.runs[name], study.value.set
    written = dict.fromkeys(shared, study.sources.get("set", ""))
    written |= dict.fromkeys(made.set, study.sources.get(f"runs.{name}.set", ""))
    with placed(study.sources), about(f"runs.{name}.recipe"):
        own = load_run(made.recipe, made.set, written=written).value
    missing = {*keys(MixtureConfig)} - {*keys(type(own.model))}

    def fits(setting: str) -> bool:
        section, _, key = setting.partition("=")[0].strip().partition(".")
        return not (section == "model" and key.partition(".")[0] in missing)

    given = (*filter(fits, shared), *made.set, *filter(fits, overrides))
    return load_run(made.recipe, given, written=written)


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
        case "evaluate view":
            view = _read(Viewing, {"view": job["view"]}).view
            runs = {name: folders[run] for name, run in view.made_of.items()}
            evaluate_view(view, runs, folder, _read(EvaluationConfig, job["config"]), reporter)
        case other:
            raise ValueError(f"a job's action is train, evaluate or evaluate view, got {other!r}")


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """A view as a section, since the loader reads sections."""

    view: AnyView


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
    on_gpu = any(_device(plan, name).type != "cpu" for name in plan.runs)
    return 1 if on_gpu or len(plan.runs) == 1 or (os.cpu_count() or 1) < 2 else 2


def _device(plan: Plan, name: str) -> torch.device:
    with placed(plan.sources.get(name, {})), about("device"):
        return pick_device(plan.runs[name].device)


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

    parts = {part for run in plan.runs for part in plan.needs(run)}
    for name in sorted(plan.runs, key=lambda run: run not in parts):
        config = to_plain(plan.runs[name])
        yield node(name, name, plan.needs(name), bound_config(config), {"action": "train", "config": config})
    for row in plan.table:
        measured, view = plan.measured(row), plan.views.get(row)
        job = {"config": to_plain(measured.evaluation), "label": plan.label(row)}
        job |= (
            {"action": "evaluate", "run": row} if view is None else {"action": "evaluate view", "view": to_plain(view)}
        )
        yield node(
            row + EVALUATION_SUFFIX,
            row,
            (row,) if view is None else plan.needs(row),
            evaluation_record(measured.evaluation, measured.threat, measured.seed, view),
            job,
        )


def _check_new(plan: Plan, folders: Mapping[str, Path], reporter_for: ReporterFor) -> None:
    """Every run's mistakes before the first one's hours."""
    known: dict[DataConfig, Splits] = {}
    for name, config in plan.runs.items():
        if RunFolder(folders[name]).status() != "new":
            continue
        with reporter_for(name) as reporter, placed(plan.sources.get(name, {})):
            with about("data"):
                data = known.get(config.data) or known.setdefault(
                    config.data, load_data(config.data, progress=reporter.progress)
                )
            device = _device(plan, name)
            parts = plan.made_of(name)
            if parts and set(parts.values()) <= plan.runs.keys():
                check_unmade(config, {part_name(part): plan.runs[run] for part, run in parts.items()}, data)
            else:
                prepare_run(config, device, reporter, folders=folders, data=data)


def _row_source(plan: Plan, row: str, folder: Path) -> RowSource:
    evaluation = folder / (row + EVALUATION_SUFFIX)
    if row not in plan.views:
        return RowSource(plan.label(row), folder / row, evaluation)
    return row_source(plan.label(row), evaluation, {part: folder / run for part, run in plan.made_of(row).items()})


def row_source(label: str, evaluation: Path, runs: Mapping[str, Path]) -> RowSource:
    """The row of a view, from the runs it is made of, by what they become; the last one says how it was measured."""
    *others, last = runs.values()
    if "standard" in runs:
        return RowSource(label, last, evaluation, standard=runs["standard"])
    return RowSource(label, last, evaluation, members=tuple(others))
