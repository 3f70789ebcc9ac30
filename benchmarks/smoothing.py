"""Randomised smoothing of a top-1 mixture of digits: certified accuracy over seeds, seconds an image, and an attack.

Run: python benchmarks/smoothing.py [--seeds 0,1,2] [--images N] [--samples N] [--folder DIR]

The recipe digits-smoothing is trained into --folder for each seed and noise, digits-st for the dual models, and found
there from then on. Everything is counted on the test images; settings were chosen on validation images.
"""

# M noisy copies

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import RESULTS, Bar, Record, write_record
from torch import Tensor, nn

from phalanx.certification import SmoothedCertificate, Smoothing, certify_smoothed
from phalanx.certification.smoothing import ABSTAINED, predicted
from phalanx.certification.votes import Voter
from phalanx.config import load_run
from phalanx.data import ImageSet, load_data
from phalanx.models import load
from phalanx.nn import frozen
from phalanx.rng import SampleRng
from phalanx.routing import DualModel
from phalanx.runs import RunFolder
from phalanx.workflow import train_run

SIGMAS = (0.25, 0.5)
ALPHAS = (0.7, 0.9)
"""Of the dual models of a standard mixture and the smoothed one of sigma 0.25."""
RADII = (0.25, 0.5, 0.75, 1.0)
BATCH = 1024

ATTACKED = 100
STEPS, COPIES, INSIDE = 20, 32, 0.999
"""Of the attack: steps, noisy copies that each gradient is averaged over, and the share of the radius it may use."""
JUDGED = Smoothing(samples=1000, seed=1)
"""Fresh noise, and few enough copies that what is barely held is abstained on."""


def trained(folder: Path, recipe: str, seed: int, sets: Sequence[str] = ()) -> nn.Module:
    """The run of a recipe in `folder`, made if it is not there."""
    run = folder / "-".join([recipe, *(each.rpartition("=")[2] for each in sets), f"seed-{seed}"])
    if RunFolder(run).status() != "finished":
        train_run(load_run(recipe, (*sets, f"seed={seed}")).value, run)
    return load(run)


def certify(
    model: nn.Module, images: ImageSet, sigma: float, samples: int, smoothed: str
) -> tuple[SmoothedCertificate, float]:
    """And its seconds of CPU time for each image, on one thread."""
    started = time.process_time()
    found = certify_smoothed(model, images, sigma=sigma, samples=samples, smoothed=smoothed, batch_size=BATCH)
    return found, (time.process_time() - started) / len(images)


def broken(model: nn.Module, images: ImageSet, found: SmoothedCertificate) -> dict[str, int]:
    """Of at most ATTACKED certified images, how many the smoothed classifier answers otherwise, or not at all, after
    PGD on the mean probability of noisy copies (Salman et al. 2019) within INSIDE of each one's radius."""
    rows = (found.radius > 0).nonzero()[:, 0][:ATTACKED].tolist()
    smoothing = Smoothing(sigma=found.smoothing.sigma, samples=JUDGED.samples, seed=JUDGED.seed)
    voter = Voter.of(model, smoothing)
    moved = _attacked(model, images, rows, found) if rows else []
    answers = [predicted(voter.votes(x, row, BATCH), voter) for row, x in zip(rows, moved, strict=True)]
    wrong = [a not in (ABSTAINED, int(found.labels[row])) for row, a in zip(rows, answers, strict=True)]
    return {"attacked": len(rows), "answered otherwise": sum(wrong), "abstained": answers.count(ABSTAINED)}


def _attacked(model: nn.Module, images: ImageSet, rows: list[int], found: SmoothedCertificate) -> Tensor:
    x, y = images.images(rows), found.labels[rows]
    most = INSIDE * found.radius[rows].float().reshape(-1, 1, 1, 1)
    rng = SampleRng(JUDGED.seed, torch.tensor(rows, dtype=torch.int64))
    delta = torch.zeros_like(x)
    with frozen(model):
        for step in range(STEPS):
            noise = found.smoothing.sigma * rng.normal("attack", (COPIES, *x.shape[1:]), step=step)
            leaf = delta.clone().requires_grad_()
            logits = model(((x + leaf)[:, None] + noise).flatten(0, 1)).unflatten(0, (len(x), COPIES))
            held = logits.softmax(-1).mean(1).gather(1, y[:, None]).sum()
            (gradient,) = torch.autograd.grad(held, leaf)
            delta = delta - 0.25 * most * gradient / _norm(gradient)
            delta = delta * (most / _norm(delta)).clamp_max(1)
    return x + delta


def _norm(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def counts(found: SmoothedCertificate, seconds: float) -> dict[str, Any]:
    """Of one certificate, in images."""
    return {
        "correct": found.correct,
        "abstained": found.abstentions,
        "certified": {f"{radius:g}": found.certified(radius) for radius in RADII},
        "mean radius": round(float(found.radius.mean()), 4),
        "seconds an image": round(seconds, 4),
    }


def measure(folder: Path, images: ImageSet, seeds: Sequence[int], samples: Sequence[int]) -> dict[str, Any]:
    """By classifier and number of samples, for each seed what `counts` says; for each noise what the attack broke."""
    found: dict[str, Any] = {}
    for seed in seeds:
        models = {sigma: trained(folder, "digits-smoothing", seed, (f"method.noise={sigma}",)) for sigma in SIGMAS}
        standard = trained(folder, "digits-st", seed)
        subjects = {f"top-1, sigma {sigma}": (model, sigma, "whole") for sigma, model in models.items()}
        subjects["top-1, sigma 0.25, trained without noise"] = (standard, SIGMAS[0], "whole")
        for alpha in ALPHAS:
            dual = DualModel(standard, models[SIGMAS[0]], alpha).eval()
            subjects[f"dual, alpha {alpha}, robust half smoothed"] = (dual, SIGMAS[0], "robust")
        for name, (model, sigma, smoothed) in subjects.items():
            for n in samples:
                certificate, seconds = certify(model, images, sigma, n, smoothed)
                found.setdefault(f"{name}, n {n}", []).append(counts(certificate, seconds))
            if model in models.values():
                found.setdefault(f"{name}, attack", []).append(broken(model, images, certificate))
    return found


def summary(found: Mapping[str, Any], images: int) -> list[str]:
    """A line for each classifier: mean and deviation over the seeds, in per cent of the images."""
    lines = []
    for name, runs in found.items():
        if "correct" not in runs[0]:
            continue
        shares = {"correct": [run["correct"] for run in runs]}
        shares |= {radius: [run["certified"][radius] for run in runs] for radius in runs[0]["certified"]}
        told = [f"{key} {100 * mean(of) / images:.1f} ± {_deviation(of, images):.1f}" for key, of in shares.items()]
        lines.append(f"{name}: {', '.join(told)}; {mean(run['seconds an image'] for run in runs):.4f} s an image")
    return lines


def _deviation(values: Sequence[int], images: int) -> float:
    return 100 * stdev(values) / images if len(values) > 1 else 0.0


def record(found: Mapping[str, Any], images: int, seeds: Sequence[int], samples: Sequence[int]) -> Record:
    """The record of what `measure` found; the bars are a first prototype's numbers."""
    runs = found[f"top-1, sigma 0.25, n {samples[0]}"]
    reached = {radius: 100 * mean(run["certified"][radius] for run in runs) / images for radius in ("0.25", "0.5")}
    otherwise = sum(run["answered otherwise"] for name, of in found.items() if "attack" in name for run in of)
    return Record(
        benchmark="smoothing",
        what=(
            "Randomised smoothing of the digits recipes: images that the smoothed classifier answers rightly and that "
            "are certified at each L2 radius, for each seed; CPU seconds an image on one thread; and what PGD on the "
            "smoothed classifier broke inside the radii."
        ),
        settings={
            "images": images,
            "seeds": list(seeds),
            "samples": list(samples),
            "selection samples": Smoothing.selection_samples,
            "confidence": Smoothing.confidence,
            "attack": {"steps": STEPS, "copies": COPIES, "share of the radius": INSIDE, "votes": JUDGED.samples},
        },
        rounds=len(seeds),
        measurements=found,
        bars=[
            Bar("smoothed accuracy, sigma 0.25, %", 100 * mean(run["correct"] for run in runs) / images, 92, False),
            Bar("certified at 0.25, sigma 0.25, %", reached["0.25"], 73, at_most=False),
            Bar("certified at 0.5, sigma 0.25, %", reached["0.5"], 35, at_most=False),
            Bar("certified images that an attack inside the radius changed", otherwise, 0, at_most=True),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=449)
    parser.add_argument("--samples", default="2000,10000")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-smoothing"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds, samples = ([int(each) for each in text.split(",")] for text in (chosen.seeds, chosen.samples))
    images = load_data("digits").test.first(chosen.images)
    found = measure(chosen.folder, images, seeds, samples)
    print("\n".join(summary(found, len(images))))
    write_record(record(found, len(images), seeds, samples), chosen.out)


if __name__ == "__main__":
    main()
