"""From folders to a `Page`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from phalanx.errors import InputError
from phalanx.report.attribution_tables import attribution_notices
from phalanx.report.columns import Faced, columns_of
from phalanx.report.comparisons import margin_comparisons, tradeoffs
from phalanx.report.corruptions import covered
from phalanx.report.counts import read_counts
from phalanx.report.curves import NO_CURVES
from phalanx.report.findings import caveats, evaluation_notices, summary, training_notices
from phalanx.report.headline import KEYS, Column, shown_columns
from phalanx.report.honesty_tables import honesty_notices
from phalanx.report.material import Material, RowSource, read_material
from phalanx.report.page import UNTRAINED, Attack, ClassRates, Notice, Page, Row
from phalanx.report.reach import read_reach
from phalanx.report.records import flatten
from phalanx.report.sweeps import sweeps
from phalanx.report.threefold import contradicted
from phalanx.runs import AttackSummary

Reported = Mapping[str, Mapping[str, float]]
"""By row label and column of the first table, or attack of a curve such as "fgsm:0.03", in percent."""

_SWEPT = re.compile(r"fgsm:.+|pgd-\d+")


def build_page(
    title: str,
    description: str,
    sources: Sequence[RowSource],
    command: str,
    *,
    reported: Reported | None = None,
    reported_source: str = "",
) -> Page:
    """Read the folders of every row.

    Args:
        title: the page's heading.
        description: what was asked, in a sentence or two; may be empty.
        sources: the rows of the table, in order.
        command: what makes this report again.
        reported: what a paper printed, shown beside what was measured and never mixed with it. Labels that no row has
            are left out: not every row of a paper's table need be made.
        reported_source: where it was printed.

    Raises InputError if there is no row, or a folder holds no run or no verdict; CorruptError if a file is damaged, or
    an evaluation's files do not belong together. Both name the file. ValueError for a reported column that is none.
    """
    if not sources:
        raise InputError("a report needs at least one evaluated run, got none; run phalanx evaluate RUN first")
    reported = reported or {}
    _check_columns(reported)
    materials = [read_material(source) for source in _told_apart(sources)]
    attacks, places = columns_of([material.book.faced for material in materials])
    released, released_places = columns_of([material.book.released for material in materials])
    outside, outside_places = columns_of([material.book.outside for material in materials])
    rows = tuple(
        _row(
            material,
            _in_columns(material.book.faced, own),
            _in_columns(material.book.released, own_released),
            _in_columns(material.book.outside, own_outside),
            reported.get(material.label, {}),
        )
        for material, own, own_released, own_outside in zip(
            materials, places, released_places, outside_places, strict=True
        )
    )
    return Page(
        title=title,
        description=description,
        command=command,
        columns=_columns(materials, rows, attacks),
        attacks=attacks,
        released=released,
        outside=outside,
        rows=rows,
        reported_source=reported_source if any(row.reported for row in rows) else "",
        sweeps=sweeps(rows, attacks, outside),
        tradeoffs=tradeoffs(materials, rows),
        margin_comparisons=margin_comparisons(rows),
        notices=_gravest_first(
            notice for material, row in zip(materials, rows, strict=True) for notice in _notices(material, row)
        ),
        summary=summary(rows, attacks),
        caveats=caveats(rows, attacks),
    )


def _told_apart(sources: Sequence[RowSource]) -> list[RowSource]:
    """Equal labels, such as those of two runs of one recipe, numbered: tables over seeds and alarms go by the label."""
    found: dict[str, RowSource] = {}
    for source in sources:
        names = (source.label, *(f"{source.label} ({number})" for number in range(2, len(sources) + 2)))
        label = next(name for name in names if name not in found)
        found[label] = replace(source, label=label)
    return list(found.values())


def _in_columns(faced: Sequence[Faced], places: Sequence[int | None]) -> tuple[AttackSummary | None, ...]:
    return tuple(None if place is None else faced[place].summary for place in places)


def _check_columns(reported: Reported) -> None:
    for label, columns in reported.items():
        unknown = sorted(key for key in columns if key not in KEYS and not _SWEPT.fullmatch(key))
        if unknown:
            raise ValueError(f"reported columns must be among {', '.join(KEYS)}, got {unknown[0]!r} for {label!r}")


def _columns(materials: Sequence[Material], rows: Sequence[Row], attacks: Sequence[Attack]) -> tuple[Column, ...]:
    labels: dict[str, tuple[str, ...]] = {}
    for column in KEYS:
        counted = {key for material in materials for key in material.book.counted.get(column, ())}
        labels[column] = tuple(attack.label for attack in attacks if (attack.name, attack.surface) in counted)
    lines = [line for row in rows for line in (row.columns, row.reported, *row.released_columns.values())]
    return shown_columns(lines, labels)


# -- rows ----------------------------------------------------------------------------------------------------------


def _row(
    material: Material,
    attacks: tuple[AttackSummary | None, ...],
    released: tuple[AttackSummary | None, ...],
    outside: tuple[AttackSummary | None, ...],
    reported: Mapping[str, float],
) -> Row:
    book, evaluation, parts = material.book, material.evaluation, material.parts.values()
    mixtures = tuple(mixture for part in parts for mixture in part.mixtures)
    names = _class_names(material)
    counts = read_counts(evaluation)
    return Row(
        label=material.label,
        status=next((part.status for part in parts if part.status != "finished"), "finished"),
        view=material.kind,
        gate=_gate(material),
        method=_method(material),
        mixtures=mixtures,
        alpha=_alpha(material),
        # of a view its runs' may not be its own: another gate has another router
        parameters=counts.parameters if counts else sum(part.model.integer("parameters") for part in parts),
        counts=counts,
        reach=read_reach(evaluation),
        seed=(material.bound if material.run is None else material.run.config).integer("seed"),
        weights=None if evaluation is None else evaluation.text("weights"),
        clean=book.clean,
        clean_invalid=book.clean_invalid,
        attacks=attacks,
        columns=book.filled(dual=len(mixtures) > 1 and material.kind != "ensemble"),
        released=released,
        released_columns=book.released_columns,
        outside=outside,
        challenges=book.challenges,
        unchallenged=book.unchallenged,
        threats=covered(book.threats, material.corruptions),
        reported=reported,
        class_names=names,
        classes=tuple(ClassRates(names[label], *rates) for label, rates in book.classes.items()),
        load=None if evaluation is None else evaluation.shares("load"),
        analysis=material.analysis,
        attribution=material.attribution,
        queries=material.queries,
        targeted=material.targeted,
        honesty=material.honesty,
        gallery=material.gallery,
        corruptions=material.corruptions,
        certificates=material.certificates,
        threefold=material.threefold,
        printed=material.printed,
        smoothed=material.smoothed,
        curves=material.run.curves if material.run and material.kind is None else NO_CURVES,
        settings=_settings(material),
        data=_data(material),
        measurement=_measurement(material),
        environment=_environment(material),
    )


def _method(material: Material) -> str:
    if material.run is None or material.kind is not None:
        return str(material.kind)
    config = material.run.config
    return config.fields("method").text("name") if config.fields("training").integer("epochs") else UNTRAINED


def _alpha(material: Material) -> float | None:
    if material.kind in ("dual", "mixed_nuts"):
        return None if material.view is None else material.view.share("alpha")
    if material.run is None or material.kind is not None:
        return None
    model = material.run.config.fields("model")
    return model.share("alpha") if model.values.get("name") == "dual" else None


def _gate(material: Material) -> str | None:
    return material.view.text("gate") if material.kind == "gate" and material.view is not None else None


def _settings(material: Material) -> dict[str, Any]:
    if material.run is None:
        return flatten(material.bound.values)
    if material.kind is None:
        return flatten(material.run.config.values)
    joined = {} if material.view is None else {k: v for k, v in material.view.values.items() if k != "kind"}
    runs = {name or "run": run.config.values for name, run in material.parts.items()}
    return flatten({**runs, str(material.kind): joined})


def _class_names(material: Material) -> tuple[str, ...]:
    """The names that the data gave, and numbers where it gave none."""
    names = _trained_on(material).get("class_names") or []
    analysed = 0 if material.analysis is None else len(material.analysis.counts)
    count = max(len(names), analysed, *(label + 1 for label in material.book.classes))
    return tuple(str(names[label]) if label < len(names) else str(label) for label in range(count))


def _trained_on(material: Material) -> Mapping[str, Any]:
    """What is known of the training data: nothing of a model that was made elsewhere."""
    return {} if material.run is None else material.run.model.fields("data").values


def _data(material: Material) -> dict[str, Any]:
    data = _trained_on(material)
    evaluated = {} if material.evaluation is None else material.evaluation.fields("data").values
    classes = data.get("class_names") or []
    return {
        "trained on": data.get("name"),
        "image shape (channels, height, width)": data.get("shape"),
        "classes": len(classes) or None,
        "class names": classes,
        "mean per channel": data.get("mean"),
        "standard deviation per channel": data.get("std"),
        "notes": data.get("notes"),
        "fingerprint (sha256)": data.get("fingerprint"),
        "evaluated on": evaluated.get("name"),
        "notes on the evaluated data": evaluated.get("notes"),
        "images evaluated": material.book.clean.n,
        "evaluated images (sha256)": material.book.binding.data_sha256,
    }


def _measurement(material: Material) -> dict[str, Any]:
    record = {} if material.evaluation is None else material.evaluation.values
    binding = material.book.binding
    seeds = material.book.seeds
    return {
        "protocol": record.get("protocol"),
        "weights": record.get("weights"),
        "images": material.book.clean.n,
        "norm": binding.norm,
        "eps": binding.eps,
        "seed": seeds[0] if len(seeds) == 1 else list(seeds),
        "batch size": record.get("batch_size"),
        "wall time, seconds": record.get("seconds"),
        "evaluation version": binding.evaluation_version,
        "model (sha256)": binding.model_sha256,
    }


def _environment(material: Material) -> dict[str, Any]:
    training = {
        f"training of the {name} half"
        if name in ("standard", "robust")
        else f"training of {name}"
        if name
        else "training": (run.environment)
        for name, run in material.parts.items()
    }
    evaluation = {} if material.evaluation is None else material.evaluation.fields("environment").values
    return flatten({**training, "evaluation": evaluation})


def _notices(material: Material, row: Row) -> list[Notice]:
    planned = None if material.evaluation is None else material.evaluation.integer("n")
    trained = [
        notice
        for part, run in material.parts.items()
        for notice in training_notices(row.label, part, run.status, run.curves, run.metrics)
    ]
    proofs = [Notice("fail", row.label, text) for text in contradicted(row.label, row.threefold)]
    return [*trained, *evaluation_notices(row, planned), *attribution_notices(row), *honesty_notices(row), *proofs]


def _gravest_first(notices: Iterable[Notice]) -> tuple[Notice, ...]:
    """What invalidates the headline first, warnings last, all else as it comes."""
    place = {"fail": 0, "warn": 2}
    return tuple(sorted(notices, key=lambda notice: place.get(notice.kind, 1)))
