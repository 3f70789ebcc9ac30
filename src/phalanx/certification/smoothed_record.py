"""A smoothed classifier's certificate as the content of a file, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from phalanx.certification.record import GRID, grid_lines, grid_record
from phalanx.certification.smoothing import SmoothedCertificate

SCHEMA = 1


def smoothed_json(certificate: SmoothedCertificate, ids: Sequence[int]) -> dict[str, Any]:
    """The content of `smoothed.json`; `ids` (N,) say which images. `predicted` is -1 where it abstains."""
    low, high = certificate.interval
    return {
        "schema": SCHEMA,
        "certifies": "the smoothed classifier, with probability `confidence` for each image",
        "norm": certificate.norm,
        "method": certificate.method,
        **asdict(certificate.smoothing),
        "n": len(certificate.reasons),
        "ids": [int(each) for each in ids],
        "radii": certificate.radius.tolist(),
        "reasons": list(certificate.reasons),
        "predicted": certificate.predicted.tolist(),
        "lower": certificate.lower.tolist(),
        "counts": certificate.counts,
        "correct": certificate.correct,
        "correct_interval": [low, high],
        "abstentions": certificate.abstentions,
        "mean_radius": float(certificate.radius.mean()),
        "grid": grid_record(certificate, GRID[certificate.norm]),
        "notes": list(certificate.notes),
    }


def smoothed_text(record: Mapping[str, Any]) -> str:
    """The table of a file's content."""
    n, (low, high) = record["n"], record["correct_interval"]
    noise = f"sigma {record['sigma']:g}, {record['selection_samples']:,} + {record['samples']:,} noisy copies"
    return "\n".join(
        [
            f"certified accuracy of the smoothed classifier, L2, {n:,} images: {noise}",
            f"each certificate holds with probability {record['confidence']:g} over the noise drawn; of the model "
            "without noise it says nothing",
            f"smoothed accuracy {100 * record['correct'] / n:.1f} % ({100 * low:.1f} to {100 * high:.1f} %), "
            f"{record['abstentions']:,} abstentions",
            *grid_lines(record),
            *record["notes"],
        ]
    )
