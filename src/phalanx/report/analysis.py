"""Routes, single experts and margins of a model, clean and attacked: what analysis.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.runs.rate import Rate

Number = TypeVar("Number", float, float | None)


@dataclass(frozen=True)
class ExpertRates:
    """One expert as a network by itself, clean and under an attack on it alone."""

    own_clean: Rate
    """On the images that the gate sends it when they are clean."""
    own_robust: Rate
    clean: Rate
    """On all images."""
    robust: Rate


@dataclass(frozen=True)
class Gate:
    """What one gate does with clean images and with attacked ones."""

    name: str
    """"" for a mixture, "standard" or "robust" for a half of a dual model."""
    top_k: int
    load_clean: tuple[float, ...]
    """(E,) share of the assignments that each expert gets."""
    load_attacked: tuple[float, ...]
    entropy_clean: float | None
    """Mean over the images in nats, at most ln E; None if no score was finite."""
    entropy_attacked: float | None
    flipped: Rate
    """`held` of the n images are sent to another set of experts under attack."""
    experts: tuple[ExpertRates, ...]
    """(E,)"""


@dataclass(frozen=True)
class Margins:
    """(C,) the mean of p_y - max_{k != y} p_k over each class, in [-1, 1]; None for a class without images."""

    clean: tuple[float | None, ...]
    attacked: tuple[float | None, ...]


@dataclass(frozen=True)
class Analysis:
    """Routes, single experts and margins, clean and under one attack on the whole model."""

    attack: str
    n: int
    gates: tuple[Gate, ...]
    oracle: tuple[Rate, Rate] | None
    """Clean and under that attack, of a mixture's experts if the gate knew the label; None for other models, and where
    it was not measured."""
    margins: Mapping[str, Margins]
    """Of "model" and, for a dual model, of "standard" and "robust"."""
    counts: tuple[int, ...]
    """(C,) images of each class."""
    invalid: int
    """Images left out of the margins because an answer was not finite."""


def read_analysis(path: Path) -> Analysis | None:
    """The analysis in a file, None if there is none.

    Raises CorruptError naming the key, InputError for a file of a newer version.
    """
    if not path.exists():
        return None
    record = read_record(path, missing="")
    n, classes = record.integer("n"), record.integer("num_classes")
    margins = record.fields("margins")
    parts = ("model", *(half for half in ("standard", "robust") if half in margins.values))
    return Analysis(
        attack=record.text("attack"),
        n=n,
        gates=tuple(_gate(gate, n) for gate in record.items("gates")),
        oracle=None if record.values.get("oracle") is None else _rates(record.fields("oracle")),
        margins={name: _margins(margins.fields(name), classes) for name in parts},
        counts=tuple(int(count or 0) for count in _sized(record, "counts", record.numbers("counts"), classes)),
        invalid=record.integer("invalid"),
    )


def _gate(gate: Fields, n: int) -> Gate:
    experts = gate.integer("experts")
    flipped = round(gate.share("flipped") * n)
    own, everything = gate.items("own"), gate.items("all")
    if not len(own) == len(everything) == experts:
        raise CorruptError(f"{gate.where} should tell of {experts} experts in own and all; restore it from a copy")
    return Gate(
        name=gate.text("name"),
        top_k=gate.integer("top_k"),
        load_clean=_sized(gate, "load_clean", gate.shares("load_clean") or (), experts),
        load_attacked=_sized(gate, "load_attacked", gate.shares("load_attacked") or (), experts),
        entropy_clean=gate.number("entropy_clean"),
        entropy_attacked=gate.number("entropy_attacked"),
        flipped=Rate(flipped, n),
        experts=tuple(
            ExpertRates(*_rates(alone), *_rates(of_all)) for alone, of_all in zip(own, everything, strict=True)
        ),
    )


def _rates(counts: Fields) -> tuple[Rate, Rate]:
    n, clean, robust = (counts.integer(key) for key in ("n", "clean", "robust"))
    if not robust <= clean <= n:
        raise CorruptError(f"{counts.where} should count robust <= clean <= n; restore it from a copy")
    return Rate(clean, n), Rate(robust, n)


def _margins(margins: Fields, classes: int) -> Margins:
    clean, attacked = (_sized(margins, key, margins.numbers(key), classes) for key in ("clean", "attacked"))
    return Margins(clean, attacked)


def _sized(fields: Fields, key: str, found: tuple[Number, ...], size: int) -> tuple[Number, ...]:
    if len(found) != size:
        raise CorruptError(f"{fields.where} should have {size} numbers in {key}, got {len(found)}; restore it")
    return found


# -- what training together changed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarginChange:
    """The mean margins of one class in two dual models."""

    trained: float
    view: float

    @property
    def points(self) -> float:
        """Trained minus view, in points of 1/100."""
        return 100 * (self.trained - self.view)

    @property
    def relative(self) -> float | None:
        """The same in percent of the size of the view's margin; None where that is zero."""
        return 100 * (self.trained - self.view) / abs(self.view) if self.view else None


def margin_changes(
    trained: tuple[float | None, ...], view: tuple[float | None, ...]
) -> tuple[MarginChange | None, ...]:
    """By class; None for a class without images."""
    pairs = zip(trained, view, strict=True)
    return tuple(None if after is None or before is None else MarginChange(after, before) for after, before in pairs)
