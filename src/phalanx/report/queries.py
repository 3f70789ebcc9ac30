"""Attacks through a model's answers, and targeted ones: what queries.json and targeted.json say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.runs.rate import Rate


@dataclass(frozen=True)
class QueryCurve:
    """Robust accuracy under one attack, by the queries that it may spend on each image."""

    attack: str
    points: tuple[tuple[int, Rate], ...]
    """By increasing queries; the first, at none, is the clean accuracy."""


@dataclass(frozen=True)
class QueryCurves:
    """Of one evaluation."""

    curves: tuple[QueryCurve, ...]
    left_out: Mapping[str, str]
    """By attack, why it has none."""

    def to_json(self) -> dict[str, Any]:
        """For table.json, with the intervals."""
        return {
            "curves": [
                {"attack": curve.attack, "points": [{"queries": at} | _counted(rate) for at, rate in curve.points]}
                for curve in self.curves
            ],
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class Targeted:
    """How many images were answered with the class drawn for them, under an attack towards it."""

    attack: str
    reached: Rate
    already: int
    """Of these, answered so without an attack."""
    invalid: int
    cells: Mapping[tuple[int, int], Rate]
    """By (label, class drawn)."""

    def to_json(self) -> dict[str, Any]:
        """For table.json, with the interval."""
        cells = [
            {"label": label, "target": target, "n": rate.n, "reached": rate.held}
            for (label, target), rate in self.cells.items()
        ]
        counts = {"already": self.already, "invalid": self.invalid}
        return {"attack": self.attack, **_counted(self.reached, "reached"), **counts, "cells": cells}


def read_queries(path: Path) -> QueryCurves | None:
    """The curves in a file, None if there is none. Raises CorruptError, and InputError for a newer version's file."""
    if not path.exists():
        return None
    record = read_record(path, missing="")
    left_out = {item.text("attack"): item.text("why") for item in record.items("left_out")}
    return QueryCurves(tuple(map(_curve, record.items("curves"))), left_out)


def _curve(curve: Fields) -> QueryCurve:
    n, standing, points = curve.integer("n"), curve.integer("clean"), list(curve.items("points"))
    rates = [(0, _rate(curve, standing, n))]
    for point in points:
        queries, held = point.integer("queries"), point.integer("held")
        if queries <= rates[-1][0] or held > rates[-1][1].held:
            raise CorruptError(f"{point.where} should have more queries, and no more held, than before; restore it")
        rates.append((queries, Rate(held, n)))
    return QueryCurve(curve.text("attack"), tuple(rates))


def read_targeted(path: Path) -> Targeted | None:
    """The targeted success in a file, None if there is none. Raises as `read_queries`."""
    if not path.exists():
        return None
    record = read_record(path, missing="")
    return Targeted(
        attack=record.text("attack"),
        reached=_rate(record, record.integer("reached"), record.integer("n")),
        already=record.integer("already"),
        invalid=record.integer("invalid"),
        cells={
            (cell.integer("label"), cell.integer("target")): _rate(cell, cell.integer("reached"), cell.integer("n"))
            for cell in record.items("cells")
        },
    )


def _counted(rate: Rate, name: str = "held") -> dict[str, Any]:
    return {name: rate.held, "n": rate.n, "interval": list(rate.interval)}


def _rate(fields: Fields, held: int, n: int) -> Rate:
    if held > n:
        raise CorruptError(f"{fields.where} should count no more than its n, {n:,}, got {held:,}; restore it")
    return Rate(held, n)
