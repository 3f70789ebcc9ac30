"""The folders of a row, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError, InputError
from phalanx.report.analysis import Analysis, read_analysis
from phalanx.report.book import Book, read_book
from phalanx.report.curves import Curves, read_curves
from phalanx.report.mixture import Mixture, mixtures_of
from phalanx.report.records import Fields, read_object, read_record
from phalanx.runs import Binding, RunFolder, read_metrics, verify_manifest
from phalanx.runs.folder import RUN_NAME
from phalanx.runs.manifest import MANIFEST_NAME

LEDGER_NAME = "ledger.sqlite"
EVALUATION_NAME = "evaluation.json"
ANALYSIS_NAME = "analysis.json"
MODEL_NAME = "model.json"
METRICS_NAME = "metrics.jsonl"
ENVIRONMENT_NAME = "environment.json"


@dataclass(frozen=True)
class RowSource:
    """Where a row of the table comes from."""

    label: str
    run: Path
    """The training run's folder; of a dual model put together from two runs the robust half's."""
    evaluation: Path
    """The folder that holds its ledger."""
    standard: Path | None = None
    """The standard half's run, for a dual model put together from two."""


@dataclass(frozen=True)
class Training:
    """A run's folder."""

    folder: Path
    status: str
    config: Fields
    model: Fields
    metrics: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    """Empty where the run did not end."""

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        return mixtures_of(self.config.fields("model"), self.model)

    @property
    def curves(self) -> Curves:
        threat = self.config.fields("threat")
        protocol = self.config.fields("validation").text("protocol")
        attack = f"{protocol}, {threat.text('norm')} {threat.values.get('eps')}"
        return read_curves(self.folder / METRICS_NAME, self.metrics, attack)


@dataclass(frozen=True)
class Material:
    """Everything read for one row."""

    label: str
    run: Training
    standard: Training | None
    """The other half of a view."""
    evaluation: Fields | None
    """None if the evaluation did not end."""
    analysis: Analysis | None
    book: Book

    @property
    def halves(self) -> dict[str, Training]:
        """The runs by half, the standard one first; the only one is called ""."""
        return {"": self.run} if self.standard is None else {"standard": self.standard, "robust": self.run}

    @property
    def view(self) -> Fields | None:
        """How two runs are put together; None for a single one, and where the evaluation did not end."""
        if self.standard is None or self.evaluation is None:
            return None
        return self.evaluation.fields("view")


def read_material(source: RowSource) -> Material:
    """Raises InputError if a folder holds no run or no verdict, or the evaluation is of another kind of model than the
    source says; CorruptError if a file is damaged, or an evaluation's files do not belong together."""
    _verify(source.evaluation)
    book = read_book(source.evaluation / LEDGER_NAME)
    evaluation = _read_evaluation(source.evaluation / EVALUATION_NAME, book.binding)
    if evaluation is not None:
        _check_view(evaluation, source)
    return Material(
        label=source.label,
        run=_read_training(source.run),
        standard=None if source.standard is None else _read_training(source.standard),
        evaluation=evaluation,
        analysis=read_analysis(source.evaluation / ANALYSIS_NAME),
        book=book,
    )


def _verify(folder: Path) -> None:
    """The checksums of a folder whose work is finished."""
    if (folder / MANIFEST_NAME).is_file():
        verify_manifest(folder)


def _read_training(folder: Path) -> Training:
    run = RunFolder(folder)
    config = Fields(f"{folder / RUN_NAME}: config", run.record()["config"])
    _verify(folder)
    if "model" not in config.values:
        raise InputError(f"{config.where} has no model: the run was not made from a recipe, so it cannot be a row")
    environment = folder / ENVIRONMENT_NAME
    return Training(
        folder=folder,
        status=run.status(),
        config=config,
        model=read_record(folder / MODEL_NAME, missing="the run has no model yet; train it first"),
        metrics=read_metrics(folder / METRICS_NAME),
        # written when the work ends
        environment=read_object(environment, missing="").values if environment.exists() else {},
    )


def _check_view(evaluation: Fields, source: RowSource) -> None:
    view = evaluation.values.get("view")
    if view is None and source.standard is not None:
        raise InputError(
            f"{evaluation.where} is of one run, not of a dual model made of two; leave out {source.standard}"
        )
    if view is not None and source.standard is None:
        raise InputError(f"{evaluation.where} is of a dual model made of two runs; name the standard half's run, too")
    if view is not None and (kind := evaluation.fields("view").text("kind")) != "dual":
        raise InputError(f"{evaluation.where} has a view of kind {kind!r}; use a newer phalanx")


def _read_evaluation(path: Path, binding: Binding) -> Fields | None:
    """The evaluation's record, None if it did not end. Raises CorruptError if it is not this ledger's."""
    if not path.exists():
        return None
    record = read_record(path, missing="")
    threat = record.fields("threat")
    said = {
        "model_sha256": record.text("model_sha256"),
        "norm": threat.text("norm"),
        "eps": str(threat.values.get("eps")),
    }
    for name, value in said.items():
        if value != getattr(binding, name):
            raise CorruptError(
                f"{path} and the ledger beside it are of different evaluations: {name} is {value!r}, in the ledger "
                f"{getattr(binding, name)!r}; restore both from one copy, or evaluate again"
            )
    return record
