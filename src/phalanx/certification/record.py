"""A certificate as the content of a file, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.certification.certificate import Certificate
from phalanx.certification.radii import Radii
from phalanx.threat import Norm

SCHEMA = 1

GRID: Mapping[Norm, tuple[float, ...]] = {
    "Linf": tuple(level / 255 for level in (0, 1, 2, 4, 8, 16, 32)),
    "L2": (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
    "L1": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
}
"""Radii at which certified accuracy is written, in pixel units of [0, 1]."""


def certificate_json(certificate: Certificate, ids: Sequence[int]) -> dict[str, Any]:
    """The content of `certificates.json`; `ids` (N,) say which images."""
    return {
        "schema": SCHEMA,
        "sound": True,
        "norm": certificate.norm,
        "method": certificate.method,
        "reachable": certificate.reachable,
        "n": len(certificate.reasons),
        "ids": [int(each) for each in ids],
        "radii": certificate.radius.tolist(),
        "reasons": list(certificate.reasons),
        "limits": list(certificate.limits),
        "counts": certificate.counts,
        "mean_radius": float(certificate.radius.mean()),
        "grid": grid_record(certificate, GRID[certificate.norm]),
        "constants": certificate.constants,
        "vacuous": certificate.vacuous,
        "notes": list(certificate.notes),
    }


def grid_record(radii: Radii, grid: Sequence[float]) -> list[dict[str, float]]:
    """Certified images and 95 % interval of certified accuracy at each radius."""
    found = []
    for radius in grid:
        low, high = radii.interval_at(radius)
        found.append({"radius": radius, "certified": radii.certified(radius), "low": low, "high": high})
    return found


def certificate_text(record: Mapping[str, Any]) -> str:
    """The table of a file's content."""
    n, norm = record["n"], record["norm"]
    lines = [
        f"certified accuracy, {norm}, method {record['method']}, {n:,} images: a bound whatever the attack",
        *grid_lines(record),
    ]
    return "\n".join([*lines, *([record["vacuous"]] if record["vacuous"] else []), *record["notes"]])


def grid_lines(record: Mapping[str, Any]) -> list[str]:
    """Certified accuracy by radius, the mean radius, and the images by reason."""
    n, norm = record["n"], record["norm"]
    lines = [f"{'radius':>12}  {'certified':>9}  95 % interval"]
    for at in record["grid"]:
        radius = f"{round(at['radius'] * 255)}/255" if norm == "Linf" and at["radius"] else f"{at['radius']:g}"
        interval = f"{100 * at['low']:.1f} to {100 * at['high']:.1f} %"
        lines.append(f"{radius:>12}  {100 * at['certified'] / n:>7.1f} %  {interval}")
    counts = ", ".join(f"{count:,} {reason}" for reason, count in record["counts"].items() if count)
    return [*lines, f"mean radius {record['mean_radius']:.4g}; {counts}"]
