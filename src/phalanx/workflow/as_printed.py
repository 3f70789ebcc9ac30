"""Attack a run's images inside the radii that the printed theorems claim for them: what is UNSOUND, in numbers."""

# N samples

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.attacks.routing_attacks import RouteSteering
from phalanx.certification import Certificate, certify, parse_wanted
from phalanx.certification.as_printed import Claim, printed_claims
from phalanx.certification.search import diameter
from phalanx.config import EvaluationConfig
from phalanx.data import ImageSet, load_data
from phalanx.evaluation.evaluate import model_sha256
from phalanx.evaluation.protocols import Member
from phalanx.models import load
from phalanx.report.printed import PRINTED_NAME
from phalanx.runs import RunFolder, write_json
from phalanx.threat import Norm
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, pick_device
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.training import refuse_other_data, require_finished, run_config

SCHEMA = 1
_STEPS = 40
_GROUP = 16
"""Images of nearly the same radius are attacked together, within the smallest of theirs."""
_SHARE = 0.999999


@dataclass(frozen=True)
class Broken:
    """How many of the images that a radius was claimed for were broken inside it."""

    claimed: int
    broken: int
    mean_radius: float
    """Over all images; a radius beyond the largest distance of two images counts as that."""


def attacked(model: nn.Module, images: ImageSet, radius: Tensor, norm: Norm, seed: int = 0) -> Broken:
    """PGD on the whole model, and each expert in turn after steering the image to it, inside `radius` (N,) of each.

    An answer there that is not finite is no answer that was claimed: it counts as broken.
    """
    most = diameter(images.shape, norm)
    capped = radius.clamp_max(most)
    order = capped.argsort()[int((capped <= 0).sum()) :]
    device = next(model.parameters()).device
    broken = 0
    for start in range(0, len(order), _GROUP):
        group = order[start : start + _GROUP]
        eps = _SHARE * float(capped[group].min())
        chosen = images.select(group.numpy())
        (batch,) = chosen.batches(_GROUP, device)
        fallen = torch.zeros(len(group), dtype=torch.bool, device=device)
        for member in _attacks(eps, norm):
            result = member.attack.run(model, batch.x, batch.y, rng=member.streams(seed, batch.ids))
            fallen |= result.broken | result.invalid
        broken += int(fallen.sum())
    return Broken(len(order), broken, float(capped.mean()))


def _attacks(eps: float, norm: Norm) -> Iterator[Member]:
    yield Member(f"pgd-{_STEPS}", PGD(eps=eps, norm=norm, steps=_STEPS))
    yield Member(f"steer-{_STEPS}", RouteSteering(eps=eps, norm=norm, steps=_STEPS))


def attack_printed(
    run: Path, config: EvaluationConfig, norm: str, folder: Path | None = None, reporter: Reporter | None = None
) -> tuple[Path, dict[str, Any]]:
    """Of a finished run's test images: what the printed theorem claims, what Lipschitz bounds certify, and how many of
    both an attack broke; the folder, and what `printed.json` there holds. Of `config` n and weights count.

    Raises InputError as `printed_claims` and `certify_run`.
    """
    require_finished(run)
    wanted, _ = parse_wanted(norm, "lipschitz")
    settings, reporter = run_config(run), reporter or Silent()
    name = f"{wanted}-printed-unsound-{config.weights}-{config.size}"
    target = RunFolder(folder or Path(run) / "certificates" / name)
    with target.lock(), cpu_threads(settings.threads):
        device, data = pick_device(settings.device), load_data(settings.data)
        refuse_other_data(run, data)
        model = load(run, weights=config.weights).to(device)
        images = data.test.first(config.n)
        digest = model_sha256(model)
        bound = {"kind": "printed, unsound", "norm": wanted, "n": config.n, "model_sha256": digest, "steps": _STEPS}
        if target.status() == "finished":
            target.prepare(bound)
            target.verify()
            return target.path, json.loads(target.resolve(PRINTED_NAME).read_bytes())
        # refused before the folder is
        claims = _claims(model, images, wanted, device)
        sound = certify(model, images, norm=wanted, method="lipschitz")
        target.prepare(bound)
        with target.records_outcome(), stopped_by_signals("the same command starts again"):
            record = _record(model, images, claims, sound, wanted, settings.seed, reporter) | {"model_sha256": digest}
            write_json(target.resolve(PRINTED_NAME), record)
        target.finish()
    return target.path, record


def _claims(model: nn.Module, images: ImageSet, norm: Norm, device: torch.device) -> tuple[Claim, ...]:
    (batch,) = images.batches(len(images), device)
    return printed_claims(model, batch.x, batch.y, norm)


def _record(
    model: nn.Module,
    images: ImageSet,
    claims: tuple[Claim, ...],
    sound: Certificate,
    norm: Norm,
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    radii = [(f"theorem {claim.theorem} as printed", claim.slopes, False, claim.radius) for claim in claims]
    radii.append(("reachable experts, both classes", "upper bounds", True, sound.radius))
    lines = []
    for done, (name, slopes, holds, radius) in enumerate(radii):
        found = attacked(model, images, radius.cpu(), norm, seed)
        assert math.isfinite(found.mean_radius)
        lines.append(
            {
                "radius": name,
                "slopes": slopes,
                "sound": holds,
                "claimed": found.claimed,
                "broken": found.broken,
                "mean_radius": found.mean_radius,
            }
        )
        reporter.progress(done + 1, len(radii), "attacked inside its claims")
    return {"schema": SCHEMA, "sound": False, "norm": norm, "n": len(images), "steps": _STEPS, "lines": lines}


def printed_text(record: dict[str, Any]) -> str:
    """The table of a file's content."""
    head = (
        f"what the printed theorem claims, {record['norm']}, {record['n']:,} images, and what PGD and route steering "
        f"({record['steps']} steps) broke inside: UNSOUND, for reproduction alone"
    )
    rows = [f"{'radius':<34}  {'constants':<13}  {'mean':>8}  {'claimed':>7}  {'broken':>6}"]
    rows += [
        f"{line['radius']:<34}  {line['slopes']:<13}  {line['mean_radius']:>8.4g}  {line['claimed']:>7,}  "
        f"{line['broken']:>6,}"
        for line in record["lines"]
    ]
    return "\n".join([head, *rows])
