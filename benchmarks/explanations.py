"""The papers' explanations of robustness, measured: Lipschitz constants, margins, and how long a route holds.

Run: python benchmarks/explanations.py FOLDER... (each seed's folder of phalanx run quickstart --seeds 0,1,2: the runs
st, at, rt-er and jtdmoe-0.7), which writes results/explanations-digits.json and prints the tables.

Rigorous: upper bounds of Lipschitz constants, certified radii, and the router's constant, which is linear and so exact.
Empirical: the largest gradient at the image and at points drawn from its ball, which bounds nothing.
"""

# N samples, E experts, C classes

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Record, write_record
from torch import Tensor, nn

from phalanx.bounds import dual_norm, forward
from phalanx.certification import certify
from phalanx.certification.as_printed import printed_claims
from phalanx.certification.models import Reader, read_model
from phalanx.certification.moe import Mixture
from phalanx.certification.search import diameter
from phalanx.data import ImageSet, load_data
from phalanx.models import load
from phalanx.rng import SampleRng
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.threat import Norm, ThreatModel
from phalanx.workflow.as_printed import attacked

EPS: Mapping[Norm, float | str] = {"Linf": "3/16", "L2": 0.5}
"""Linf's is what the runs were trained within."""
ALPHA = 0.7
ATTACKED = 200
"""Images, the first ones, that are attacked inside printed radii."""
DRAWN = 10
"""Points of each ball where a gradient is taken, besides the image."""

Numbers = dict[str, float]


def mixtures(folder: Path) -> dict[str, MixtureOfExperts]:
    """Of one seed, by what they are; a dual model's robust half stands for itself."""
    found: dict[str, Any] = {name: load(folder / run).eval() for name, run in RUNS.items()}
    found["JTDMoE, robust half"] = found["JTDMoE, robust half"].robust
    return found


RUNS = {"ST": "st", "AT": "at", "RT-ER": "rt-er", "JTDMoE, robust half": "jtdmoe-0.7"}


def constants(mixture: MixtureOfExperts, images: ImageSet, norm: Norm) -> Numbers:
    """Of experts and router, margins, and how far away the route changes; means over images that are right."""
    read = read_model(mixture, Reader(images.shape, norm)).model
    assert isinstance(read, Mixture) and read.router is not None
    (batch,) = images.batches(len(images))
    with torch.no_grad():
        seen = read.see(batch.x.double())
        routed = seen.scores.values.argmax(1)
        logits = torch.stack([answers.values for answers in seen.answers], 1)[torch.arange(len(routed)), routed]
    right = logits.argmax(1) == batch.y
    entries = seen.entries.scatter(1, routed[:, None], torch.inf).amin(1).clamp_max(diameter(images.shape, norm))
    threat = ThreatModel(norm, EPS[norm])
    margin, share = _margin(logits, batch.y), _margin(logits.softmax(1), batch.y)
    slope = _steepest(read, routed, batch.x, batch.y, threat)
    crown = certify(mixture, images, norm=norm, method="crown")
    return {
        "accuracy": float(right.double().mean()),
        "expert constant, upper bound": statistics.fmean(float(each.lipschitz.max()) for each in read.experts),
        "expert slope, gradients": float(slope[right].mean()),
        "router constant, exact": float(read._lipschitz.max()),
        "logit margin": float(margin[right].mean()),
        "probability margin": float(share[right].mean()),
        "margin / slope": float((margin / slope)[right].mean()),
        "certified radius": float(crown.radius.mean()),
        "route entry radius": float(entries[right].mean()),
        "routes that hold at eps": float((entries > threat.epsilon).double().mean()),
        "load of the busiest expert": float(routed.bincount(minlength=len(read.experts)).max() / len(routed)),
    }


def _margin(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y[:, None])[:, 0] - values.scatter(1, y[:, None], -torch.inf).amax(1)


def _steepest(read: Mixture, routed: Tensor, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """(N,): the largest gradient of the answering expert's margin, at the image and at points of its ball."""
    rng = SampleRng.for_batch(len(x), 0)
    drawn = [x, *(threat.random_start(x, rng, restart=restart) for restart in range(DRAWN))]
    found = torch.zeros(len(x), dtype=torch.float64)
    for index, expert in enumerate(read.experts):
        some = (routed == index).nonzero()[:, 0]
        for points in drawn if len(some) else ():
            image = points[some].double().requires_grad_()
            margin = _margin(forward(expert.stages, image), y[some])
            (gradient,) = torch.autograd.grad(margin.sum(), image)
            found[some] = torch.maximum(found[some], dual_norm(gradient.flatten(1), threat.norm))
    return found


def duals(folder: Path, images: ImageSet) -> dict[str, Numbers]:
    """Clean margins of probabilities: joined after training apart, and trained jointly."""
    apart = DualModel(load(folder / "st"), load(folder / "rt-er"), ALPHA).eval()  # type: ignore[arg-type]
    (batch,) = images.batches(len(images))
    found = {}
    for name, model in (("ST and RT-ER", apart), ("JTDMoE", load(folder / "jtdmoe-0.7").eval())):
        assert isinstance(model, DualModel)
        with torch.no_grad():
            probabilities = model(batch.x).exp()
        right = probabilities.argmax(1) == batch.y
        margin = _margin(probabilities, batch.y)
        found[name] = {"accuracy": float(right.double().mean()), "probability margin": float(margin[right].mean())}
    return found


def printed(model: nn.Module, images: ImageSet, norm: Norm) -> dict[str, Numbers]:
    """What the printed theorem claims, and what is broken inside; beside the same constants used soundly."""
    (batch,) = images.batches(len(images))
    radii = {
        f"{claim.theorem}, {claim.slopes}": claim.radius for claim in printed_claims(model, batch.x, batch.y, norm)
    }
    radii["reachable experts, both classes"] = certify(model, images, norm=norm, method="lipschitz").radius
    found = {}
    for name, radius in radii.items():
        done = attacked(model, images, radius, norm)
        found[name] = {"claimed": done.claimed, "broken": done.broken, "mean radius": done.mean_radius}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": float(f"{statistics.fmean(values):.4g}"), "deviation": float(f"{deviation:.4g}")}


def over_seeds(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of nested numbers, one mapping a seed: the spread of each."""
    return {
        key: over_seeds([each[key] for each in measured])
        if isinstance(value, Mapping)
        else spread([float(each[key]) for each in measured])
        for key, value in measured[0].items()
    }


def measure(folders: Sequence[Path], images: ImageSet, tell: Callable[[str], None] = print) -> Record:
    """The record of all seeds."""
    made = []
    for folder in folders:
        tell(str(folder))
        found = mixtures(folder)
        attacked_models = {"ST": found["ST"], "RT-ER": found["RT-ER"], "JTDMoE": load(folder / "jtdmoe-0.7").eval()}
        made.append(
            {
                "constants": {
                    norm: {name: constants(mixture, images, norm) for name, mixture in found.items()} for norm in EPS
                },
                "dual models": duals(folder, images),
                "printed theorems": {
                    norm: {
                        name: printed(model, images.first(ATTACKED), norm) for name, model in attacked_models.items()
                    }
                    for norm in EPS
                },
            }
        )
    return Record(
        benchmark="explanations-digits",
        what="The papers' explanations of robustness on digits: Lipschitz constants of experts (upper bounds; "
        "gradients, which bound nothing) and router (exact), margins, route entry radii; and the printed theorems, "
        "UNSOUND, attacked inside their radii. Mean and standard deviation over seeds",
        settings={
            "n": len(images),
            "eps": dict(EPS),
            "alpha": ALPHA,
            "attacked": ATTACKED,
            "points of a ball": DRAWN,
            "seeds": len(folders),
        },
        rounds=len(folders),
        measurements=over_seeds(made),
        bars=[],
    )


def markdown(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A column for each model."""
    names = list(table)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for key in table[names[0]]:
        cells = (f"{table[name][key]['mean']:.3g} ± {table[name][key]['deviation']:.2g}" for name in names)
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(chosen.folders, load_data("digits").test)
    print(write_record(record, chosen.out))
    for norm in EPS:
        print(norm, markdown(record.measurements["constants"][norm]), sep="\n")
    print(markdown(record.measurements["dual models"]))
