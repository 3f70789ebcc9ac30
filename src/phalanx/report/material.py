"""The folders of a row, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError, InputError
from phalanx.report.analysis import Analysis, read_analysis
from phalanx.report.attribution import Attribution, read_attribution
from phalanx.report.book import Book, read_book
from phalanx.report.certificates import Certificates, read_certificates
from phalanx.report.corruptions import Corruptions, read_corruptions
from phalanx.report.curves import Curves, read_curves
from phalanx.report.gallery import Gallery, read_gallery
from phalanx.report.honesty import HONESTY_NAME, Honesty, read_honesty
from phalanx.report.mixture import Mixture, mixtures_of
from phalanx.report.page import FOREIGN
from phalanx.report.printed import PrintedLine, read_printed
from phalanx.report.queries import QueryCurves, Targeted, read_queries, read_targeted
from phalanx.report.records import Fields, read_object, read_record
from phalanx.report.smoothed import SmoothedRow, read_smoothed
from phalanx.report.threefold import Threefold, read_threefold
from phalanx.runs import Binding, RunFolder, read_metrics, verify_manifest
from phalanx.runs.folder import RUN_NAME
from phalanx.runs.manifest import MANIFEST_NAME

LEDGER_NAME = "ledger.sqlite"
EVALUATION_NAME = "evaluation.json"
ANALYSIS_NAME = "analysis.json"
ATTRIBUTION_NAME = "attribution.json"
QUERIES_NAME = "queries.json"
TARGETED_NAME = "targeted.json"
GALLERY_NAME = "gallery.npz"
CORRUPTIONS_NAME = "corruptions.json"
MODEL_NAME = "model.json"
METRICS_NAME = "metrics.jsonl"
ENVIRONMENT_NAME = "environment.json"


@dataclass(frozen=True)
class RowSource:
    """Where a row of the table comes from."""

    label: str
    run: Path | None
    """The training run's folder; of a model put together from several the last one's (a dual model's robust half); None
    for a model that was made elsewhere."""
    evaluation: Path
    """The folder that holds its ledger."""
    standard: Path | None = None
    """The standard half's run, for a dual model put together from two."""
    members: tuple[Path, ...] = ()
    """The other runs, in order, of an ensemble put together from several."""

    @property
    def others(self) -> dict[str, Path]:
        """The runs besides the last one, by what they become."""
        if self.standard is not None:
            return {"standard": self.standard}
        return {f"member {number}": run for number, run in enumerate(self.members)}


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
    run: Training | None
    """None for a model that was made elsewhere."""
    others: Mapping[str, Training]
    """The other runs of a view, by what they become there."""
    evaluation: Fields | None
    """None if the evaluation did not end."""
    analysis: Analysis | None
    attribution: Attribution | None
    queries: QueryCurves | None
    targeted: Targeted | None
    honesty: Honesty | None
    gallery: Gallery | None
    corruptions: Corruptions | None
    certificates: tuple[Certificates, ...]
    threefold: Threefold | None
    printed: tuple[PrintedLine, ...]
    smoothed: tuple[SmoothedRow, ...]
    book: Book
    bound: Fields
    """Of a model made elsewhere what its evaluation is bound to; empty for a run."""

    @property
    def parts(self) -> dict[str, Training]:
        """The runs by what they become, a dual model's standard half first; the only one is called ""."""
        if self.run is None:
            return {}
        if not self.others:
            return {"": self.run}
        return {**self.others, "robust" if "standard" in self.others else f"member {len(self.others)}": self.run}

    @property
    def view(self) -> Fields | None:
        """How the runs are put together; None for a run as it is, and where the evaluation did not end."""
        if self.evaluation is None or self.evaluation.values.get("view") is None:
            return None
        return self.evaluation.fields("view")

    @property
    def kind(self) -> str | None:
        """Of the view; where the evaluation did not end, what the runs tell of it; `FOREIGN` without a run."""
        if self.run is None:
            return FOREIGN
        if self.view is not None:
            return self.view.text("kind")
        return None if not self.others else "dual" if "standard" in self.others else "ensemble"


def read_material(source: RowSource) -> Material:
    """Raises InputError if a folder holds no run or no verdict, or the evaluation is of another kind of model than the
    source says; CorruptError if a file is damaged, or an evaluation's files do not belong together."""
    _verify(source.evaluation)
    book = read_book(source.evaluation / LEDGER_NAME)
    evaluation = _read_evaluation(source.evaluation / EVALUATION_NAME, book.binding)
    if evaluation is not None:
        _check_view(evaluation, source)
    certificates = read_certificates(source.run, book.binding, book.samples)
    return Material(
        label=source.label,
        run=None if source.run is None else _read_training(source.run),
        others={name: _read_training(run) for name, run in source.others.items()},
        evaluation=evaluation,
        analysis=read_analysis(source.evaluation / ANALYSIS_NAME),
        attribution=read_attribution(source.evaluation / ATTRIBUTION_NAME),
        queries=read_queries(source.evaluation / QUERIES_NAME),
        targeted=read_targeted(source.evaluation / TARGETED_NAME),
        honesty=read_honesty(source.evaluation / HONESTY_NAME),
        gallery=read_gallery(source.evaluation / GALLERY_NAME),
        corruptions=read_corruptions(source.evaluation / CORRUPTIONS_NAME),
        certificates=certificates,
        threefold=read_threefold(source.evaluation / LEDGER_NAME, certificates),
        printed=read_printed(source.run, book.binding),
        smoothed=read_smoothed(source.run, book.binding),
        book=book,
        bound=_bound(source.evaluation) if source.run is None else Fields("", {}),
    )


def _bound(folder: Path) -> Fields:
    return Fields(f"{folder / RUN_NAME}: config", RunFolder(folder).record()["config"])


def _verify(folder: Path) -> None:
    """The checksums of a folder whose work is finished."""
    if (folder / MANIFEST_NAME).is_file():
        verify_manifest(folder)


def _read_training(folder: Path) -> Training:
    run = RunFolder(folder)
    config = _bound(folder)
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


_PUT_TOGETHER = {"dual": ("standard",), "mixed_nuts": ("standard",), "gate": (), "ensemble": None}
"""The other runs that each kind of view names; an ensemble's may be any number."""


def _check_view(evaluation: Fields, source: RowSource) -> None:
    others = source.others
    if evaluation.values.get("view") is None:
        if others:
            raise InputError(
                f"{evaluation.where} is of one run, not of a model made of several; "
                f"leave out {', '.join(map(str, others.values()))}"
            )
        return
    kind = evaluation.fields("view").text("kind")
    if kind not in _PUT_TOGETHER:
        raise InputError(f"{evaluation.where} has a view of kind {kind!r}; use a newer phalanx")
    named = _PUT_TOGETHER[kind]
    if "standard" in (named or ()) and "standard" not in others:
        raise InputError(f"{evaluation.where} is of a dual model made of two runs; name the standard half's run, too")
    if (named is None and not source.members) or (named is not None and set(named) != set(others)):
        raise InputError(f"{evaluation.where} is a view of kind {kind!r}, made of other runs; name those")


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
