"""From folders to a report, and the little that commands ask besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from phalanx.config import AnyView, RunConfig, load_run
from phalanx.data import DataConfig
from phalanx.data.config import NAMED
from phalanx.errors import InputError
from phalanx.loading import load_recipe
from phalanx.report import Page, RowSource, build_page, read_formats, write_report
from phalanx.report.records import read_object
from phalanx.runs import Ledger, RunFolder
from phalanx.workflow.evaluating import EVALUATION_NAME, LEDGER_NAME
from phalanx.workflow.studies import EVALUATION_SUFFIX, Viewing, row_source


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
        raise InputError(f"{path} is no folder; give that of a study, a run or a model's evaluation")
    if _has_verdicts(path):
        return [_row(path, None, path.name)]
    own = [_row(folder, path, f"{path.name} {folder.name}") for folder in _evaluated(path / "evaluations", "*")]
    inside = []
    for folder in _evaluated(path, "*" + EVALUATION_SUFFIX):
        name = folder.name.removesuffix(EVALUATION_SUFFIX)
        inside.append(_row(folder, path / name, name))
    return own + inside


def _evaluated(folder: Path, pattern: str) -> list[Path]:
    return [found for found in sorted(folder.glob(pattern)) if _has_verdicts(found)]


def _has_verdicts(folder: Path) -> bool:
    """Whether an evaluation is there, finished or not: its record is written last, its ledger first."""
    if (folder / EVALUATION_NAME).is_file():
        return True
    if not (folder / LEDGER_NAME).is_file():
        return False
    with Ledger.read(folder / LEDGER_NAME) as ledger:
        return bool(ledger.rows())


def _row(evaluation: Path, run: Path | None, name: str) -> RowSource:
    path = evaluation / EVALUATION_NAME
    label = str((path.is_file() and read_object(path, missing="").values.get("label")) or name)
    bound = RunFolder(evaluation).record()["config"]
    record = bound.get("view")
    if "model" in bound:
        return RowSource(label, None, evaluation)
    if run is None:
        raise InputError(f"{evaluation} is the evaluation of a run; give the run's folder or the study's")
    if record is None:
        return RowSource(label, run, evaluation)
    view = load_recipe(Viewing, None, values={"view": record}).value.view
    return row_source(label, evaluation, view_runs(view, evaluation))


def view_runs(view: AnyView, evaluation: Path) -> dict[str, Path]:
    """The runs that an evaluated view is made of, by what they become: a study's own lie beside the evaluation, others
    are paths as they were given."""
    return {
        part: beside if (beside := evaluation.parent / name).is_dir() else Path(name)
        for part, name in view.made_of.items()
    }


def report_on(
    rows: list[RowSource],
    folder: Path,
    *,
    title: str,
    description: str,
    command: str,
    reported: Mapping[str, Mapping[str, float]] | None = None,
    reported_source: str = "",
    formats: Sequence[str] = (),
) -> tuple[Page, dict[str, Path]]:
    """Builds the page and writes it into `folder`: the page, and where its files are by name.

    `reported` holds what a paper printed for rows, by label and column, in percent; `reported_source` says where.
    `formats` are those of `phalanx.report.read_formats`.
    """
    wanted = read_formats(formats)
    page = build_page(title, description, rows, command, reported=reported, reported_source=reported_source)
    return page, write_report(folder, page, wanted)


def data_config(name: str, overrides: tuple[str, ...] = ()) -> DataConfig:
    """The data settings meant by "digits", "folder:PATH", "parquet:PATH" or a recipe, with `--set data.KEY=VALUE`."""
    if name == "digits" or name in NAMED or ":" in name:
        return load_recipe(RunConfig, None, overrides, values={"data": {"name": name}}, values_are="DATA").value.data
    return load_run(name, overrides).value.data
