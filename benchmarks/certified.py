"""Experts and training made for certificates, on digits: certified accuracy over seeds, what an attack inside every
radius finds, and what certified training costs in clean accuracy.

Run: python benchmarks/certified.py [--seeds 0,1,2] [--images N] [--folder DIR] [--picture FILE.svg]

The recipes digits-certified-l2 and digits-certified-linf are trained into --folder for each seed, with a soft and with
a top-1 gate, and found there from then on. Everything is counted on the test images; settings were chosen on
validation images.
"""

# N images

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from common import RESULTS, Bar, Record, write_record
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from phalanx.attacks import PGD, RouteSteering
from phalanx.certification import Certificate, certify
from phalanx.config import load_run
from phalanx.data import ImageSet, load_data
from phalanx.models import load
from phalanx.nn.lipschitz import prepared_weights
from phalanx.rng import SampleRng
from phalanx.routing import MixtureOfExperts
from phalanx.runs import RunFolder
from phalanx.threat import Norm, ThreatModel
from phalanx.workflow import train_run

INSIDE = 0.999999
"""The share of its radius that an attack may use."""
GROUP, STEPS, STARTS = 32, 20, 3
"""Images of nearly the same radius that are attacked together by attacks of one epsilon; steps and starts of all."""
SURFACES = ("whole", "experts", "router", "dense")

TOP1 = ("model.top_k=1", "model.temperature=1")
WEIGHTS = (0.0, 0.25, 0.5, 0.9)
SHIPPED = 0.5
"""Weights of certified training, for the trade-off, and that of the recipe."""


class Setting(NamedTuple):
    """A recipe's mixture, and what must be certified of it, in percent by radius."""

    recipe: str
    norm: Norm
    sets: tuple[str, ...]
    least: Mapping[float, float]


SETTINGS = {
    "L2, soft": Setting("digits-certified-l2", "L2", (), {0.25: 77.5, 0.5: 13.5}),
    "L2, top-1": Setting(
        "digits-certified-l2",
        "L2",
        (*TOP1, "model.options.logit_scale=0.5", "training.certified.eps=0.5"),
        {0.25: 66.5},
    ),
    "Linf, soft": Setting("digits-certified-linf", "Linf", (), {0.02: 91.5, 0.05: 79.5}),
    "Linf, top-1": Setting(
        "digits-certified-linf",
        "Linf",
        (*TOP1, "model.router={name: robust}", "training.certified.eps=0.05"),
        {0.02: 91.5, 0.05: 79.5},
    ),
}
RADII: Mapping[Norm, tuple[float, ...]] = {"L2": (0.25, 0.5, 0.75), "Linf": (0.02, 0.05, 0.1)}


class Found(NamedTuple):
    """Of one trained mixture."""

    clean: float
    certified: dict[float, float]
    """In percent, by radius."""
    mean_radius: float
    attacked: int
    """Images with a radius."""
    broken: int
    """Those that an attack changed the answer to inside it."""


def trained(folder: Path, recipe: str, seed: int, sets: Sequence[str]) -> MixtureOfExperts:
    """The run of a recipe in `folder`, made if it is not there; its last weights."""
    name = "-".join([recipe, f"seed{seed}", *(item.replace(" ", "").replace("/", "_") for item in sets)])
    run = folder / name
    if RunFolder(run).status() != "finished":
        train_run(load_run(recipe, (*sets, f"seed={seed}", "device=cpu", "threads=1")).value, run)
    model = load(run, weights="last")
    assert isinstance(model, MixtureOfExperts)
    return model


def looked_at(model: MixtureOfExperts, images: ImageSet, norm: Norm, *, attack: bool = True) -> Found:
    """Certified accuracy of all images, and how many radii an attack proves wrong."""
    found = certify(model, images, norm=norm)
    return Found(
        clean=100 * found.accuracy_at(0),
        certified={radius: 100 * found.accuracy_at(radius) for radius in RADII[norm]},
        mean_radius=float(found.radius.mean()),
        attacked=found.counts["certified"],
        broken=broken_within(model, images, found, INSIDE) if attack else 0,
    )


# -- attacks inside every image's own radius -----------------------------------------------------------------------


def broken_within(model: MixtureOfExperts, images: ImageSet, found: Certificate, share: float) -> int:
    """How many certified images some attack changes the answer to within `share` of their radius: PGD on every surface
    and route steering, and ascent in float64 with a radius for each image."""
    (batch,) = images.batches(len(images))
    held = found.radius > 0
    x, y, radius = batch.x[held], batch.y[held], share * found.radius[held]
    with prepared_weights(model):
        fallen = _alike(model, x, y, radius, found.norm)
        exact = copy.deepcopy(model).double()
        for start in range(STARTS):
            for aim in (None, *range(len(model.experts))):
                fallen |= _ascent(exact, x.double(), y, radius, found.norm, aim, start)
    return int(fallen.sum())


def _alike(model: MixtureOfExperts, x: Tensor, y: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """(N,) bool, by attacks of one epsilon: that of the smallest radius among `GROUP` alike."""
    fallen = torch.zeros(len(x), dtype=torch.bool)
    for group in radius.argsort().split(GROUP):
        threat = ThreatModel(norm, float(radius[group].min()))
        plain = PGD(steps=STEPS).within(threat)
        attacks = [replace(plain, surface=surface) for surface in SURFACES]
        for attack in (*attacks, RouteSteering(steps=STEPS).within(threat)):
            rng = SampleRng.for_batch(len(group), 1)
            fallen[group] |= attack.run(model, x[group], y[group], rng=rng).broken
    return fallen


def _ascent(
    model: MixtureOfExperts, x: Tensor, y: Tensor, radius: Tensor, norm: Norm, aim: int | None, start: int
) -> Tensor:
    """(N,) bool: whether the answer changes on the way up the mixture's margin or, with an `aim`, up that expert's
    margin and its score."""
    wide, generator = radius.reshape(-1, 1, 1, 1), torch.Generator().manual_seed(start)
    noise = 2 * torch.rand(x.shape, generator=generator).to(x) - 1
    point = _inside(x + start * wide * noise, x, wide, norm)
    fallen = torch.zeros(len(x), dtype=torch.bool)
    for step in range(STEPS + 1):
        point.requires_grad_()
        routed = model.routed(point)
        fallen |= routed.logits.argmax(1) != y
        logits = routed.logits if aim is None else model.experts[aim](point)
        gain = logits.scatter(1, y[:, None], float("-inf")).amax(1) - logits.gather(1, y[:, None])[:, 0]
        if aim is not None:
            scores = model.gate(point).scores
            gain = gain + scores[:, aim] - scores.amax(1)
        slope = torch.autograd.grad(gain.sum(), point)[0]
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(wide.shape)
        size = wide * (1 - step / (STEPS + 1))
        point = _inside(point.detach() + size * (slope.sign() if norm == "Linf" else slope / length), x, wide, norm)
    return fallen


def _inside(point: Tensor, x: Tensor, wide: Tensor, norm: Norm) -> Tensor:
    delta = point - x
    if norm == "Linf":
        delta = torch.minimum(torch.maximum(delta, -wide), wide)
    else:
        delta = delta * (wide / delta.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(wide.shape)).clamp_max(1)
    return (x + delta).clamp(0, 1)


# -- the record ----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, deviation and the numbers themselves."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(mean(values), 4), "deviation": round(deviation, 4), "seeds": [round(v, 4) for v in values]}


def summary(found: Sequence[Found]) -> dict[str, Any]:
    """Of one setting over its seeds."""
    return {
        "clean": spread([each.clean for each in found]),
        "certified": {str(r): spread([each.certified[r] for each in found]) for r in found[0].certified},
        "mean radius": spread([each.mean_radius for each in found]),
        "attacked": sum(each.attacked for each in found),
        "broken": sum(each.broken for each in found),
    }


def trade_off(
    folder: Path, images: ImageSet, seeds: Sequence[int], weights: Sequence[float], more: Sequence[str] = ()
) -> dict[str, Any]:
    """Clean and certified accuracy of the Linf recipe by the weight of certified training; at 0 it is left out."""
    rows = {}
    for weight in weights:
        sets = ("training.certified=null",) if not weight else (f"training.certified.weight={weight}",)
        sets = () if weight == SHIPPED else sets
        models = [trained(folder, "digits-certified-linf", seed, (*sets, *more)) for seed in seeds]
        rows[str(weight)] = summary([looked_at(model, images, "Linf", attack=False) for model in models])
    return {weight: {key: row[key] for key in ("clean", "certified", "mean radius")} for weight, row in rows.items()}


def picture(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """An SVG of `trade_off`: clean accuracy, and certified accuracy at each radius, by the weight."""
    drawing = Figure(figsize=(5, 3), layout="constrained")
    axes = drawing.subplots()
    weights = [float(weight) for weight in rows]
    axes.plot(weights, [row["clean"]["mean"] for row in rows.values()], "k^-", label="clean")
    for radius, style in zip(RADII["Linf"], ("o-", "s--", "D:"), strict=True):
        held = [row["certified"][str(radius)]["mean"] for row in rows.values()]
        axes.plot(weights, held, style, label=f"certified at {radius}")
    axes.set(xlabel="weight of certified training", ylabel="accuracy, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False, loc="lower right")
    with rc_context({"svg.hashsalt": path.stem}):
        drawing.savefig(path, metadata={"Date": None})


def measure(
    folder: Path,
    seeds: Sequence[int],
    count: int | None,
    settings: Mapping[str, Setting] = SETTINGS,
    weights: Sequence[float] = WEIGHTS,
    sets: Sequence[str] = (),
) -> Record:
    """The record of all; `sets` are more of every recipe's settings."""
    test = load_data("digits").test
    images = test if count is None else test.first(count)
    rows, bars = {}, []
    for name, setting in settings.items():
        models = [trained(folder, setting.recipe, seed, (*setting.sets, *sets)) for seed in seeds]
        rows[name] = summary([looked_at(model, images, setting.norm) for model in models])
        for radius, least in setting.least.items():
            value = rows[name]["certified"][str(radius)]["mean"]
            bars.append(Bar(what=f"{name}: certified at {radius}, %", value=value, limit=least, at_most=False))
        bars.append(Bar(what=f"{name}: certified and broken", value=rows[name]["broken"], limit=0, at_most=True))
    return Record(
        benchmark="certified-digits",
        what="Certified accuracy in percent of mixtures of four small experts made or trained for certificates, mean "
        "and deviation over seeds; attacks inside 0.999999 of every certified image's own radius; clean and certified "
        "accuracy by the weight of certified training",
        settings={
            "seeds": list(seeds),
            "images": len(images),
            "settings": {name: [s.recipe, *s.sets, *sets] for name, s in settings.items()},
            "steps": STEPS,
            "starts": STARTS,
        },
        rounds=len(seeds),
        measurements={"settings": rows, "weight": trade_off(folder, images, seeds, weights, sets) if weights else {}},
        bars=bars,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/certified"))
    parser.add_argument("--picture", type=Path, help="Also draw the trade-off into this SVG.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(chosen.folder, [int(seed) for seed in chosen.seeds.split(",")], chosen.images)
    write_record(found, chosen.out)
    if chosen.picture is not None:
        picture(found.measurements["weight"], chosen.picture)
