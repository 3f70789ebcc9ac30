"""Rows that belong together: dual models of one alpha, and those that differ in alpha alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.report.analysis import margin_changes
from phalanx.report.material import Material
from phalanx.report.page import MarginComparison, Row, Tradeoff


@dataclass(frozen=True)
class _Family:
    """What rows must share to differ in alpha alone."""

    standard: str
    robust: str
    mix: str
    weights: str
    images: object
    faced: tuple[bool, ...]


def tradeoffs(materials: Sequence[Material], rows: Sequence[Row]) -> tuple[Tradeoff, ...]:
    """The dual models of the same two runs, evaluated on the same images with the same attacks."""
    families: dict[_Family, list[int]] = defaultdict(list)
    for place, (material, row) in enumerate(zip(materials, rows, strict=True)):
        if material.kind == "dual" and material.view is not None:
            family = _Family(
                standard=str(material.parts["standard"].folder.resolve()),
                robust=str(material.parts["robust"].folder.resolve()),
                mix=material.view.text("mix"),
                weights=str(row.weights),
                images=row.data["evaluated images (sha256)"],
                faced=tuple(attack is not None for attack in row.attacks),
            )
            families[family].append(place)
    return tuple(_tradeoff(materials, rows, places) for places in families.values() if len(places) > 1)


def _tradeoff(materials: Sequence[Material], rows: Sequence[Row], places: Sequence[int]) -> Tradeoff:
    halves = materials[places[0]].parts
    return Tradeoff(
        standard=halves["standard"].folder.name,
        robust=halves["robust"].folder.name,
        rows=tuple(sorted(places, key=lambda place: rows[place].alpha or 0.0)),
    )


def margin_comparisons(rows: Sequence[Row]) -> tuple[MarginComparison, ...]:
    """Each trained dual model beside each that is put together from two runs with the same alpha."""
    duals = [row for row in rows if row.is_dual and row.alpha is not None and row.analysis is not None]
    return tuple(
        _compared(trained, view)
        for trained in duals
        for view in duals
        if view.is_view and not trained.is_view and _margins_compare(trained, view)
    )


def _margins_compare(one: Row, other: Row) -> bool:
    """Same alpha, images and attack."""
    assert one.analysis is not None
    assert other.analysis is not None
    images = "evaluated images (sha256)"
    return (one.alpha, one.data[images], one.analysis.attack, one.analysis.counts) == (
        other.alpha,
        other.data[images],
        other.analysis.attack,
        other.analysis.counts,
    )


def _compared(trained: Row, view: Row) -> MarginComparison:
    assert trained.analysis is not None
    assert view.analysis is not None
    assert trained.alpha is not None
    after, before = trained.analysis.margins["model"], view.analysis.margins["model"]
    return MarginComparison(
        trained=trained.label,
        view=view.label,
        alpha=trained.alpha,
        attack=trained.analysis.attack,
        classes=trained.class_names[: len(trained.analysis.counts)],
        clean=margin_changes(after.clean, before.clean),
        attacked=margin_changes(after.attacked, before.attacked),
    )
