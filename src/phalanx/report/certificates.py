"""Certified accuracy beside attacked accuracy: what certificates.json says of the evaluated model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.report.table import Table
from phalanx.report.words import ABSENT, plural, rated
from phalanx.runs import Binding
from phalanx.runs.proofs import Proof
from phalanx.runs.rate import Rate
from phalanx.runs.summary import radius

CERTIFICATES_NAME = "certificates.json"


@dataclass(frozen=True)
class Certificates:
    """Of one model, in one norm, by one method."""

    norm: str
    method: str
    n: int
    grid: tuple[tuple[float, Rate], ...]
    """Radii in pixel units of [0, 1], and the images that are right and certified there."""
    at_eps: Rate | None
    """At the radius that the model was attacked within; None in another norm."""
    same_images: bool
    """Whether it speaks of the images that were evaluated, all of them and no others."""
    vacuous: str
    """Why the bounds say nothing; empty where they do."""
    proof: Proof
    """Image by image."""

    def to_json(self) -> dict[str, Any]:
        """Counts by radius."""
        grid = [{"radius": at, "certified": rate.held, "interval": list(rate.interval)} for at, rate in self.grid]
        at_eps = None if self.at_eps is None else self.at_eps.held
        return {"norm": self.norm, "method": self.method, "n": self.n, "grid": grid, "certified_at_eps": at_eps}


def read_certificates(run: Path | None, binding: Binding, samples: Collection[int] = ()) -> tuple[Certificates, ...]:
    """Those in a run's folder that are of the evaluated model, weights and all; none without a run.

    `samples` are those evaluated, for `same_images`. Raises CorruptError naming the file and the key, InputError for a
    file of a newer version.
    """
    if run is None:
        return ()
    records = [read_record(path, missing="") for path in sorted(run.glob(f"certificates/*/{CERTIFICATES_NAME}"))]
    own = (record for record in records if record.text("model_sha256") == binding.model_sha256)
    return tuple(_read(record, binding, samples) for record in own)


def _read(record: Fields, binding: Binding, samples: Collection[int]) -> Certificates:
    norm, n = record.text("norm"), record.integer("n")
    radii, reasons = record.numbers("radii"), record.values.get("reasons")
    if not isinstance(reasons, list) or not len(radii) == len(reasons) == n:
        raise CorruptError(f"{record.where} should hold a radius and a reason for each of {n:,} images; certify again")
    ids = record.numbers("ids")
    if len(ids) != n or None in ids or len({*ids}) != n:
        raise CorruptError(f"{record.where}.ids should name each of {n:,} images once; certify again")
    proved = {
        int(sample): at
        for sample, at, reason in zip(ids, radii, reasons, strict=True)
        if reason == "certified" and at is not None and sample is not None
    }
    held, eps, method = proved.values(), radius(binding.eps), record.text("method")
    return Certificates(
        norm=norm,
        method=method,
        n=n,
        grid=tuple((at.number("radius") or 0.0, _rate(at, n)) for at in record.items("grid")),
        at_eps=Rate(sum(at >= eps for at in held), n) if norm == binding.norm else None,
        same_images={*ids} == {*samples},
        vacuous=str(record.values.get("vacuous") or ""),
        proof=Proof(norm, method, proved),
    )


def _rate(at: Fields, n: int) -> Rate:
    certified = at.integer("certified")
    if certified > n:
        raise CorruptError(f"{at.where}.certified should be at most {n:,}, got {certified:,}; certify again")
    return Rate(certified, n)


def certificates_table(rows: Sequence[tuple[str, str, Rate | None, tuple[Certificates, ...]]]) -> Table | None:
    """A line for each row, certificate and radius; None if nothing was certified.

    `rows`: label, the radius attacked within, the worst case there, and what was certified.
    """
    lines = [
        (label, found.norm, found.method, f"{found.n:,}", at, rated(rate), attacked)
        for label, eps, worst, certified in rows
        for found in certified
        for at, rate, attacked in (
            *([(eps, found.at_eps, rated(worst) if found.same_images else ABSENT)] if found.at_eps is not None else []),
            *((f"{at:.4g}", rate, ABSENT) for at, rate in found.grid),
        )
    ]
    if not lines:
        return None
    told = dict.fromkeys(found.vacuous for *_, certified in rows for found in certified if found.vacuous)
    notes = "".join(f" {text.rstrip('.')}." for text in told)
    models = plural(sum(bool(certified) for *_, certified in rows), "model")
    return Table(
        "Certified beside attacked accuracy",
        f"Of {models}. Certified: no perturbation of that size changes the answer, whatever the attack; a lower bound. "
        f"Attacked: the worst case over everything tried; an upper bound. The truth lies between; "
        f"a dash where other images were attacked than certified.{notes}",
        ("model", "norm", "method", "n", "radius", "certified, %", "attacked, %"),
        tuple(lines),
    )
