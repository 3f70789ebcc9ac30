"""From folders to a `Page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError, InputError
from phalanx.report.columns import Faced, columns_of
from phalanx.report.curves import read_curves
from phalanx.report.findings import caveats, evaluation_notices, summary, training_notices
from phalanx.report.page import Notice, Page, Rate, Row
from phalanx.report.records import Fields, flatten, read_object, read_record
from phalanx.runs import AttackSummary, Binding, Ledger, RunFolder, Summary, read_metrics, summarise, verify_manifest
from phalanx.runs.folder import RUN_NAME
from phalanx.runs.manifest import MANIFEST_NAME
from phalanx.runs.verdict import CLEAN

LEDGER_NAME = "ledger.sqlite"
EVALUATION_NAME = "evaluation.json"
MODEL_NAME = "model.json"
METRICS_NAME = "metrics.jsonl"
ENVIRONMENT_NAME = "environment.json"


@dataclass(frozen=True)
class RowSource:
    """Where a row of the table comes from."""

    label: str
    run: Path
    """The training run's folder."""
    evaluation: Path
    """The folder that holds its ledger."""


@dataclass(frozen=True)
class _Book:
    """What a ledger holds."""

    binding: Binding
    summary: Summary
    clean_invalid: int
    faced: tuple[Faced, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Material:
    """Everything read for one row."""

    label: str
    status: str
    config: Fields
    model: Fields
    metrics: Sequence[Mapping[str, Any]]
    metrics_path: Path
    environment: Fields | None
    evaluation: Fields | None
    book: _Book


def build_page(title: str, description: str, sources: Sequence[RowSource], command: str) -> Page:
    """Read the folders of every row.

    Args:
        title: the page's heading.
        description: what was asked, in a sentence or two; may be empty.
        sources: the rows of the table, in order.
        command: what makes this report again.

    Raises InputError if there is no row, or a folder holds no run or no verdict; CorruptError if a file is damaged, or
    an evaluation's files do not belong together. Both name the file.
    """
    if not sources:
        raise InputError("a report needs at least one evaluated run, got none; run phalanx evaluate RUN first")
    materials = [_read(source) for source in sources]
    attacks, places = columns_of([material.book.faced for material in materials])
    rows = tuple(
        _row(material, tuple(None if place is None else material.book.faced[place].summary for place in row_places))
        for material, row_places in zip(materials, places, strict=True)
    )
    return Page(
        title=title,
        description=description,
        command=command,
        attacks=attacks,
        rows=rows,
        notices=tuple(
            notice for material, row in zip(materials, rows, strict=True) for notice in _notices(material, row)
        ),
        summary=summary(rows, attacks),
        caveats=caveats(rows, attacks),
    )


def _read(source: RowSource) -> _Material:
    run = RunFolder(source.run)
    config = Fields(f"{source.run / RUN_NAME}: config", run.record()["config"])
    for folder in (source.run, source.evaluation):
        if (folder / MANIFEST_NAME).is_file():
            verify_manifest(folder)
    book = _read_book(source.evaluation / LEDGER_NAME)
    return _Material(
        label=source.label,
        status=run.status(),
        config=config,
        model=read_record(source.run / MODEL_NAME, missing="the run has no model yet; train it first"),
        metrics=read_metrics(source.run / METRICS_NAME),
        metrics_path=source.run / METRICS_NAME,
        environment=_optional(source.run / ENVIRONMENT_NAME),
        evaluation=_read_evaluation(source.evaluation / EVALUATION_NAME, book.binding),
        book=book,
    )


def _optional(path: Path) -> Fields | None:
    """A file that is written when the work ends."""
    return read_object(path, missing="") if path.exists() else None


def _read_book(path: Path) -> _Book:
    with Ledger.read(path) as ledger:
        rows, declared, binding = ledger.rows(), ledger.attacks(), ledger.binding()
    if not rows:
        raise InputError(f"the ledger {path} holds no verdict yet; evaluate the run first")
    found = summarise(rows)
    tried = {(attack.attack, attack.surface): attack for attack in found.attacks}
    unexplained = sorted({attack for attack, _ in tried} - set(declared))
    if unexplained:
        raise CorruptError(f"the ledger {path} does not say what the attack {unexplained[0]!r} is; evaluate again")
    faced = []
    for name, spec in declared.items():
        surfaces = [surface for attack, surface in tried if attack == name] or [str(spec.get("surface", "whole"))]
        faced += [Faced(spec, tried.get((name, surface)) or _untried(name, surface, found)) for surface in surfaces]
    return _Book(
        binding=binding,
        summary=found,
        clean_invalid=sum(row.attack == CLEAN and row.verdict == "invalid" for row in rows),
        faced=tuple(faced),
        seeds=tuple(sorted({spec["seed"] for spec in declared.values() if "seed" in spec})),
    )


def _untried(attack: str, surface: str, found: Summary) -> AttackSummary:
    """An attack that was declared, and stopped before its first verdict."""
    return AttackSummary(
        attack, surface, held=0, broken=0, invalid=0, timeout=0, untried=found.clean_correct, n=found.n
    )


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


def _row(material: _Material, attacks: tuple[AttackSummary | None, ...]) -> Row:
    config, book, evaluation = material.config, material.book, material.evaluation
    if "model" not in config.values:
        raise InputError(f"{config.where} has no model: the run was not made from a recipe, so it cannot be a row")
    model = config.fields("model")
    top_k = model.values.get("top_k")
    return Row(
        label=material.label,
        status=material.status,
        method=config.fields("method").text("name"),
        expert=model.text("expert"),
        experts=model.integer("experts"),
        top_k="all" if top_k == "all" else model.integer("top_k"),
        parameters=material.model.integer("parameters"),
        seed=config.integer("seed"),
        weights=None if evaluation is None else evaluation.text("weights"),
        clean=Rate(book.summary.clean_correct, book.summary.n),
        clean_invalid=book.clean_invalid,
        attacks=attacks,
        worst=_worst(book),
        load=None if evaluation is None else evaluation.shares("load"),
        curves=read_curves(material.metrics_path, material.metrics, _validation_attack(config)),
        settings=flatten(config.values),
        data=_data(material),
        measurement=_measurement(material),
        environment=_environment(material),
    )


def _worst(book: _Book) -> Rate | None:
    if not book.faced:
        return None
    whole = {(attack.attack, attack.surface) for attack in book.summary.attacks}
    unbegun = any((attack.summary.attack, attack.summary.surface) not in whole for attack in book.faced)
    held = 0 if unbegun else book.summary.robust
    return Rate(held, book.summary.n)


def _validation_attack(config: Fields) -> str:
    protocol = config.fields("validation").text("protocol")
    threat = config.fields("threat")
    return f"{protocol}, {threat.text('norm')} {threat.values.get('eps')}"


def _data(material: _Material) -> dict[str, Any]:
    data = material.model.fields("data").values
    evaluated = {} if material.evaluation is None else material.evaluation.fields("data").values
    classes = data.get("class_names") or []
    return {
        "trained on": data.get("name"),
        "image shape (channels, height, width)": data.get("shape"),
        "classes": len(classes),
        "class names": classes,
        "mean per channel": data.get("mean"),
        "standard deviation per channel": data.get("std"),
        "notes": data.get("notes"),
        "fingerprint (sha256)": data.get("fingerprint"),
        "evaluated on": evaluated.get("name"),
        "notes on the evaluated data": evaluated.get("notes"),
        "images evaluated": material.book.summary.n,
        "evaluated images (sha256)": material.book.binding.data_sha256,
    }


def _measurement(material: _Material) -> dict[str, Any]:
    record = {} if material.evaluation is None else material.evaluation.values
    binding = material.book.binding
    seeds = material.book.seeds
    return {
        "protocol": record.get("protocol"),
        "weights": record.get("weights"),
        "images": material.book.summary.n,
        "norm": binding.norm,
        "eps": binding.eps,
        "seed": seeds[0] if len(seeds) == 1 else list(seeds),
        "batch size": record.get("batch_size"),
        "wall time, seconds": record.get("seconds"),
        "evaluation version": binding.evaluation_version,
        "model (sha256)": binding.model_sha256,
    }


def _environment(material: _Material) -> dict[str, Any]:
    training = {} if material.environment is None else material.environment.values
    evaluation = {} if material.evaluation is None else material.evaluation.fields("environment").values
    return flatten({"training": training, "evaluation": evaluation})


def _notices(material: _Material, row: Row) -> list[Notice]:
    planned = None if material.evaluation is None else material.evaluation.integer("n")
    return [*training_notices(row, material.metrics), *evaluation_notices(row, planned)]
